"""Codecs that this package can load, such as the bundled codec."""

import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemo_lfr.evaluation.codecs import register_codec
from nemo_lfr.evaluation.codecs.base import ComparedCodec, RoundTrip, fit, resample_to

if TYPE_CHECKING:
    from nemo_lfr.io.entropy.model import EntropyModel


@register_codec
class LFR(ComparedCodec):
    """Codec that this package loads: the bundled codec, a checkpoint or a model from the Hub."""

    kind = "lfr"
    usage = "lfr (the bundled codec), lfr:FILE_OR_HUB_ID"

    def __init__(self, options: str = "", device: str | None = None) -> None:
        from nemo_lfr.pretrained import load

        self.codec = load(options or None, device)
        for operation in ("encode", "decode"):  # refuses a folder of ONNX files that lacks one of the networks
            self.codec.backend.load(operation)
        self.name = f"nemo_lfr ({Path(options).name if options else 'bundled'})"
        self.identity, self.levels = self.codec.fingerprint, self.codec.levels

    def round_trip(self, audio: np.ndarray, rate: int) -> RoundTrip:
        """Encode and decode audio [T] with the standalone API."""
        from nemo_lfr.codec.arrays import to_numpy
        from nemo_lfr.io.entropy.find import model_if_any

        at_rate = resample_to(audio, rate, self.codec.sample_rate)
        started = time.perf_counter()
        tokens = to_numpy(self.codec.encode(at_rate, sample_rate=self.codec.sample_rate)[0][0])
        encoded = time.perf_counter()
        output = to_numpy(self.codec.decode(tokens)[0][0])
        decoded = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            size = self._write(Path(folder, "tokens.lfr"), tokens, len(at_rate))[1]
            model = model_if_any(self.codec)
            compressed: tuple[int | None, int | None] = (None, None)
            if model is not None:
                compressed = self._write(Path(folder, "compressed.lfr"), tokens, len(at_rate), model)
        bits = self.codec.num_codebooks * math.log2(self.codec.codebook_size) * tokens.shape[1]
        output = fit(resample_to(output, self.codec.sample_rate, rate), len(audio))
        return RoundTrip(output, bits / 8, size, encoded - started, decoded - encoded, tokens, *compressed)

    def _write(
        self, path: Path, tokens: np.ndarray, num_samples: int, model: "EntropyModel | None" = None
    ) -> tuple[int, int]:
        """Write a token file, and return the sizes of its payload and of the file in bytes."""
        from nemo_lfr.io.token_file import TokenReader, TokenWriter

        with TokenWriter.for_codec(path, self.codec, model=model) as writer:
            writer.write(tokens)
            writer.finish(num_samples)
        with TokenReader(path) as reader:
            return reader.payload_bytes, path.stat().st_size
