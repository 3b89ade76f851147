"""Spectral reconstruction losses."""

from collections.abc import Sequence

import torch
from librosa.filters import mel as mel_filters
from torch import nn


class SpectralLoss(nn.Module):
    """L1 distances between spectrograms at several resolutions, from one STFT of each signal per resolution.

    Args:
        sample_rate: Hz.
        resolutions: window lengths in samples; the hop is a quarter of each.
        mel_dims: mel bands at each resolution.
        floor: magnitude under which the `log_mel` term sees silence. log(x + 1), the measure that NeMo's codec
            trains on, is nearly linear at speech levels and hardly sees quiet phones; this term does.
    """

    def __init__(
        self, sample_rate: int, resolutions: Sequence[int], mel_dims: Sequence[int], floor: float = 1e-3
    ) -> None:
        super().__init__()
        self.resolutions = tuple(resolutions)
        self.floor = floor
        for window, num_mels in zip(resolutions, mel_dims, strict=True):
            mel = mel_filters(sr=sample_rate, n_fft=window, n_mels=num_mels, norm=None)
            self.register_buffer(f"mel_{window}", torch.from_numpy(mel), persistent=False)
            self.register_buffer(f"window_{window}", torch.hann_window(window, periodic=False), persistent=False)

    def _magnitude(self, audio: torch.Tensor, window: int) -> torch.Tensor:
        spectrum = torch.stft(
            audio, window, window // 4, window=self.get_buffer(f"window_{window}"), return_complex=True
        )
        # 1e-5 keeps the square root's gradient finite at silence, as in NeMo's STFTLoss.
        return torch.sqrt(torch.view_as_real(spectrum).square().sum(-1) + 1e-5)  # [B, bins, frames]

    def forward(self, audio_real: torch.Tensor, audio_gen: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean distances over the resolutions, for audio [B, T_audio].

        Returns:
            "stft" and "mel" on log(x + 1), "log_mel" on log(max(x, floor)); each a scalar.
        """
        totals = {name: audio_gen.new_zeros(()) for name in ("stft", "mel", "log_mel")}
        for window in self.resolutions:
            mel = self.get_buffer(f"mel_{window}")
            with torch.no_grad():
                real = self._magnitude(audio_real, window)
                mel_real = mel @ real
            gen = self._magnitude(audio_gen, window)
            mel_gen = mel @ gen
            totals["stft"] = totals["stft"] + (gen.log1p() - real.log1p()).abs().mean()
            totals["mel"] = totals["mel"] + (mel_gen.log1p() - mel_real.log1p()).abs().mean()
            totals["log_mel"] = (
                totals["log_mel"]
                + (mel_gen.clamp_min(self.floor).log() - mel_real.clamp_min(self.floor).log()).abs().mean()
            )
        return {name: total / len(self.resolutions) for name, total in totals.items()}
