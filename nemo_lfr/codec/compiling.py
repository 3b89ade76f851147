"""Keep functions out of the graphs of `torch.compile`, in modules that must not import torch."""

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def outside_of_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that `torch.compile` calls it as ordinary Python, without tracing or compiling it."""
    disabled: Callable[P, R] | None = None

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if sys.modules.get("torch") is None:
            return function(*args, **kwargs)
        import torch

        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break()
        if "torch._dynamo" not in sys.modules:  # importing it takes a second
            return function(*args, **kwargs)
        if disabled is None:
            compiler: Any = torch.compiler
            disabled = compiler.disable(function)
            assert disabled is not None
        return disabled(*args, **kwargs)

    return run
