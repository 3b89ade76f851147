"""Export a codec to encoder.onnx and decoder.onnx, for any batch size and length."""

import contextlib
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from nemo_lfr._version import __version__
from nemo_lfr.codec.ambient import building_state
from nemo_lfr.codec.base import CodecBase
from nemo_lfr.codec.onnx import DECODER, ENCODER, MANIFEST, METADATA, VERSION
from nemo_lfr.codec.onnx.graph import check_graph
from nemo_lfr.codec.programs import fp32_backend, graphs
from nemo_lfr.codec.torch_backend import TorchBackend
from nemo_lfr.errors import CheckpointError, NemoLfrError, install_command
from nemo_lfr.io.atomic import check_overwrite, make_folder, naming, publish, sync, writing_folder
from nemo_lfr.io.locate import expand_home
from nemo_lfr.io.shortage import missing_extra

OPSET = 20


def export_onnx(codec: CodecBase[Any], folder: str | os.PathLike[str], *, overwrite: bool = False) -> list[Path]:
    """Export a codec to encoder.onnx, decoder.onnx and codec.json in `folder`.

    encoder.onnx maps audio [B, T * samples_per_frame] to int32 tokens [B, C, T]. decoder.onnx maps int64 tokens [B, C,
    T] and tokens_len [B] to audio. Input shorter than `min_frames` must be zero-padded, and all clips in a batch must
    have the same length. A codec from `nemo_lfr.load(folder)` accepts clips of any lengths. The tokens are described
    in codec.json (`nemo_lfr.codec.onnx.manifest`), and in the metadata of both ONNX files under the key "nemo_lfr".

    Args:
        codec: codec with the PyTorch backend in fp32, on any device.
        folder: folder to write to; created if it does not exist.
        overwrite: replace existing files.

    Returns:
        Paths of the three files.

    Raises:
        MissingExtraError: if onnx or onnxscript is not installed.
        NemoLfrError: if a file exists and `overwrite` is not set; if the codec does not run in PyTorch in fp32, or has
            hooks or replaced layers; or if the installed exporter writes a file that `OnnxBackend` refuses.
    """
    for package in ("onnx", "onnxscript"):  # torch's exporter uses onnxscript
        try:
            import_module(package)
        except Exception as error:  # importing a package may raise any exception
            message = f"exporting to ONNX needs onnx and onnxscript: {install_command('onnx', 'onnxscript')}"
            raise missing_extra(error, package, message) from error
    backend = fp32_backend(codec, "ONNX files")
    folder = expand_home(folder)
    targets = [Path(folder, name) for name in (ENCODER, DECODER, MANIFEST)]
    for target in targets:
        check_overwrite(target, overwrite)
    make_folder(folder)
    with building_state(torch.device("cpu")), backend.computing():
        _write(backend, targets, overwrite)
    return targets


def _write(backend: TorchBackend, targets: list[Path], overwrite: bool) -> None:
    import onnx

    folder, values = targets[0].parent, metadata(backend)
    files = {}
    with writing_folder(folder) as aside:
        for target, graph in zip(targets[:2], graphs(backend), strict=True):
            with torch.no_grad(), warnings.catch_warnings(), _QuietExporter(), _interruptible():
                warnings.simplefilter("ignore")
                program = torch.onnx.export(
                    graph.module,
                    graph.example,
                    dynamo=True,
                    dynamic_shapes=graph.dynamic_shapes,
                    input_names=graph.inputs,
                    output_names=[graph.output],
                    opset_version=OPSET,
                    external_data=False,
                    verbose=False,
                )
            assert program is not None
            model = program.model_proto
            model.metadata_props.add(key=METADATA, value=json.dumps(values))
            data = model.SerializeToString()
            _check_readable(data, target)
            files[target.name] = _write_aside(Path(aside, target.name), data, target)
            onnx.checker.check_model(str(Path(aside, target.name)), full_check=True)
        _write_aside(Path(aside, MANIFEST), json.dumps(values | {"files": files}, indent=1).encode(), targets[2])
        for target in targets:
            with naming(target, aside):
                publish(Path(aside, target.name), target, overwrite)


def _check_readable(data: bytes, target: Path) -> None:
    """Raise an error if torch's exporter, perhaps of a newer version, made a file that `OnnxBackend` would refuse."""
    try:
        check_graph(data)
    except CheckpointError as error:
        raise NemoLfrError(
            f"{target}: the exporter of torch {torch.__version__} made a file that {error}; use another version of "
            "torch or onnxscript, and report this error."
        ) from None


def _write_aside(path: Path, data: bytes, target: Path) -> str:
    """Write data to the temporary file `path`, and return its SHA-256 in hex. Errors name `target` instead."""
    with naming(target, path), open(path, "wb") as file:
        file.write(data)
        file.flush()
        sync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def metadata(backend: TorchBackend) -> dict[str, Any]:
    """Return the description of the codec that is stored in codec.json and in both ONNX files."""
    fingerprint, weights_fingerprint, *older_fingerprints = backend.fingerprints()
    spec = asdict(replace(backend.spec, fingerprint=fingerprint))
    del spec["precision"]  # left out, because ONNX files always run in fp32
    return {
        "version": VERSION,
        **spec,
        "levels": list(backend.spec.levels),
        "weights_fingerprint": weights_fingerprint,
        "older_fingerprints": older_fingerprints,
        "written_by": f"nemo_lfr {__version__}",
    } | {
        name: {**asdict(module.context), "min_frames": module.min_frames}
        for name, module in (("encoder", backend.encoder), ("decoder", backend.decoder))
    }


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Re-raise KeyboardInterrupt and SystemExit, which torch's exporter wraps in its own error."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, KeyboardInterrupt | SystemExit):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise


class _QuietExporter:
    """Context manager that silences the log of torch's exporter."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("torch.onnx")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)
