"""Registry of backends: PyTorch, ONNX Runtime, and backends from other packages.

A backend is registered by one call,

    nemo_lfr.codec.backends.register("tflite", Opener(open_tflite, accepts=is_tflite, model="a .tflite file"))

or by an entry point in the group `nemo_lfr.backends`. The name of the entry point is the name of the backend. The
object that the entry point refers to is an `Opener` or a function, like the second argument of `register`.
"""

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_lfr.codec.backend import Backend
from nemo_lfr.codec.devices import choose_device
from nemo_lfr.codec.onnx import DECODER, ENCODER
from nemo_lfr.errors import CheckpointError, NemoLfrError, shorten
from nemo_lfr.io.hub import find_checkpoint
from nemo_lfr.io.locate import check_path, locate_checkpoint
from nemo_lfr.io.shortage import check_address_space, missing_extra
from nemo_lfr.plugins import load_plugin, plugin_names

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ENTRY_POINTS = "nemo_lfr.backends"
DEFAULT = "torch"


@dataclass(frozen=True)
class OpenOptions:
    """Options with which `nemo_lfr.load` opens a backend.

    Attributes:
        name: name of the model, for messages.
        device: device to run on; None for the backend's default.
        precision: "fp32", or another precision that the backend supports.
    """

    name: str
    device: "str | torch.device | None" = None
    precision: str = "fp32"


Open = Callable[[Path, OpenOptions], Backend[Any]]


@dataclass(frozen=True)
class Opener:
    """Functions that `nemo_lfr.load` calls to open a backend, and texts for messages.

    Attributes:
        open: function that opens the model at a local path and returns its backend. The model is in the backend's own
            format if `accepts` is set; otherwise, it is a checkpoint.
        accepts: function that returns whether a local path is a model in the backend's own format, such as a .tflite
            file. None for a backend that opens checkpoints.
        check: function that raises an error for unsupported options. It is called before a checkpoint is downloaded.
        model: description of the models that `accepts` recognizes, for messages.
        advice: how to create such a model, for messages.
    """

    open: Open
    accepts: Callable[[Path], bool] | None = None
    check: Callable[[OpenOptions], object] | None = None
    model: str = "a model in its own format"
    advice: str = "pass the path of such a model"


def register(name: str, opener: Opener | Open) -> None:
    """Register a backend. `nemo_lfr.load` can then open it by name, or by the path of a model that `opener` accepts.

    Args:
        name: name of the backend.
        opener: an `Opener`, or only its `open` function for a backend that opens checkpoints.

    Raises:
        NemoLfrError: if another backend has this name.
    """
    if name in _OPENERS:
        raise NemoLfrError(f"backend {name!r} is already registered; choose another name.")
    _OPENERS[name] = opener if isinstance(opener, Opener) else Opener(opener)


def unregister(name: str) -> None:
    """Remove a backend from the registry. An unknown name is ignored.

    A backend from an entry point is registered again when it is next used.

    Args:
        name: name of the backend.
    """
    _OPENERS.pop(name, None)


def backend_names() -> list[str]:
    """Return the names of all backends, including backends from other installed packages."""
    return [*dict.fromkeys((*_OPENERS, *plugin_names(ENTRY_POINTS)))]


def find_opener(name: str) -> Opener:
    """Return the opener of a backend.

    Raises:
        NemoLfrError: if there is no backend of this name, or if a package's backend cannot be imported.
    """
    if not isinstance(name, str):
        raise NemoLfrError(f"backend {shorten(repr(name))} is not a name; use one of {backend_names()}.")
    if name not in _OPENERS:
        if (opener := load_plugin(ENTRY_POINTS, name)) is not None:
            register(name, opener)
        else:
            names = [repr(known) for known in backend_names()]
            raise NemoLfrError(f"backend {name!r} is unknown; use {', '.join(names[:-1])} or {names[-1]}.")
    return _OPENERS[name]


def backend_of(path: Path) -> str | None:
    """Return the name of the backend that accepts a local path, or None."""
    return next((name for name, opener in _OPENERS.items() if opener.accepts and opener.accepts(path)), None)


def open_backend(
    source: str | os.PathLike[str] | None = None,
    device: "str | torch.device | None" = None,
    precision: str = "fp32",
    backend: str | None = None,
) -> Backend[Any]:
    """Open a model with one of the backends; see `nemo_lfr.load` for the arguments and errors."""
    if source is not None:
        check_path(source, CheckpointError)
    path = Path(os.path.expanduser(source)) if source else None
    owner = None if path is None else backend_of(path)
    chosen = backend if backend is not None else owner or DEFAULT
    opener = find_opener(chosen)
    if opener.accepts is None and owner is not None:
        raise NemoLfrError(
            f"{source}: this is {find_opener(owner).model}, which backend {chosen!r} cannot open; pass the checkpoint "
            "from which it was exported."
        )
    if opener.accepts is not None and (path is None or not opener.accepts(path)):
        what = "the bundled codec" if source is None else source
        raise NemoLfrError(f"backend {chosen!r} needs {opener.model}, but the source is {what}; {opener.advice}.")
    options = OpenOptions("the bundled codec" if source is None else os.fspath(source), device, precision)
    if path is not None and opener.accepts is None and os.path.lexists(path):
        locate_checkpoint(path)  # reports a wrong path before `check` asks for PyTorch
    if opener.check is not None:
        opener.check(options)
    if path is None or opener.accepts is None:
        path = find_checkpoint(source)
        check_address_space()
    opened = opener.open(path, options)
    logger.info("opened %s on %s in %s", opened.name, opened.device, opened.spec.precision)
    return opened


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a folder with an exported encoder or decoder in ONNX format."""
    folder = os.path.expanduser(path)
    return any(os.path.isfile(os.path.join(folder, name)) for name in (ENCODER, DECODER))


def _check_torch(options: OpenOptions) -> None:
    with _gc_paused():
        try:
            import torch  # noqa: F401
        except Exception as error:  # importing a package may raise any exception
            raise missing_extra(
                error,
                "PyTorch",
                "checkpoints run in PyTorch, which is not installed: pip install torch. Without PyTorch, only folders "
                "written by `nemo-lfr export onnx` can be used.",
            ) from error
        from nemo_lfr.codec.torch_backend import PRECISIONS

    if not isinstance(options.precision, str) or options.precision not in PRECISIONS:
        raise NemoLfrError(f"precision {options.precision!r} is unknown; use one of {list(PRECISIONS)}.")
    choose_device(options.device)


def _open_torch(path: Path, options: OpenOptions) -> Backend["torch.Tensor"]:
    from nemo_lfr.codec.torch_backend import TorchBackend

    return TorchBackend.from_checkpoint(
        path, choose_device(options.device), precision=options.precision, name=options.name
    )


def _check_onnx(options: OpenOptions) -> None:
    if options.precision != "fp32":
        raise NemoLfrError(f'precision {options.precision!r} is not available for ONNX files; use "fp32".')


def _open_onnx(path: Path, options: OpenOptions) -> Backend[Any]:
    from nemo_lfr.codec.onnx.backend import OnnxBackend

    return OnnxBackend(path, None if options.device is None else str(options.device), options.name)


_OPENERS = {
    "torch": Opener(_open_torch, check=_check_torch),
    "onnx": Opener(
        _open_onnx,
        accepts=is_exported,
        check=_check_onnx,
        model=f"a folder with exported ONNX files ({ENCODER} or {DECODER})",
        advice="write one with nemo-lfr export onnx --out FOLDER",
    ),
}


@contextlib.contextmanager
def _gc_paused() -> Iterator[None]:
    """Pause garbage collection while PyTorch is imported; collection would take a seventh of the import time."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            # Move the new objects to the oldest generation, so that the next collection skips them.
            gc.freeze()
            gc.unfreeze()
        gc.enable()
