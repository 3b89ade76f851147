"""Run the codec independently of the caller's PyTorch settings, such as autocast and the default device.

Some settings belong to a thread (autocast, default device, inference mode, grad mode), others to the process (default
dtype, precision of fp32 matrix products). `reference_state`, for inference, turns off the settings that change
results, except the default dtype: inference code must pass a dtype for every tensor that it creates. `building_state`,
for code that builds modules, also sets the default dtype.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d

_CUDNN: Any = torch.backends.cudnn
_MKLDNN: Any = torch.backends.mkldnn


class ProcessSetting:
    """Process-wide setting that several threads can change temporarily, in `with setting.at(value)` blocks.

    The last thread that leaves a block restores the old value. While a thread is inside a block, threads that need
    another value wait.

    Args:
        get: function that returns the current value.
        put: function that sets the value.
    """

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], None]) -> None:
        self._get, self._put = get, put
        self._changed = threading.Condition()
        self._users = 0
        self._wanted: Any = None
        self._saved: Any = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """Restore the setting in a forked process, which does not have the threads that changed it."""
        self._changed = threading.Condition()
        if self._users and self._saved != self._wanted:
            self._put(self._saved)
        self._users = 0

    @contextmanager
    def at(self, wanted: Any) -> Iterator[None]:
        """Keep the setting at `wanted` inside a `with` block."""
        with self._changed:
            self._changed.wait_for(lambda: not self._users or self._wanted == wanted)
            if not self._users:
                self._wanted, self._saved = wanted, self._get()
            if self._get() != wanted:
                self._put(wanted)
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users = max(0, self._users - 1)
                if not self._users:
                    if self._saved != wanted:
                        self._put(self._saved)
                    self._changed.notify_all()

    def differs(self, wanted: Any) -> bool:
        """Return whether a `with setting.at(wanted)` block is needed.

        It is needed if the current value is not `wanted`, or while any thread is inside a `with setting.at(...)`
        block, because the end of that block may restore another value.
        """
        return self._users > 0 or self._get() != wanted


def _get_cudnn_tf32() -> Any:
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the caller has used torch 2.9's interface, which cannot be mixed with the older one
        return _CUDNN.conv.fp32_precision


def _put_cudnn_tf32(value: Any) -> None:
    if isinstance(value, bool):
        try:
            _ = torch.backends.cudnn.allow_tf32
        except RuntimeError:
            value = "tf32" if value else "ieee"
    if isinstance(value, bool):
        _CUDNN.set_flags(_allow_tf32=value)
    else:
        _CUDNN.conv.fp32_precision = value


def _attribute(owner: Any) -> ProcessSetting:
    """Return the `ProcessSetting` for oneDNN's precision in fp32 matrix products or convolutions.

    The value "none" means that a more general setting applies: the one for all of oneDNN, or the one for all backends.
    A setting that was "none" before a `with` block is "none" again afterwards, so that later changes to the general
    setting still take effect.

    Args:
        owner: `torch.backends.mkldnn.matmul` or `torch.backends.mkldnn.conv`.
    """

    def get() -> str:
        value = str(owner.fp32_precision)
        if value in ("none", "ieee"):
            return "ieee"
        return "none" if value == str(_MKLDNN.fp32_precision) else value

    return ProcessSetting(get, lambda value: setattr(owner, "fp32_precision", value))


_CUDNN_TF32 = ProcessSetting(_get_cudnn_tf32, _put_cudnn_tf32)
_DEFAULT_DTYPE = ProcessSetting(torch.get_default_dtype, torch.set_default_dtype)
if hasattr(_MKLDNN, "matmul"):  # torch 2.9
    _ONEDNN = [(_attribute(_MKLDNN.matmul), "ieee"), (_attribute(_MKLDNN.conv), "ieee")]
else:
    _PRECISION = ProcessSetting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
    _ONEDNN = [(_PRECISION, "highest")]


@contextmanager
def reference_state(device: torch.device) -> Iterator[None]:
    """Run networks independently of the caller's settings inside a `with` block.

    Autocast, gradients and inference mode are off, and the default device is the CPU. On a CPU, fp32 matrix products
    and convolutions run in full fp32. On a GPU, this context manager does not change whether TF32 is allowed; see
    `convolutions`.

    Args:
        device: device of the codec. Autocast is turned off for this device and for the CPU.

    Raises:
        NemoLfrError: for the meta device.
    """
    if device.type == "meta":
        raise NemoLfrError("the model is on the device 'meta' and has no weights; load it on 'cpu' or 'cuda'.")
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():  # cached tensors must also work outside of inference mode
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if device.type == "cpu":
            for setting, wanted in _ONEDNN:
                if setting.differs(wanted):
                    stack.enter_context(setting.at(wanted))
        yield


@contextmanager
def building_state(device: torch.device | None = None) -> Iterator[None]:
    """Build trainable fp32 modules inside a `with` block, whatever the caller's settings.

    Inference mode and CPU autocast are disabled, and the default dtype is fp32.

    Args:
        device: default device inside the block; None keeps the caller's default device.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if device is not None and torch.get_default_device() != device:
            stack.enter_context(device)
        if _DEFAULT_DTYPE.differs(torch.float32):
            stack.enter_context(_DEFAULT_DTYPE.at(torch.float32))
        yield


@contextmanager
def convolutions(tf32: bool) -> Iterator[None]:
    """Allow or forbid TF32 in cuDNN's fp32 convolutions inside a `with` block; PyTorch allows TF32 by default."""
    try:
        _ = torch.backends.cudnn.allow_tf32
        wanted: Any = tf32
    except RuntimeError:
        wanted = "tf32" if tf32 else "ieee"
    with _CUDNN_TF32.at(wanted):
        yield


def check_weights(module: nn.Module, name: str) -> None:
    """Check that a network has dense fp32 weights, and convolutions with supported settings.

    Args:
        module: encoder or decoder.
        name: name of the network, for messages.

    Raises:
        NemoLfrError: if a weight is not fp32 or is sparse, or if the settings of a `Conv1d` or `ConvTranspose1d` were
            changed to values that the module does not support.
    """
    # `module.parameters()` would take three times as long.
    for child in module.modules():
        if isinstance(child, Conv1d | ConvTranspose1d) and not child.is_consistent:
            raise NemoLfrError(
                f"{name}: the settings of a {type(child).__name__} layer were changed to values that it does not "
                f"support: {child.conv} with padding mode {getattr(child, 'pad_mode', 'constant')!r}. Restore the "
                "settings, or build the codec from a config that describes them."
            )
        for parameter in child._parameters.values():
            if parameter is not None and (
                parameter.dtype is not torch.float32 or parameter.layout is not torch.strided
            ):
                raise NemoLfrError(f"{name}: {_weight_problem(parameter)}.")


def _weight_problem(parameter: torch.Tensor) -> str:
    if parameter.layout is not torch.strided:
        return "a weight is a sparse tensor; convert it with to_dense()"
    dtype = str(parameter.dtype).removeprefix("torch.")
    if parameter.dtype is torch.float64:
        advice = "call .float() on the model, which restores the fp32 weights exactly"
    else:
        advice = (
            "the rounded weights give different tokens, and .float() does not restore the fp32 weights; load the "
            "checkpoint again, and do not call .half(), .bfloat16() or .to(dtype) on a model that contains the "
            'codec; for speed, pass precision="bf16" or "fp16" to nemo_lfr.load'
        )
    return f"the weights were converted to {dtype}; {advice}"
