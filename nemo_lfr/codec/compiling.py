"""How `torch.compile` gets past the codec, without importing torch where it is not in use."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def outside_of_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that `torch.compile` is neither to trace nor to compile piece by piece."""
    disabled: Callable[P, R] | None = None

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if sys.modules.get("torch") is None:
            return function(*args, **kwargs)
        import torch

        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break()
        if "torch._dynamo" not in sys.modules:  # to import it takes a second
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return run
