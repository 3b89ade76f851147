"""Distances between recordings and reconstructions, which training minimizes.

A distance compares two batches, in most cases as `Spectra` (audio [B, T_audio] with cached STFTs), and returns a
scalar. The gradient flows to the second batch. Unless stated otherwise, the hop of an STFT is a quarter of its window.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nemo_lfr.signal.spectra import Spectra
from nemo_lfr.training.components import AudioTerms, split_scales
from recipes.bundled_codec.model import SAMPLE_RATE


def resolution(window: int, hops_per_window: int = 4) -> tuple[int, int, int]:
    """Return (n_fft, hop, window) in samples, for an STFT with n_fft = window."""
    return window, window // hops_per_window, window


class LogMelDistance(nn.Module):
    """Mean absolute difference of log-mel magnitudes at several window lengths.

    Args:
        windows: window lengths in samples.
        num_mels: number of mel bands for each window.
        floor: lower bound for magnitudes at a window of 1024 samples. The bound for other windows is proportional to
            the square root of the window length, like the magnitudes of noise.
    """

    def __init__(self, windows: Sequence[int], num_mels: Sequence[int], floor: float = 1e-2) -> None:
        from librosa.filters import mel  # slow to import

        super().__init__()
        self.windows = list(windows)
        self.floors = [floor * math.sqrt(window / 1024) for window in windows]
        for window, bands in zip(windows, num_mels, strict=True):
            filters = torch.from_numpy(mel(sr=SAMPLE_RATE, n_fft=window, n_mels=bands, norm=None))
            self.register_buffer(f"mel_{window}", filters, persistent=False)

    def forward(self, real: Spectra, gen: Spectra) -> torch.Tensor:
        """Return the distance as a scalar."""
        total = torch.zeros((), device=gen.audio.device)
        for window, floor in zip(self.windows, self.floors, strict=True):
            filters = self.get_buffer(f"mel_{window}")
            with torch.no_grad():
                log_real = (filters @ real.magnitude(resolution(window))).clamp_min(floor).log()
            log_gen = (filters @ gen.magnitude(resolution(window))).clamp_min(floor).log()
            total = total + (log_gen - log_real).abs().mean() / len(self.windows)
        return total


def compressed_distance(real: Spectra, gen: Spectra, windows: Sequence[int], power: float = 0.3) -> torch.Tensor:
    """Return the relative squared error of compressed STFT magnitudes |X|^power.

    With a window of 1024 samples or more, this distance resolves the harmonics of a voice, even above 1 kHz.

    Args:
        real: recordings [B, T_audio] with cached STFTs.
        gen: reconstructions [B, T_audio] with cached STFTs.
        windows: window lengths in samples.
        power: exponent of the compression.

    Returns:
        A scalar.
    """
    total = torch.zeros((), device=gen.audio.device)
    for window in windows:
        scale = math.sqrt(window)
        with torch.no_grad():
            compressed_real = (real.magnitude(resolution(window)) / scale) ** power
        compressed_gen = (gen.magnitude(resolution(window)) / scale) ** power
        error = (compressed_gen - compressed_real).square().mean((1, 2))
        total = total + (error / compressed_real.square().mean((1, 2))).mean() / len(windows)
    return total


LOW_BANDS = ((0.0, 600.0, 1.0), (600.0, 1200.0, 0.5), (1200.0, 2400.0, 0.25))  # low and high edge in Hz, weight
WAVEFORM_FRAME, WAVEFORM_HOP = 441, 220  # samples: frames of 20 ms with 50 % overlap


def waveform_distance(real: torch.Tensor, gen: torch.Tensor) -> torch.Tensor:
    """Return the waveform error in low-frequency bands. Minimizing this error preserves the phase.

    The error in each band and 20 ms frame is log(1 + error energy / signal energy). The logarithm limits the error and
    its gradient in bands whose phase is lost. A thousandth of the band's mean energy in the segment is added to the
    signal energy of each frame, so that pauses have little influence.

    Args:
        real: recordings, shape [B, T_audio].
        gen: reconstructions, shape [B, T_audio].

    Returns:
        A scalar: the sum of the mean errors of the bands, with the weights in `LOW_BANDS`.
    """
    samples = real.shape[-1]
    frequencies = torch.fft.rfftfreq(2 * samples, 1 / SAMPLE_RATE, device=real.device)
    # Pad with zeros to twice the length, because the band filters would otherwise wrap around the ends of the segment.
    error_spectrum = torch.fft.rfft(F.pad(gen - real, (0, samples)))
    real_spectrum = torch.fft.rfft(F.pad(real, (0, samples)))
    total = torch.zeros((), device=real.device)
    for low, high, weight in LOW_BANDS:
        band = ((frequencies >= low) & (frequencies < high)).float()
        error = _frame_energies(torch.fft.irfft(error_spectrum * band)[..., :samples])
        energy = _frame_energies(torch.fft.irfft(real_spectrum * band)[..., :samples])
        floor = 1e-3 * energy.mean(-1, keepdim=True) + 1e-8
        total = total + weight * torch.log1p(error / (energy + floor)).mean()
    return total


def _frame_energies(audio: torch.Tensor) -> torch.Tensor:
    """Return the mean square of each frame, [B, frames], for audio [B, T_audio]."""
    return F.avg_pool1d(audio.square().unsqueeze(1), WAVEFORM_FRAME, WAVEFORM_HOP).squeeze(1)


PITCH_WINDOW, PITCH_HOP = 704, 352  # samples: 32 ms, and 16 ms
PITCH_LAGS = (44, 368)  # samples: from 500 Hz down to 60 Hz


def periodicity_distance(real: torch.Tensor, gen: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean of the absolute differences between the periodicities of two signals.

    The periodicity of a frame at a lag is YIN's cumulative mean normalized difference (de Cheveigne and Kawahara,
    2002, equation 8). It is near 0 at lags at which the frame repeats itself, and near 1 at most other lags. A lag has
    a large weight if at least one of the two signals repeats itself at this lag. Frames in which the energy of `real`
    is 30 dB or more below its mean are ignored.

    Args:
        real: recordings, shape [B, T_audio].
        gen: reconstructions, shape [B, T_audio].

    Returns:
        A scalar. Audio that is shorter than a frame of 49 ms has the distance 0.
    """
    if real.shape[-1] < PITCH_WINDOW + PITCH_LAGS[1]:
        return torch.zeros((), device=gen.device)
    with torch.no_grad():
        difference_real, energy = normalized_difference(real)
        active = (energy > 1e-3 * energy.mean(-1, keepdim=True)).float()[..., None]
    difference_gen, _ = normalized_difference(gen)
    weight = active * (F.relu(1 - difference_real) + F.relu(1 - difference_gen.detach()))
    return ((difference_gen - difference_real).abs() * weight).sum() / (weight.sum() + 1e-8)


def normalized_difference(audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute YIN's cumulative mean normalized difference.

    Args:
        audio: samples, shape [B, T_audio].

    Returns:
        The difference at each lag in the range `PITCH_LAGS`, [B, frames, lags], and the energy of each frame's first
        `PITCH_WINDOW` samples, [B, frames].
    """
    low, high = PITCH_LAGS
    frames = audio.unfold(-1, PITCH_WINDOW + high, PITCH_HOP)
    window = frames[..., :PITCH_WINDOW]
    length = frames.shape[-1]
    spectrum = torch.fft.rfft(window, length).conj() * torch.fft.rfft(frames)
    correlation = torch.fft.irfft(spectrum, length)[..., 1 : high + 1]
    sums = F.pad(frames.square().cumsum(-1), (1, 0))
    energies = sums[..., PITCH_WINDOW:] - sums[..., : high + 1]  # of the window moved by each lag from 0 to `high`
    floor = 1e-6 * PITCH_WINDOW
    difference = (energies[..., :1] + energies[..., 1:] - 2 * correlation).clamp_min(0) + floor
    lags = torch.arange(1, high + 1, device=audio.device)
    normalized = difference * lags / difference.cumsum(-1)
    return normalized[..., low - 1 :], energies[..., 0]


class PerceptualDistance(nn.Module):
    """Differentiable distance similar to ITU-T P.862 (PESQ).

    The powers in Bark bands are converted to loudness by Zwicker's law above the threshold of hearing. The disturbance
    is the difference in loudness minus a dead zone, within which differences are ignored. The asymmetric disturbance
    contains only differences where the reconstruction has additional energy. Alignment and level equalization of P.862
    are omitted.

    Args:
        window: window length in samples; by default 32 ms, as in P.862. The hop is half of the window.
        bands: number of bands from 100 Hz to `top_hz`, with equal width on the Bark scale.
        top_hz: upper end of the bands in Hz; the default is that of P.862.2.
    """

    LEVEL_DB = 65.0  # assumed playback level of active speech
    EXPONENT = 0.23  # exponent of loudness as a function of power
    DEAD_ZONE = 0.25  # width of the dead zone as a fraction of the smaller loudness
    # Range of the weights of the asymmetric disturbance. Smaller weights become 0, and larger ones the upper limit.
    ADDED_RATIO = (3.0, 12.0)

    def __init__(self, window: int = 704, bands: int = 42, top_hz: float = 8000.0) -> None:
        super().__init__()
        self.resolution = resolution(window, hops_per_window=2)
        hertz = np.linspace(0, SAMPLE_RATE / 2, window // 2 + 1)
        edges = np.linspace(_bark(np.array(100.0)), _bark(np.array(top_hz)), bands + 1)
        centers, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
        filters = np.clip(1 - np.abs(_bark(hertz) - centers[:, None]) / width, 0, 1) * (hertz >= 50)
        self.register_buffer("filters", torch.from_numpy(filters.astype(np.float32)), persistent=False)
        kilohertz = 600 * np.sinh(centers / 6) / 1000
        # Terhardt's threshold of hearing in quiet, in dB SPL.
        quiet_db = 3.64 * kilohertz**-0.8 - 6.5 * np.exp(-0.6 * (kilohertz - 3.3) ** 2) + 1e-3 * kilohertz**4
        quiet = torch.from_numpy(10 ** (np.clip(quiet_db, 0, 40) / 10)).float()[None, :, None]
        self.register_buffer("quiet", quiet, persistent=False)

    def forward(self, real: Spectra, gen: Spectra) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the disturbance and the asymmetric disturbance of a batch; see the class.

        Args:
            real: recordings [B, T_audio] with cached STFTs.
            gen: reconstructions [B, T_audio] with cached STFTs.

        Returns:
            Two scalars. Each is the RMS over the frames of an example, averaged over the examples.
        """
        with torch.no_grad():
            powers_real = self._powers(real)
            gain = self._playback_gain(powers_real)
            powers_real = powers_real * gain
            loudness_real = self._loudness(powers_real)
        powers_gen = self._powers(gen) * gain
        loudness_gen = self._loudness(powers_gen)
        difference = loudness_gen - loudness_real
        masked = F.relu(difference.abs() - self.DEAD_ZONE * torch.minimum(loudness_gen, loudness_real))
        disturbance = torch.sign(difference) * masked
        ratio = ((powers_gen + 3e3) / (powers_real + 3e3)) ** 1.2
        low, high = self.ADDED_RATIO
        ratio = torch.where(ratio < low, torch.zeros_like(ratio), ratio.clamp_max(high))
        symmetric = (disturbance.square().mean(1) + 1e-4).sqrt()  # [B, frames]
        asymmetric = (disturbance.abs() * ratio).mean(1)
        # Loud frames get a slightly smaller weight.
        emphasis = ((powers_real.sum(1) + 1e5) / 10 ** (self.LEVEL_DB / 10)) ** 0.04
        return _bad_frames_mean(symmetric / emphasis), _bad_frames_mean(asymmetric / emphasis)

    def _powers(self, spectra: Spectra) -> torch.Tensor:
        """Return the powers in Bark bands, [B, bands, frames]."""
        return self.get_buffer("filters") @ torch.view_as_real(spectra.stft(self.resolution)).square().sum(-1)

    def _playback_gain(self, powers: torch.Tensor) -> torch.Tensor:
        """Return the power gain [B, 1, 1] with which active speech has the level `LEVEL_DB`."""
        total = powers.sum(1)
        active = (total > 1e-3 * total.amax(-1, keepdim=True)).float()
        level = (total * active).sum(-1) / active.sum(-1).clamp_min(1)
        return (10 ** (self.LEVEL_DB / 10) / level.clamp_min(1e-6))[:, None, None]

    def _loudness(self, powers: torch.Tensor) -> torch.Tensor:
        quiet = self.get_buffer("quiet")
        return (quiet / 0.5) ** self.EXPONENT * ((0.5 + 0.5 * powers / quiet) ** self.EXPONENT - 1)


def _bark(hertz: np.ndarray) -> np.ndarray:
    return 6 * np.arcsinh(hertz / 600)


def _bad_frames_mean(disturbance: torch.Tensor) -> torch.Tensor:
    """Return the RMS of each example's frames [B, frames], averaged over the batch.

    Compared with a mean, the RMS gives more weight to frames with a large disturbance.
    """
    return (disturbance.square().mean(-1) + 1e-6).sqrt().mean()


class IntelligibilityDistance(nn.Module):
    """One minus a differentiable ESTOI (Jensen and Taal, 2016).

    ESTOI is the correlation of two spectrograms in third-octave bands, over segments of 0.38 s that are normalized in
    time and in frequency. Unlike the published method, this class does not resample to 10 kHz before the STFT. Instead
    of removing pauses, it ignores segments that are 30 dB or more below the loudest one. The hop of the STFT is half
    of its window.
    """

    BANDS, LOWEST_HZ = 15, 150.0  # number of third-octave bands, and the center of the lowest one
    WINDOW = 564  # samples: 25.6 ms, as in ESTOI
    SEGMENT_FRAMES, SEGMENT_HOP = 30, 3
    QUIET = 1e-3  # energy relative to the loudest segment

    def __init__(self) -> None:
        super().__init__()
        self.resolution = (2 * self.WINDOW, self.WINDOW // 2, self.WINDOW)
        hertz = np.fft.rfftfreq(self.resolution[0], 1 / SAMPLE_RATE)
        centers = self.LOWEST_HZ * 2 ** (np.arange(self.BANDS)[:, None] / 3)
        filters = (hertz >= centers * 2 ** (-1 / 6)) & (hertz < centers * 2 ** (1 / 6))
        self.register_buffer("filters", torch.from_numpy(filters.astype(np.float32)), persistent=False)

    def forward(self, real: Spectra, gen: Spectra) -> torch.Tensor:
        """Return the distance, a scalar between 0 and 2.

        Audio that is shorter than a segment has the distance 0.
        """
        if real.audio.shape[-1] // self.resolution[1] + 1 < self.SEGMENT_FRAMES:
            return torch.zeros((), device=gen.audio.device)
        with torch.no_grad():
            segments_real = self._segments(real)
            energies = segments_real.square().mean((2, 3))  # [B, segments]
            loud = (energies > self.QUIET * energies.amax(1, keepdim=True)).float()
            normal_real = self._normalize(segments_real)
        correlations = (normal_real * self._normalize(self._segments(gen))).sum((2, 3)) / self.SEGMENT_FRAMES
        return 1 - (correlations * loud).sum() / loud.sum()

    def _segments(self, spectra: Spectra) -> torch.Tensor:
        """Return the magnitudes in third-octave bands, [B, segments, BANDS, SEGMENT_FRAMES]."""
        powers = self.get_buffer("filters") @ torch.view_as_real(spectra.stft(self.resolution)).square().sum(-1)
        return (powers + 1e-9).sqrt().unfold(-1, self.SEGMENT_FRAMES, self.SEGMENT_HOP).transpose(1, 2)

    @staticmethod
    def _normalize(segments: torch.Tensor) -> torch.Tensor:
        """Scale each band, and then each frame, to mean 0 and norm 1."""
        for axis in (3, 2):
            segments = segments - segments.mean(axis, keepdim=True)
            segments = segments / (segments.square().sum(axis, keepdim=True) + 1e-8).sqrt()
        return segments


# Names of the reconstruction terms, and of their weights in `LossConfig`
TERMS = ("log_mel", "symmetric", "asymmetric", "compressed", "waveform", "periodicity", "intelligibility")

# Names of the values that an update returns besides the reconstruction terms
OTHER_TERMS = ("score", "feature", "discriminator", "adversarial_share", "variance", "gradient_norm", "tokens")


@dataclass
class LossConfig:
    """Settings of the loss terms.

    Attributes:
        windows: window lengths of `LogMelDistance` in samples.
        num_mels: number of mel bands for each length in `windows`.
        compressed_windows: window lengths of `compressed_distance` in samples.
        log_mel: weight of `LogMelDistance`.
        compressed: weight of `compressed_distance`.
        symmetric: weight of the symmetric disturbance of `PerceptualDistance`.
        asymmetric: weight of the asymmetric disturbance of `PerceptualDistance`.
        waveform: weight of `waveform_distance`.
        periodicity: weight of `periodicity_distance`.
        intelligibility: weight of `IntelligibilityDistance`.
        custom: dict from the name of each custom loss to its config section; see `nemo_lfr.training.components`.
        variance: weight of `nemo_lfr.training.losses.spread`.
    """

    windows: list[int] = field(default_factory=lambda: [128, 256, 512, 1024, 2048])
    num_mels: list[int] = field(default_factory=lambda: [20, 40, 80, 80, 160])
    compressed_windows: list[int] = field(default_factory=lambda: [1024, 2048, 4096])
    log_mel: float = 1.0
    compressed: float = 5.0
    symmetric: float = 1.0
    asymmetric: float = 0.3
    waveform: float = 0.3
    periodicity: float = 4.0
    intelligibility: float = 1.5
    custom: dict[str, dict[str, Any]] = field(default_factory=dict)
    variance: float = 2.0


class ReconstructionTerms(nn.Module):
    """Module that computes all reconstruction distances and their weighted sum.

    Args:
        config: settings of the loss terms.

    Raises:
        ConfigError: if a loss in `config.custom` cannot be built.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.weights = {name: getattr(config, name) for name in TERMS}
        sections, scales = split_scales(config.custom)
        self.custom = AudioTerms(sections, "losses", reserved=(*self.weights, *OTHER_TERMS))
        self.weights |= scales
        self.log_mel = LogMelDistance(config.windows, config.num_mels)
        self.perceptual = PerceptualDistance()
        self.intelligibility = IntelligibilityDistance()

    def forward(self, real: Spectra, gen: Spectra) -> dict[str, torch.Tensor]:
        """Return a dict from the names of the terms to scalars."""
        log_mel = self.log_mel(real, gen)
        symmetric, asymmetric = self.perceptual(real, gen)
        return {
            "log_mel": log_mel,
            "symmetric": symmetric,
            "asymmetric": asymmetric,
            "compressed": compressed_distance(real, gen, self.config.compressed_windows),
            "waveform": waveform_distance(real.audio, gen.audio),
            "periodicity": periodicity_distance(real.audio, gen.audio),
            "intelligibility": self.intelligibility(real, gen),
            **self.custom(real, gen, None),
        }

    def total(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the weighted sum of the terms."""
        return sum(
            (weight * terms[name] for name, weight in self.weights.items()),
            torch.zeros((), device=terms["log_mel"].device),
        )
