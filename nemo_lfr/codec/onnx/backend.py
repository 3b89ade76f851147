"""ONNX Runtime backend. It uses numpy arrays and does not need PyTorch."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from nemo_lfr.codec.backend import NumpyBackend, Operation
from nemo_lfr.codec.onnx import DECODER, ENCODER, MANIFEST, METADATA
from nemo_lfr.codec.onnx.manifest import AGAIN, read_manifest, read_verified
from nemo_lfr.errors import CheckpointError, NemoLfrError, install_command, shorten
from nemo_lfr.io.shortage import missing_extra


class OnnxBackend(NumpyBackend):
    """Backend that runs the files of `nemo-lfr export onnx` in ONNX Runtime.

    A folder without decoder.onnx can only encode, and a folder without encoder.onnx can only decode.

    Args:
        folder: folder with codec.json, and with encoder.onnx, decoder.onnx or both.
        device: "cpu" or "cuda"; None or "auto" for a GPU if ONNX Runtime supports one, else the CPU.
        name: name for messages; default: the folder.

    Raises:
        CheckpointError: if files are missing or damaged, or do not come from one export of this package.
        MissingExtraError: if ONNX Runtime is not installed.
        NemoLfrError: for a device that ONNX Runtime does not support.
    """

    def __init__(self, folder: str | os.PathLike[str], device: str | None = None, name: str | None = None) -> None:
        try:
            import onnxruntime
        except Exception as error:  # importing a package may raise any exception
            message = f"ONNX files need ONNX Runtime: {install_command('onnxruntime')}"
            raise missing_extra(error, "ONNX Runtime", message) from error
        self._folder = Path(folder).absolute()  # files are opened later, perhaps from another working directory
        self.name = os.fspath(folder) if name is None else name
        has_gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        if device not in (None, "auto", "cpu", "cuda") or (device == "cuda" and not has_gpu):
            raise NemoLfrError(
                f"device {device!r} cannot be used here; the installed ONNX Runtime supports 'cpu'"
                f"{' and ' + repr('cuda') if has_gpu else ' only'}."
            )
        self.device = "cuda" if has_gpu and device != "cpu" else "cpu"
        present = [file for file in (ENCODER, DECODER) if os.path.lexists(self._folder / file)]
        if not present:
            raise CheckpointError(
                f"{folder}: no {ENCODER} or {DECODER} in this folder; nemo-lfr export onnx writes them."
            )
        self._manifest = read_manifest(self._folder)
        self.spec = self._manifest.spec
        self.encoder, self.decoder = self._manifest.encoder, self._manifest.decoder
        self._sessions: dict[str, Any] = {}
        for file in present:
            read_verified(self._folder, file, self._manifest)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without ONNX Runtime sessions, which cannot be pickled; a copy opens new ones."""
        return vars(self) | {"_sessions": {}}

    def fingerprints(self) -> tuple[str, ...]:
        """Return the fingerprints of the exported checkpoint, the current one first; see `Backend.fingerprints`."""
        return self.spec.fingerprint, self._manifest.weights_fingerprint, *self._manifest.older_fingerprints

    def load(self, operation: Operation) -> None:
        """Open encoder.onnx ("encode") or decoder.onnx ("decode"), if it is not open yet."""
        self._session(ENCODER if operation == "encode" else DECODER)

    def encode_frames(self, audio: np.ndarray, num_frames: list[int]) -> np.ndarray:
        """See `Backend.encode_frames`."""
        width = audio.shape[1] // self.spec.samples_per_frame
        return self._run(ENCODER, {"audio": audio}, (len(audio), self.spec.num_codebooks, width))

    def decode_frames(self, tokens: np.ndarray, num_frames: list[int]) -> np.ndarray:
        """See `Backend.decode_frames`."""
        inputs = {"tokens": tokens, "tokens_len": np.array(num_frames, np.int64)}
        return self._run(DECODER, inputs, (len(tokens), tokens.shape[2] * self.spec.samples_per_frame))

    def _run(self, file: str, inputs: dict[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """Run one of the ONNX files and check that its output has the shape `shape`."""
        session = self._session(file)
        try:
            result = session.run(None, inputs)[0]
        except Exception as error:  # onnxruntime has its own classes, which differ between versions
            raise NemoLfrError(
                f"{self._folder / file}: ONNX Runtime cannot run this file ({shorten(error, 200)}); {AGAIN}."
            ) from error
        if not isinstance(result, np.ndarray) or result.shape != shape:
            array = isinstance(result, np.ndarray)
            what = f"has the shape {list(result.shape)}" if array else f"is of type {type(result).__name__}"
            raise CheckpointError(
                f"{self._folder / file}: the output {shorten(what)}, but according to {MANIFEST} it should have the "
                f"shape {list(shape)}; {AGAIN}."
            )
        return result

    def _session(self, file: str) -> Any:
        if file not in self._sessions:
            self._sessions[file] = self._open(file)
        return self._sessions[file]

    def _open(self, file: str) -> Any:
        import onnxruntime

        path = self._folder / file
        data = read_verified(self._folder, file, self._manifest)  # checked again: the file may have been replaced
        options = onnxruntime.SessionOptions()
        threads = os.environ.get("OMP_NUM_THREADS", "")
        options.intra_op_num_threads = min(int(threads[:9]), os.cpu_count() or 1) if threads.isdecimal() else 0
        options.enable_mem_pattern = False  # memory patterns only help if all inputs have the same length
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        if self.device == "cuda":
            providers.insert(0, "CUDAExecutionProvider")
        try:
            session = onnxruntime.InferenceSession(data, options, providers=providers)
        except Exception as error:  # onnxruntime has its own classes, which differ between versions
            raise CheckpointError(
                f"{path}: ONNX Runtime cannot open this file ({shorten(error, 200)}); {AGAIN}."
            ) from error
        raw = session.get_modelmeta().custom_metadata_map.get(METADATA)
        try:
            values = json.loads(raw or "")
        except (ValueError, RecursionError):
            values = None
        if values != self._manifest.values:
            raise CheckpointError(f"{path}: the metadata in this file differs from {MANIFEST}; {AGAIN}.")
        return session
