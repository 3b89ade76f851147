"""The codec's losses: every term is a function of two signals or of discriminators' outputs, by name.

Reconstruction terms are NeMo's `MultiResolutionMelLoss`, `MultiResolutionSTFTLoss`, `TimeDomainLoss` and `SISDRLoss`
(equal to 1e-5), from one STFT of each signal per resolution. A term's mean is taken over each example's own length.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from nemo_lfr.errors import ConfigError, clip
from nemo_lfr.training.spectra import Spectra

Scores = Sequence[torch.Tensor]
FeatureMaps = Sequence[Sequence[torch.Tensor]]
_Loss = TypeVar("_Loss")


class ReconstructionLoss(nn.Module):
    """Distances between a recording and its reconstruction.

    Args:
        sample_rate: Hz.
        resolutions: (n_fft, hop, window) in samples.
        mel_dims: mel bands at each resolution.
        mel_guard, stft_guard: added before the logarithm. At NeMo's 1.0 the measure depends on level and hardly sees
            quiet phones.
        floor: magnitude under which the "log_mel" term, a measure of our own, sees silence.
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
        from librosa.filters import mel as mel_filters  # slow to import, and not needed for SI-SDR alone

        super().__init__()
        self.resolutions = [tuple(resolution) for resolution in resolutions]
        self.mel_guard, self.stft_guard, self.floor = mel_guard, stft_guard, floor
        for index, ((n_fft, _, _), num_mels) in enumerate(zip(self.resolutions, mel_dims, strict=True)):
            filters = torch.from_numpy(mel_filters(sr=sample_rate, n_fft=n_fft, n_mels=num_mels, norm=None))
            self.register_buffer(f"mel_{index}", filters, persistent=False)

    def forward(
        self,
        real: Spectra,
        gen: Spectra,
        audio_len: torch.Tensor | None = None,
        terms: Collection[str] = ("mel_l1", "stft"),
    ) -> dict[str, torch.Tensor]:
        """The terms asked for, each a scalar.

        Args:
            real, gen: audio [B, T_audio] and its reconstruction.
            audio_len: samples of each example [B]; all of them if not given.
            terms: names out of `TERMS`. "si_sdr" is negative, so that less is better.
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
            frames = _frames(audio_len, mel_gen, hop, 0)  # NeMo's mel features leave the last frame out
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
    """Frames of each example that count, [B]."""
    if audio_len is None:
        return torch.full((spectrum.shape[0],), spectrum.shape[-1] - 1 + extra, device=spectrum.device)
    return audio_len // hop + extra


def _mean(values: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Mean of [B, D, T] over D, over each example's length, then over the examples."""
    if lengths is None:
        return values.mean(dim=1).mean(dim=1).mean()
    valid = torch.arange(values.shape[-1], device=values.device) < lengths[:, None]
    return ((values.mean(dim=1) * valid).sum(dim=1) / lengths.clamp_min(1)).mean()


def si_sdr(real: torch.Tensor, gen: torch.Tensor, audio_len: torch.Tensor | None = None) -> torch.Tensor:
    """Mean scale-invariant signal-to-distortion ratio in dB of audio [B, T_audio], as NeMo's `SISDRLoss` has it."""
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


def spread(encoded: torch.Tensor) -> torch.Tensor:
    """Keep each encoded dimension [B, D, T] centred and at least 0.8 wide.

    Early on the codes are noise to the decoder, which is rewarded for an encoder that stops varying: without this
    term a new codec is down to one token in each codebook after 50 steps.
    """
    encoded = encoded.float()
    return (0.8 - encoded.std(dim=(0, 2))).clamp_min(0).mean() + encoded.mean(dim=(0, 2)).square().mean()


def _average(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(values)).mean()


def generator_squared(gen: Scores) -> torch.Tensor:
    """Least-squares GAN: generated audio should score 1."""
    return _average([(1 - score).square().mean() for score in gen])


def generator_hinged(gen: Scores) -> torch.Tensor:
    return _average([F.relu(1 - score).mean() for score in gen])


def discriminator_squared(real: Scores, gen: Scores) -> torch.Tensor:
    """Least-squares GAN: real audio should score 1, generated audio 0."""
    return _average([((1 - r).square().mean() + g.square().mean()) / 2 for r, g in zip(real, gen, strict=True)])


def discriminator_hinged(real: Scores, gen: Scores) -> torch.Tensor:
    return _average([(F.relu(1 - r).mean() + F.relu(1 + g).mean()) / 2 for r, g in zip(real, gen, strict=True)])


def feature_matching(real: FeatureMaps, gen: FeatureMaps) -> torch.Tensor:
    """Mean absolute difference of the discriminators' layers (HiFi-GAN), each discriminator counting alike."""
    return _average(
        [
            _average([F.l1_loss(g, r) for r, g in zip(layers_real, layers_gen, strict=True)])
            for layers_real, layers_gen in zip(real, gen, strict=True)
        ]
    )


def relative_feature_matching(real: FeatureMaps, gen: FeatureMaps, guard: float = 1e-3) -> torch.Tensor:
    """`feature_matching` relative to each feature's size, by its last dimension (EnCodec, arXiv 2210.13438)."""
    return _average(
        [
            _average(
                [
                    ((r - g).abs().mean(-1) / (r.abs().mean(-1) + guard)).mean()
                    for r, g in zip(layers_real, layers_gen, strict=True)
                ]
            )
            for layers_real, layers_gen in zip(real, gen, strict=True)
        ]
    )


_NEMO_LOSSES = "nemo.collections.tts.losses.audio_codec_loss."
# NeMo's classes that a config may name.
GENERATOR_LOSSES: dict[str, Callable[[Scores], torch.Tensor]] = {
    _NEMO_LOSSES + "GeneratorSquaredLoss": generator_squared,
    _NEMO_LOSSES + "GeneratorHingedLoss": generator_hinged,
}
DISCRIMINATOR_LOSSES: dict[str, Callable[[Scores, Scores], torch.Tensor]] = {
    _NEMO_LOSSES + "DiscriminatorSquaredLoss": discriminator_squared,
    _NEMO_LOSSES + "DiscriminatorHingedLoss": discriminator_hinged,
}
FEATURE_LOSSES: dict[str, Callable[[FeatureMaps, FeatureMaps], torch.Tensor]] = {
    "relative": relative_feature_matching,
    "absolute": feature_matching,
}
# Reconstruction term -> the config key of its weight, and NeMo's default.
WEIGHTS = {
    "mel_l1": ("mel_loss_l1_scale", 1.0),
    "mel_l2": ("mel_loss_l2_scale", 1.0),
    "stft": ("stft_loss_scale", 0.0),
    "log_mel": ("log_mel_loss_scale", 0.0),  # ours
    "time_domain": ("time_domain_loss_scale", 1.0),
    "si_sdr": ("si_sdr_loss_scale", 0.0),
    "spread": ("spread_loss_scale", 0.0),  # ours
}


class CodecLosses(nn.Module):
    """All that a codec's training minimises: named terms and their weights, from a model config with NeMo's keys.

    Attributes:
        reconstruction: the distances between signals.
        weights: of every term that counts.
        generator, discriminator, feature: the adversarial terms.

    Raises:
        ConfigError: for a loss that is not one of NeMo's.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.reconstruction = ReconstructionLoss(
            config["sample_rate"],
            config["loss_resolutions"],
            config["mel_loss_dims"],
            config.get("mel_loss_log_guard", 1.0),
            config.get("stft_loss_log_guard", 1.0),
        )
        self.weights = {term: float(config.get(key, default)) for term, (key, default) in WEIGHTS.items()}
        self.weights["gen"] = float(config.get("gen_loss_scale", 1.0))
        self.weights["feature"] = float(config.get("feature_loss_scale", 1.0))
        self.weights = {term: weight for term, weight in self.weights.items() if weight}
        self.generator = _chosen(GENERATOR_LOSSES, "generator_loss", config["generator_loss"]["_target_"])
        self.discriminator = _chosen(
            DISCRIMINATOR_LOSSES, "discriminator_loss", config["discriminator_loss"]["_target_"]
        )
        self.feature = _chosen(FEATURE_LOSSES, "feature_loss_type", config.get("feature_loss_type", "relative"))

    def terms(
        self, real: Spectra, gen: Spectra, audio_len: torch.Tensor | None, encoded: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The terms that count without discriminators; `encoded` [B, D, T] is the encoder's output."""
        wanted = [term for term in ReconstructionLoss.TERMS if term in self.weights]
        terms = self.reconstruction(real, gen, audio_len, wanted)
        if "spread" in self.weights:
            terms["spread"] = spread(encoded)
        return terms

    def adversarial_terms(
        self, scores_gen: Scores, maps_real: FeatureMaps, maps_gen: FeatureMaps
    ) -> dict[str, torch.Tensor]:
        """The generator's terms of what the discriminators say."""
        terms = {}
        if "gen" in self.weights:
            terms["gen"] = self.generator(scores_gen)
        if "feature" in self.weights:
            terms["feature"] = self.feature(maps_real, maps_gen)
        return terms

    def total(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum that the generator minimises."""
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()


def _chosen(table: Mapping[str, _Loss], key: str, name: str) -> _Loss:
    if name not in table:
        raise ConfigError(f"{key} {clip(name)!r} is unknown; known: {', '.join(table)}.")
    return table[name]
