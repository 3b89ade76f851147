"""What PyTorch runs a function through to look at it, or to transform it: the codec's arithmetic is not for that.

The codec reads values (lengths, peaks, whether weights have changed) and chooses by them. So `torch.compile` gets a
break in its graph where the codec is called (`nemo_lfr.codec.compiling`), and whatever has no values to read is
refused in words.
"""

from typing import Any

import torch

from nemo_lfr.errors import NemoLfrError

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


def refuse_tracing() -> None:
    """Raise where this thread's tensors have no values.

    Raises:
        NemoLfrError: within a transform of `torch.func`, or while a graph is recorded.
    """
    what = "a transform of torch.func (vmap, grad, jvp ...)" if torch._C._functorch.maybe_current_level() else None
    if torch.jit.is_tracing():
        what = "torch.jit.trace"
    for key, mode in _NO_VALUES:
        if torch._C._get_dispatch_mode(key) is not None:
            what = mode
    if what:
        raise NemoLfrError(
            f"the codec was called within {what}; it reads the values of its inputs, which are not there. Call it "
            "before, and pass its results in; nemo-lfr export onnx makes graphs of it."
        )


def refuse_wrapper(tensor: torch.Tensor, name: str, error: type[NemoLfrError]) -> None:
    """Raise for a tensor that holds its values elsewhere, such as a DTensor, MaskedTensor or FakeTensor.

    Raises:
        NemoLfrError: of the type given.
    """
    kind = type(tensor)
    is_wrapper = getattr(kind, "__torch_dispatch__", None) is not getattr(torch.Tensor, "__torch_dispatch__", None)
    if is_wrapper or tensor.is_nested or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        kind_name = "nested tensor" if tensor.is_nested else kind.__name__
        raise error(f"{name} is a {kind_name} of torch, or wrapped by one of its transforms; pass a plain tensor.")
