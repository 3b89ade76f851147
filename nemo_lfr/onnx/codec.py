"""The exported codec behind the API of `Codec`, with numpy arrays and ONNX Runtime; torch is not imported."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_lfr.codec.base import BaseCodec
from nemo_lfr.errors import CheckpointError, MissingExtraError, NemoLfrError, clip
from nemo_lfr.frames import Context
from nemo_lfr.onnx import DECODER, ENCODER, METADATA, VERSION


@dataclass(frozen=True)
class Reach:
    """What of an encoder or decoder matters to cutting recordings into windows."""

    context: Context
    min_frames: int


class OnnxCodec(BaseCodec[np.ndarray]):
    """Takes and gives numpy arrays. Each file is opened when it is first needed; one without the other will do.

    Args:
        folder: with encoder.onnx or decoder.onnx, as `nemo-lfr export onnx` writes them.
        device: "cpu", "cuda", or None for a GPU if ONNX Runtime has one.
        name: for messages.

    Raises:
        CheckpointError: if the files are missing or not ours.
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
        self._metadata = self._read_metadata(there[0])

    def _read_metadata(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        found = self._session(name).get_modelmeta().custom_metadata_map.get(METADATA)
        try:
            values = json.loads(found or "")
            if values["version"] != VERSION:
                raise CheckpointError(f"{path}: version {values['version']}; this nemo_lfr reads {VERSION}.")
            self.sample_rate = int(values["sample_rate"])
            self.encoder, self.decoder = (
                Reach(Context(int(part["past"]), int(part["future"])), int(part["min_frames"]))
                for part in (values["encoder"], values["decoder"])
            )
            for key in ("samples_per_frame", "num_codebooks"):
                values[key] = int(values[key])
            values["levels"] = tuple(int(level) for level in values["levels"])
            self.fingerprint = str(values["fingerprint"])
        except CheckpointError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path}: not a file of nemo-lfr export onnx: its metadata is not ours.") from error
        return values

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
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; nemo-lfr export onnx writes it.")
        options = onnxruntime.SessionOptions()
        threads = os.environ.get("OMP_NUM_THREADS", "")
        options.intra_op_num_threads = int(threads) if threads.isdecimal() else 0
        options.enable_mem_pattern = False  # lengths change
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        if self._device == "cuda":
            providers.insert(0, "CUDAExecutionProvider")
        try:
            session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # onnxruntime's own classes, by version
            raise CheckpointError(f"{path}: ONNX Runtime cannot open it ({clip(error, 200)}).") from error
        if (first := getattr(self, "_metadata", None)) is not None:
            raw = session.get_modelmeta().custom_metadata_map.get(METADATA) or "{}"
            if f'"{first["fingerprint"]}"' not in raw:
                raise CheckpointError(f"{path}: of another codec than the other file in this folder; export again.")
        return session

    @property
    def samples_per_frame(self) -> int:
        return self._metadata["samples_per_frame"]

    @property
    def num_codebooks(self) -> int:
        return self._metadata["num_codebooks"]

    @property
    def levels(self) -> tuple[int, ...]:
        return self._metadata["levels"]

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
        return self._session(ENCODER).run(None, {"audio": audio})[0]

    def _decode_frames(self, tokens: np.ndarray, num_frames: list[int]) -> np.ndarray:
        inputs = {"tokens": tokens, "tokens_len": np.array(num_frames, np.int64)}
        return self._session(DECODER).run(None, inputs)[0]
