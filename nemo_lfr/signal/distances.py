"""Distances between signals, which are used as reconstruction losses and as evaluation metrics.

The results agree with NeMo's `MultiResolutionMelLoss`, `MultiResolutionSTFTLoss`, `TimeDomainLoss` and `SISDRLoss` to
within 1e-5. For each signal and resolution, only one STFT is computed. Means exclude the padding of shorter examples.
"""

from collections.abc import Collection, Sequence

import torch
from torch import nn

from nemo_lfr.signal.spectra import Spectra


class ReconstructionLoss(nn.Module):
    """Losses between recordings and their reconstructions.

    Args:
        sample_rate: sample rate in Hz.
        resolutions: (n_fft, hop, window) of each resolution, in samples.
        mel_dims: number of mel bands at each resolution.
        mel_guard: constant that is added to mel magnitudes before the logarithm. With the value 1.0, as in NeMo, the
            loss depends on the volume of the recording, and quiet speech sounds have almost no influence.
        stft_guard: constant that is added to STFT magnitudes before the logarithm; see `mel_guard`.
        floor: lower bound for mel magnitudes in the term "log_mel", which does not exist in NeMo.
    """

    TERMS = ("mel_l1", "mel_l2", "stft", "log_mel", "time_domain", "si_sdr")

    def __init__(
        self,
        sample_rate: int,
        resolutions: Sequence[Sequence[int]],
        mel_dims: Sequence[int],
        mel_guard: float = 1.0,
        stft_guard: float = 1.0,
        floor: float = 1e-3,
    ) -> None:
        from librosa.filters import mel as mel_filters  # slow to import, and not needed by `si_sdr`

        super().__init__()
        self.resolutions = [tuple(resolution) for resolution in resolutions]
        self.mel_guard, self.stft_guard, self.floor = mel_guard, stft_guard, floor
        for index, ((n_fft, _, _), num_mels) in enumerate(zip(self.resolutions, mel_dims, strict=True)):
            filters = torch.from_numpy(mel_filters(sr=sample_rate, n_fft=n_fft, n_mels=num_mels, norm=None))
            self.register_buffer(f"mel_{index}", filters, persistent=False)

    @property
    def min_samples(self) -> int:
        """Minimum length of the signals in samples. Shorter signals cannot be padded for the longest STFT."""
        return max(n_fft // 2 + 1 for n_fft, _, _ in self.resolutions)

    def forward(
        self,
        real: Spectra,
        gen: Spectra,
        audio_len: torch.Tensor | None = None,
        terms: Collection[str] = ("mel_l1", "stft"),
    ) -> dict[str, torch.Tensor]:
        """Compute reconstruction losses.

        Args:
            real: recordings [B, T_audio] with cached STFTs.
            gen: reconstructions [B, T_audio] with cached STFTs.
            audio_len: number of valid samples of each example, shape [B]; None if all samples are valid.
            terms: names of the losses to compute, from `TERMS`.

        Returns:
            Dictionary from loss names to scalars. Lower is better, so "si_sdr" is the negated ratio in dB.
        """
        totals: dict[str, torch.Tensor] = {}
        for index, resolution in enumerate(self.resolutions):
            for name, value in self._spectral(real, gen, audio_len, index, resolution, terms).items():
                totals[name] = totals.get(name, 0) + value / len(self.resolutions)
        if "time_domain" in terms:
            totals["time_domain"] = _mean((gen.audio - real.audio).abs().unsqueeze(1), audio_len)
        if "si_sdr" in terms:
            totals["si_sdr"] = -si_sdr(real.audio, gen.audio, audio_len)
        return {name: totals[name] for name in terms}

    def _spectral(
        self,
        real: Spectra,
        gen: Spectra,
        audio_len: torch.Tensor | None,
        index: int,
        resolution: tuple[int, ...],
        terms: Collection[str],
    ) -> dict[str, torch.Tensor]:
        hop = resolution[1]
        values = {}
        if {"mel_l1", "mel_l2", "log_mel"} & set(terms):
            filters = self.get_buffer(f"mel_{index}")
            with torch.no_grad():
                mel_real = real.mel(resolution, filters)
            mel_gen = gen.mel(resolution, filters)
            frames = _frames(audio_len, mel_gen, hop, 0)  # NeMo's mel loss drops the last frame
            if {"mel_l1", "mel_l2"} & set(terms):
                difference = (mel_gen + self.mel_guard).log() - (mel_real + self.mel_guard).log()
                values["mel_l1"] = _mean(difference.abs(), frames)
                if "mel_l2" in terms:
                    values["mel_l2"] = _mean(difference.square(), frames)
            if "log_mel" in terms:
                difference = mel_gen.clamp_min(self.floor).log() - mel_real.clamp_min(self.floor).log()
                values["log_mel"] = _mean(difference.abs(), frames)
        if "stft" in terms:
            with torch.no_grad():
                log_real = (real.magnitude(resolution) + self.stft_guard).log()
            log_gen = (gen.magnitude(resolution) + self.stft_guard).log()
            values["stft"] = _mean((log_gen - log_real).abs(), _frames(audio_len, log_gen, hop, 1))
        return values


def _frames(audio_len: torch.Tensor | None, spectrum: torch.Tensor, hop: int, extra: int) -> torch.Tensor:
    """Return the number of valid frames of each example, shape [B]: samples // hop + extra.

    If `audio_len` is None, all frames of `spectrum` are valid, except the last one if `extra` is 0.
    """
    if audio_len is None:
        return torch.full((spectrum.shape[0],), spectrum.shape[-1] - 1 + extra, device=spectrum.device)
    return audio_len // hop + extra


def _mean(values: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Average values [B, D, T] over D, then over the valid frames of each example, then over B."""
    if lengths is None:
        return values.mean(dim=1).mean(dim=1).mean()
    valid = torch.arange(values.shape[-1], device=values.device) < lengths[:, None]
    return ((values.mean(dim=1) * valid).sum(dim=1) / lengths.clamp_min(1)).mean()


def si_sdr(real: torch.Tensor, gen: torch.Tensor, audio_len: torch.Tensor | None = None) -> torch.Tensor:
    """Compute the mean scale-invariant signal-to-distortion ratio of a batch.

    NeMo's `SISDRLoss` is the negative of this ratio, if the padding is zero.

    Args:
        real: recordings, shape [B, T_audio].
        gen: reconstructions, shape [B, T_audio].
        audio_len: number of valid samples of each example, shape [B]; None if all samples are valid.

    Returns:
        Mean ratio in dB, a scalar. Higher is better.
    """
    real, gen, eps = real.float(), gen.float(), 1e-8
    if audio_len is None:
        audio_len = torch.full((real.shape[0],), real.shape[-1], device=real.device)
    valid = torch.arange(real.shape[-1], device=real.device) < audio_len[:, None]
    target, estimate = (
        (signal - (signal * valid).sum(-1, keepdim=True) / audio_len[:, None]) * valid for signal in (real, gen)
    )
    scale = ((estimate * target).sum(-1, keepdim=True) + eps) / (target.square().sum(-1, keepdim=True) + eps)
    target = scale * target
    ratio = (target.square().sum(-1) + eps) / ((target - estimate).square().sum(-1) + eps)
    return 10 * ratio.log10().mean()
