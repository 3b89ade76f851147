"""Stock NeMo (NeMo without this package), as a codec to compare with."""

import math
import time

import numpy as np

from nemo_lfr.errors import NEMO_PACKAGES, install_command
from nemo_lfr.evaluation.codecs import register_codec
from nemo_lfr.evaluation.codecs.base import ComparedCodec, RoundTrip, fit, resample_to
from nemo_lfr.io.locate import resolve
from nemo_lfr.io.shortage import missing_extra


@register_codec
class StockNeMo(ComparedCodec):
    """NeMo's own `AudioCodecModel`, without the modules of this package."""

    kind = "nemo"
    usage = "nemo:FILE"

    def __init__(self, options: str = "", device: str | None = None) -> None:
        import torch

        from nemo_lfr.checkpoint import read_checkpoint
        from nemo_lfr.codec.devices import choose_device
        from nemo_lfr.io.hub import find_checkpoint

        path = find_checkpoint(options or None)
        read_checkpoint(path)  # refuses damaged and unsupported files, and those from which PyTorch may run code
        try:
            from nemo.collections.tts.models import AudioCodecModel
        except Exception as error:  # a broken installation can raise anything
            raise missing_extra(
                error, "NeMo", f"--codec nemo needs NeMo: {install_command(*NEMO_PACKAGES)}"
            ) from error
        self.device = choose_device(device)
        with torch.no_grad():
            self.model = AudioCodecModel.restore_from(str(path), map_location=self.device).eval()
        self.name = f"stock NeMo ({path.name if options else 'bundled'})"
        self.identity = f"{resolve(path)} {path.stat().st_size} {path.stat().st_mtime_ns}"
        self.levels = tuple(int(level) for level in self.model.vector_quantizer.fsqs[0].num_levels.flatten())

    def round_trip(self, audio: np.ndarray, rate: int) -> RoundTrip:
        """Encode and decode audio [T] with NeMo."""
        import torch

        at_rate = resample_to(audio, rate, self.model.sample_rate)
        started = time.perf_counter()
        with torch.no_grad():
            batch = torch.from_numpy(at_rate)[None].to(self.device)
            length = torch.tensor([len(at_rate)], device=self.device)
            tokens, tokens_len = self.model.encode(audio=batch, audio_len=length)
            token_ids = tokens[0].cpu().numpy()
            encoded = time.perf_counter()
            output, _ = self.model.decode(tokens=tokens, tokens_len=tokens_len)
            output = output[0].cpu().numpy()
        decoded = time.perf_counter()
        size = math.ceil(math.log2(math.prod(self.levels)) * token_ids.size / 8)
        output = fit(resample_to(output, self.model.sample_rate, rate), len(audio))
        return RoundTrip(output, size, 2 * token_ids.size, encoded - started, decoded - encoded, token_ids)
