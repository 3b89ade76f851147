"""The few array operations that NumPy and PyTorch spell differently."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nemo_lfr.errors import TokensError

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array", np.ndarray, "torch.Tensor")


def as_integers(value: Any, name: str) -> Any:
    """Return `value` as an int64 array of its own library.

    Raises:
        TokensError: if it is not an array of integers.
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
        raise TokensError(f"{name} is {type(value).__name__}; pass a NumPy array or a PyTorch tensor.")
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype is torch.bool:
        raise TokensError(f"{name} has dtype {value.dtype}; pass integers.")
    return value.long()


def arange(stop: int, like: Array) -> Array:
    """Return 0 ... stop - 1 as int64, where `like` is."""
    if isinstance(like, np.ndarray):
        return np.arange(stop)
    import torch

    return torch.arange(stop, device=like.device)


def constant(values: Sequence[int], like: Array) -> Array:
    """Return `values` as an int64 vector, where `like` is."""
    if isinstance(like, np.ndarray):
        return np.asarray(values, np.int64)
    import torch

    return torch.tensor(list(values), dtype=torch.int64, device=like.device)


def where(condition: Any, value: Any, other: Any) -> Any:
    """Return `value` where `condition` holds, else `other`; both may be integers."""
    if isinstance(condition, np.ndarray):
        return np.where(condition, value, other)
    import torch

    return torch.where(condition, value, other)


def run_length(valid: Any) -> Any:
    """Count the leading true entries of the last axis: [..., T] -> [...]."""
    return (valid * 1).cumprod(-1).sum(-1)
