"""Errors for tracers and transforms of PyTorch, which cannot run the codec.

The codec branches on values: lengths, peaks, whether weights have changed. `torch.compile` therefore breaks its graph
at each call of the codec (`nemo_lfr.codec.compiling`), and tracers whose tensors have no values get an error.
"""

from typing import Any

import torch

from nemo_lfr.errors import NemoLfrError

_JIT: Any = torch.jit
_MODES: Any = getattr(torch._C, "_TorchDispatchModeKey", None)
_NO_VALUES = tuple(
    (getattr(_MODES, key), what)
    for key, what in (
        ("FAKE", "a FakeTensorMode or torch.export"),
        ("PROXY", "make_fx or torch.export"),
        ("FUNCTIONAL", "torch.func.functionalize"),
    )
    if hasattr(_MODES, key)
)


def check_not_tracing() -> None:
    """Raise an error if tensors have no values in this thread.

    Raises:
        NemoLfrError: within a transform of `torch.func`, or while a graph is recorded.
    """
    what = "a transform of torch.func (vmap, grad, jvp ...)" if torch._C._functorch.maybe_current_level() else None
    if _JIT.is_tracing():
        what = "torch.jit.trace"
    for key, mode in _NO_VALUES:
        if torch._C._get_dispatch_mode(key) is not None:
            what = mode
    if what:
        raise NemoLfrError(
            f"the codec was called within {what}; it reads the values of its inputs, which are not available "
            "there. Call it outside and pass its results in; nemo-lfr export onnx exports it as a graph."
        )


def check_plain_tensor(tensor: torch.Tensor, name: str, error: type[NemoLfrError]) -> None:
    """Raise an error for a wrapper, such as a DTensor, MaskedTensor or FakeTensor.

    Raises:
        NemoLfrError: of the type `error`.
    """
    kind = type(tensor)
    is_wrapper = getattr(kind, "__torch_dispatch__", None) is not getattr(torch.Tensor, "__torch_dispatch__", None)
    if is_wrapper or tensor.is_nested or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        kind_name = "nested tensor" if tensor.is_nested else kind.__name__
        raise error(f"{name} is a {kind_name} of torch, or wrapped by a transform of torch.func; pass a plain tensor.")
