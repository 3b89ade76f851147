"""Isolation from the caller's PyTorch settings: autocast, default device, inference mode, reduced precision.

These settings belong to a thread (autocast, default device, inference and grad mode) or to the process (default
dtype, precision of fp32 products). `reference_state` turns off those that change results. The codec's own code passes
the dtype of every tensor that it creates, so it does not depend on the default dtype. `building_state` also sets the
default dtype, for constructors of other libraries.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from nemo_lfr.errors import NemoLfrError

_CUDNN: Any = torch.backends.cudnn
_MKLDNN: Any = torch.backends.mkldnn


class ProcessSetting:
    """Process-wide setting that is changed while at least one thread computes.

    The first thread to enter saves the caller's value and the last one to leave restores it. A thread that needs
    another value waits until no thread uses this one.

    Args:
        get: returns the current value.
        put: sets the value.
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
        """Restore the setting in a forked process, in which the computing threads do not exist."""
        self._changed = threading.Condition()
        if self._users and self._saved != self._wanted:
            self._put(self._saved)
        self._users = 0

    @contextmanager
    def at(self, wanted: Any) -> Iterator[None]:
        """Keep the setting at `wanted` within the context."""
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
        """Return whether `at(wanted)` must be entered: the value differs, or other threads are using the setting."""
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
    """Return oneDNN's precision of fp32 products as a setting.

    A value that is inherited from the settings of oneDNN or of all backends is restored as "none", so that later
    changes of those take effect.
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
    """Compute in full fp32 and without gradients, independent of the caller's settings.

    Args:
        device: device of the codec; autocast is turned off there and on the CPU.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():  # tensors that are cached here are used outside of it too
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
    """Use this context to build trainable fp32 modules despite the caller's settings.

    It disables inference mode and CPU autocast, and sets the default dtype to fp32.

    Args:
        device: default device within the context; None for the caller's.
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
    """Allow or forbid TF32 in fp32 convolutions of cuDNN; PyTorch allows it by default."""
    try:
        _ = torch.backends.cudnn.allow_tf32
        wanted: Any = tf32
    except RuntimeError:
        wanted = "tf32" if tf32 else "ieee"
    with _CUDNN_TF32.at(wanted):
        yield


def check_weights(module: nn.Module, name: str) -> None:
    """Raise an error unless all weights of a network are fp32, the dtype that defines the tokens.

    Raises:
        NemoLfrError: if a weight has another dtype; the message names it and a remedy.
    """
    # `Module.parameters` takes three times as long.
    for parameter in (value for child in module.modules() for value in child._parameters.values()):
        if parameter is None or parameter.dtype is torch.float32:
            continue
        dtype = str(parameter.dtype).removeprefix("torch.")
        if parameter.dtype is torch.float64:
            advice = "call .float() on it, which restores the fp32 weights exactly"
        else:
            advice = (
                "the rounded weights give different tokens and .float() does not restore them; load the checkpoint "
                "again, and do not call .half(), .bfloat16() or .to(dtype) on a model that contains the codec; for "
                'speed, pass precision="bf16" or "fp16" to nemo_lfr.load'
            )
        raise NemoLfrError(f"{name}: the weights were converted to {dtype}; {advice}.")
