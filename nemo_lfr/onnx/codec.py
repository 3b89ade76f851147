"""The exported codec behind the API of `Codec`, with numpy arrays and ONNX Runtime; torch is not imported."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_lfr.codec.base import BaseCodec
from nemo_lfr.errors import CheckpointError, MissingExtraError, NemoLfrError, clip
from nemo_lfr.onnx import DECODER, ENCODER, MANIFEST, METADATA
from nemo_lfr.onnx.manifest import read_manifest, read_verified


class OnnxCodec(BaseCodec[np.ndarray]):
    """Takes and gives numpy arrays. Each file is opened when it is first needed; one without the other will do.

    Args:
        folder: with codec.json and encoder.onnx or decoder.onnx, as `nemo-lfr export onnx` writes them. The hashes of
            both files are compared with those in codec.json.
        device: "cpu", "cuda", or None for a GPU if ONNX Runtime has one.
        name: for messages.

    Raises:
        CheckpointError: if the files are missing, damaged, from several exports or not ours.
        MissingExtraError: if ONNX Runtime is not installed.
        NemoLfrError: for a device that ONNX Runtime does not have.
    """

    precision = "fp32"

    def __init__(self, folder: str | os.PathLike[str], device: str | None = None, name: str | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("ONNX files need ONNX Runtime: pip install 'nemo-lfr[onnx]'") from error
        self._folder = Path(folder)
        self.name = os.fspath(folder) if name is None else name
        has_gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        if device not in (None, "auto", "cpu", "cuda") or (device == "cuda" and not has_gpu):
            raise NemoLfrError(
                f"device {device!r} cannot be used here: this ONNX Runtime has cpu{', cuda' * has_gpu}."
            )
        self._device = "cuda" if has_gpu and device != "cpu" else "cpu"
        there = [name for name in (ENCODER, DECODER) if (self._folder / name).is_file()]
        if not there:
            raise CheckpointError(
                f"{folder}: no {ENCODER} or {DECODER} in this folder; nemo-lfr export onnx writes them."
            )
        self._manifest = read_manifest(self._folder)
        self.sample_rate = self._manifest.sample_rate
        self.fingerprint = self._manifest.fingerprint
        self.weights_fingerprint = self._manifest.weights_fingerprint
        self.encoder, self.decoder = self._manifest.encoder, self._manifest.decoder
        for name in there:
            read_verified(self._folder, name, self._manifest)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, in this process or another, opens the files anew."""
        return self.__dict__ | {"_sessions": {}}

    def _session(self, name: str) -> Any:
        sessions: dict[str, Any] = self.__dict__.setdefault("_sessions", {})
        if name not in sessions:
            sessions[name] = self._open(name)
        return sessions[name]

    def _open(self, name: str) -> Any:
        import onnxruntime

        path = self._folder / name
        data = read_verified(self._folder, name, self._manifest)  # again: it may have been replaced meanwhile
        options = onnxruntime.SessionOptions()
        threads = os.environ.get("OMP_NUM_THREADS", "")
        options.intra_op_num_threads = int(threads) if threads.isdecimal() else 0
        options.enable_mem_pattern = False  # lengths change
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        if self._device == "cuda":
            providers.insert(0, "CUDAExecutionProvider")
        try:
            session = onnxruntime.InferenceSession(data, options, providers=providers)
        except Exception as error:  # onnxruntime's own classes, by version
            raise CheckpointError(f"{path}: ONNX Runtime cannot open it ({clip(error, 200)}).") from error
        raw = session.get_modelmeta().custom_metadata_map.get(METADATA)
        try:
            values = json.loads(raw or "")
        except (ValueError, RecursionError):
            values = None
        if values != self._manifest.values:
            raise CheckpointError(f"{path}: its metadata is not that of {MANIFEST}; export it again.")
        return session

    @property
    def samples_per_frame(self) -> int:
        return self._manifest.samples_per_frame

    @property
    def num_codebooks(self) -> int:
        return self._manifest.num_codebooks

    @property
    def levels(self) -> tuple[int, ...]:
        return self._manifest.levels

    @property
    def device(self) -> str:
        return self._device

    # What the base asks for.

    def _array(self, value: Any, name: str, error: type[NemoLfrError]) -> np.ndarray:
        try:
            return np.asarray(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as reason:
            what = " ".join(str(reason).split())
            raise error(f"{name} is {type(value).__name__}; pass a numpy array ({clip(what)}).") from None

    def _zeros(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        return np.zeros(shape, dtype)

    def _cast(self, array: np.ndarray, dtype: str) -> np.ndarray:
        return array.astype(dtype, copy=False)

    def _encode_frames(self, audio: np.ndarray, num_frames: list[int]) -> np.ndarray:
        width = audio.shape[1] // self.samples_per_frame
        return self._run(ENCODER, {"audio": audio}, (len(audio), self.num_codebooks, width))

    def _decode_frames(self, tokens: np.ndarray, num_frames: list[int]) -> np.ndarray:
        inputs = {"tokens": tokens, "tokens_len": np.array(num_frames, np.int64)}
        return self._run(DECODER, inputs, (len(tokens), tokens.shape[2] * self.samples_per_frame))

    def _run(self, name: str, inputs: dict[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """The only output of a file, which must have this shape."""
        session = self._session(name)
        try:
            result = session.run(None, inputs)[0]
        except Exception as error:  # onnxruntime's own classes, by version
            raise NemoLfrError(f"{self._folder / name}: ONNX Runtime cannot run it ({clip(error, 200)}).") from error
        if not isinstance(result, np.ndarray) or result.shape != shape:
            what = list(result.shape) if isinstance(result, np.ndarray) else type(result).__name__
            raise CheckpointError(
                f"{self._folder / name}: gives {clip(what)} instead of {list(shape)}; it is not what {MANIFEST} says."
            )
        return result
