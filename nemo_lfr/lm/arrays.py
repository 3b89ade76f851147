"""Array operations that have different names or semantics in NumPy and PyTorch, and a check of sizes."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nemo_lfr.arguments import check_whole_number
from nemo_lfr.errors import ConfigError, TokensError

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array", np.ndarray, "torch.Tensor")
MAX_SIZE = 2**31 - 1  # so that all ids fit into int64
# Function (value, name, smallest valid value) -> the value as an int.
check_size = partial(check_whole_number, most=MAX_SIZE, error=ConfigError)


def as_integers(value: Any, name: str) -> Any:
    """Convert an array or tensor of integers to int64.

    Args:
        value: NumPy array or PyTorch tensor.
        name: name of the argument, for error messages.

    Returns:
        `value` as int64: a NumPy array if `value` is one, else a PyTorch tensor on the device of `value`.

    Raises:
        TokensError: if `value` is not an array of integers.
    """
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iu":
            raise TokensError(f"{name} has dtype {value.dtype}; pass integers.")
        return value.astype(np.int64, copy=False)
    try:
        import torch
    except ImportError:
        torch = None  # type: ignore[assignment]
    if torch is None or not isinstance(value, torch.Tensor):
        raise TokensError(f"{name} has type {type(value).__name__}; pass a NumPy array or a PyTorch tensor.")
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype is torch.bool:
        raise TokensError(f"{name} has dtype {value.dtype}; pass integers.")
    return value.long()


def arange(stop: int, like: Array) -> Array:
    """Return the integers from 0 to stop - 1 as an int64 vector.

    The vector is a NumPy array if `like` is one, else a PyTorch tensor on the device of `like`.
    """
    if isinstance(like, np.ndarray):
        return np.arange(stop)
    import torch

    return torch.arange(stop, device=like.device)


def constant(values: Sequence[int], like: Array) -> Array:
    """Return `values` as an int64 vector, which is a NumPy array if `like` is one, else a PyTorch tensor."""
    if isinstance(like, np.ndarray):
        return np.asarray(values, np.int64)
    import torch

    return torch.tensor(list(values), dtype=torch.int64, device=like.device)


def where(condition: Any, value: Any, other: Any) -> Any:
    """Return `value` where `condition` is true, and `other` elsewhere. Both may be scalars."""
    if isinstance(condition, np.ndarray):
        return np.where(condition, value, other)
    import torch

    return torch.where(condition, value, other)


def run_length(valid: Any) -> Any:
    """Count the true entries before the first false one along the last axis, [..., T] -> [...]."""
    return (valid * 1).cumprod(-1).sum(-1)
