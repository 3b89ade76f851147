"""Errors for PyTorch's tracers and function transforms, under which the codec cannot run.

The codec branches on values in tensors, such as lengths and peaks. Within `torch.compile`, each call of the codec
therefore breaks the graph (`nemo_lfr.codec.compiling`). Within other tracers, the codec raises an error: some tracers
would record only one branch, and other tracers provide tensors without values.
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
    """Raise an error if the current thread is tracing or transforming a function.

    Raises:
        NemoLfrError: within `torch.jit.trace`, `torch.export`, `make_fx` or a transform of `torch.func`.
    """
    what = "a transform of torch.func (vmap, grad, jvp ...)" if torch._C._functorch.maybe_current_level() else None
    if _JIT.is_tracing():
        what = "torch.jit.trace"
    for key, mode in _NO_VALUES:
        if torch._C._get_dispatch_mode(key) is not None:
            what = mode
    if what:
        raise NemoLfrError(
            f"the codec cannot run within {what}, because it branches on the values of its inputs. Call the codec "
            "outside and pass its results in; to get a graph of the codec, run nemo-lfr export onnx."
        )


def check_plain_tensor(tensor: torch.Tensor, name: str, error: type[NemoLfrError]) -> None:
    """Raise an error for a nested tensor, or a wrapper such as a DTensor, MaskedTensor or FakeTensor.

    Raises:
        NemoLfrError: of the type `error`, for such a tensor.
    """
    kind = type(tensor)
    is_wrapper = getattr(kind, "__torch_dispatch__", None) is not getattr(torch.Tensor, "__torch_dispatch__", None)
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise error(f"{name} was wrapped by a transform of torch.func, such as vmap; pass a plain tensor.")
    if is_wrapper or tensor.is_nested:
        kind_name = "nested tensor" if tensor.is_nested else kind.__name__
        raise error(f"{name} is a {kind_name}; pass a plain tensor.")
