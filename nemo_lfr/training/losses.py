"""Losses for training a codec, computed from signals or from discriminator outputs.

Distances between two signals are in `nemo_lfr.signal.distances`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nemo_lfr.errors import ConfigError, shorten
from nemo_lfr.signal.distances import ReconstructionLoss
from nemo_lfr.signal.spectra import Spectra
from nemo_lfr.training.components import AudioTerms, ScoreLoss, split_scales

Scores = Sequence[torch.Tensor]  # for each network, a tensor [B, ...]
FeatureMaps = Sequence[Sequence[torch.Tensor]]  # for each network, a tensor [B, ...] for each layer


def spread(encoded: torch.Tensor) -> torch.Tensor:
    """Compute a penalty that keeps each dimension of the encoder output centered and spread out.

    The penalty is zero if every dimension has a mean of 0 and a standard deviation of at least 0.8. Without this
    penalty, a new codec uses a single token per codebook after 50 steps.

    Args:
        encoded: encoder output, shape [B, D, T_encoded].

    Returns:
        A scalar.
    """
    encoded = encoded.float()
    return (0.8 - encoded.std(dim=(0, 2))).clamp_min(0).mean() + encoded.mean(dim=(0, 2)).square().mean()


def _average(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(values)).mean()


def generator_squared(gen: Scores) -> torch.Tensor:
    """Compute the least-squares GAN loss of the generator. The target score is 1."""
    return _average([(1 - score).square().mean() for score in gen])


def generator_hinged(gen: Scores) -> torch.Tensor:
    """Compute the hinge GAN loss of the generator. The target score is 1 or more."""
    return _average([F.relu(1 - score).mean() for score in gen])


def discriminator_squared(real: Scores, gen: Scores) -> torch.Tensor:
    """Compute the least-squares GAN loss of the discriminators.

    The target score is 1 for real audio and 0 for generated audio.
    """
    return _average([((1 - r).square().mean() + g.square().mean()) / 2 for r, g in zip(real, gen, strict=True)])


def discriminator_hinged(real: Scores, gen: Scores) -> torch.Tensor:
    """Compute the hinge GAN loss of the discriminators.

    The target score is 1 or more for real audio, and -1 or less for generated audio.
    """
    return _average([(F.relu(1 - r).mean() + F.relu(1 + g).mean()) / 2 for r, g in zip(real, gen, strict=True)])


def feature_matching(real: FeatureMaps, gen: FeatureMaps) -> torch.Tensor:
    """Compute the mean absolute difference between feature maps of real and generated audio (HiFi-GAN).

    Each network of the discriminators counts equally in the mean, however many layers it has.
    """
    return _average(
        [
            _average([F.l1_loss(g, r) for r, g in zip(layers_real, layers_gen, strict=True)])
            for layers_real, layers_gen in zip(real, gen, strict=True)
        ]
    )


def relative_feature_matching(real: FeatureMaps, gen: FeatureMaps, guard: float = 1e-3) -> torch.Tensor:
    """Compute the relative difference between feature maps of real and generated audio (EnCodec).

    The difference is mean(|real - gen|) / (mean(|real|) + guard), with means along the last dimension (arXiv
    2210.13438). `guard` avoids a division by zero. The result is averaged over the other dimensions, then over the
    layers of each network, then over all networks.
    """
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
# For each NeMo class that a config may name, by import path: the function of this package that replaces it
GENERATOR_LOSSES: dict[str, Callable[[Scores], torch.Tensor]] = {
    _NEMO_LOSSES + "GeneratorSquaredLoss": generator_squared,
    _NEMO_LOSSES + "GeneratorHingedLoss": generator_hinged,
}
DISCRIMINATOR_LOSSES: dict[str, Callable[[Scores, Scores], torch.Tensor]] = {
    _NEMO_LOSSES + "DiscriminatorSquaredLoss": discriminator_squared,
    _NEMO_LOSSES + "DiscriminatorHingedLoss": discriminator_hinged,
}
# Values of `_target_` that need no import
BUILT_IN = {*GENERATOR_LOSSES, *DISCRIMINATOR_LOSSES}
FEATURE_LOSSES: dict[str, Callable[[FeatureMaps, FeatureMaps], torch.Tensor]] = {
    "relative": relative_feature_matching,
    "absolute": feature_matching,
}
# Config key and default weight of each built-in term. The keys marked "not in NeMo" are additions.
SCALES = {
    "mel_l1": ("mel_loss_l1_scale", 1.0),
    "mel_l2": ("mel_loss_l2_scale", 1.0),
    "stft": ("stft_loss_scale", 0.0),
    "log_mel": ("log_mel_loss_scale", 0.0),  # not in NeMo
    "time_domain": ("time_domain_loss_scale", 1.0),
    "si_sdr": ("si_sdr_loss_scale", 0.0),
    "spread": ("spread_loss_scale", 0.0),  # not in NeMo
    "gen": ("gen_loss_scale", 1.0),
    "feature": ("feature_loss_scale", 1.0),
}
# Names of the keyword arguments of NeMo's adversarial losses. Custom losses get the same arguments.
_GENERATOR_ARGUMENTS = ("disc_scores_gen",)
_DISCRIMINATOR_ARGUMENTS = ("disc_scores_real", "disc_scores_gen")


class CodecLosses(nn.Module):
    """Loss terms for training a codec, and their weights.

    Args:
        config: model config with the same keys as in NeMo. The key `losses` adds custom terms; see
            `nemo_lfr.training.components`.

    Attributes:
        reconstruction: module that computes the distances between signals.
        custom: module that computes the custom terms.
        weights: weight of each term, by name. Terms whose weight is zero are not computed.
        generator: function that computes the adversarial term of the generator's loss.
        discriminator: function that computes the loss of the discriminators.
        feature: function that computes the feature-matching term of the generator's loss.

    Raises:
        ConfigError: if a loss is neither a loss of NeMo nor registered, or cannot be built, or if `feature_loss_type`
            is unknown.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.reconstruction = ReconstructionLoss(
            config["sample_rate"],
            config["loss_resolutions"],
            config["mel_loss_dims"],
            config.get("mel_loss_log_guard") or 1.0,
            config.get("stft_loss_log_guard") or 1.0,
        )
        # As in NeMo, a term whose weight is null is left out.
        self.weights = {term: float(config.get(key, default) or 0) for term, (key, default) in SCALES.items()}
        sections, own_scales = split_scales(config.get("losses"))
        self.custom = AudioTerms(sections, "losses", reserved=self.weights.keys())
        self.weights |= own_scales
        self.weights = {term: weight for term, weight in self.weights.items() if weight}
        self.generator: Callable[[Scores], torch.Tensor] = _score_loss(
            config, "generator_loss", GENERATOR_LOSSES, _GENERATOR_ARGUMENTS
        )
        self.discriminator: Callable[[Scores, Scores], torch.Tensor] = _score_loss(
            config, "discriminator_loss", DISCRIMINATOR_LOSSES, _DISCRIMINATOR_ARGUMENTS
        )
        feature = config.get("feature_loss_type", "relative")
        if feature not in FEATURE_LOSSES:
            known = ", ".join(FEATURE_LOSSES)
            raise ConfigError(f"feature_loss_type {shorten(feature)!r} is unknown; use one of {known}.")
        self.feature = FEATURE_LOSSES[feature]

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the weights of the terms named in `weights`. Terms of weight 0 are no longer computed."""
        self.weights = {term: weight for term, weight in (self.weights | dict(weights)).items() if weight}

    def terms(
        self, real: Spectra, gen: Spectra, audio_len: torch.Tensor | None, encoded: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Compute the terms that do not depend on a discriminator.

        Args:
            real: recordings [B, T_audio] with cached STFTs.
            gen: reconstructions [B, T_audio] with cached STFTs.
            audio_len: number of valid samples of each example, shape [B]; None if all samples are valid.
            encoded: encoder output, shape [B, D, T_encoded].

        Returns:
            A dictionary from the name of each term to a scalar.
        """
        wanted = [term for term in ReconstructionLoss.TERMS if term in self.weights]
        terms: dict[str, torch.Tensor] = self.reconstruction(real, gen, audio_len, wanted)
        if "spread" in self.weights:
            terms["spread"] = spread(encoded)
        terms |= self.custom(real, gen, audio_len, self.weights)
        return terms

    def adversarial_terms(
        self, scores_gen: Scores, maps_real: FeatureMaps, maps_gen: FeatureMaps
    ) -> dict[str, torch.Tensor]:
        """Compute those terms of the generator's loss that depend on discriminator outputs.

        Args:
            scores_gen: scores of generated audio.
            maps_real: feature maps of real audio.
            maps_gen: feature maps of generated audio.

        Returns:
            A dictionary from the name of each term to a scalar.
        """
        terms = {}
        if "gen" in self.weights:
            terms["gen"] = self.generator(scores_gen)
        if "feature" in self.weights:
            terms["feature"] = self.feature(maps_real, maps_gen)
        return terms

    def total(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the weighted sum of the terms, which is the loss of the generator."""
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()


def _score_loss(
    config: Mapping[str, Any], key: str, table: Mapping[str, Callable[..., torch.Tensor]], arguments: Sequence[str]
) -> Callable[..., torch.Tensor]:
    """Return the function or module for the adversarial loss that a section of the config names.

    Args:
        config: model config.
        key: key of the section, such as "generator_loss".
        table: functions that replace NeMo's losses, by `_target_`.
        arguments: names of the keyword arguments of a custom loss.
    """
    section = config[key]
    if isinstance(section, Mapping) and section.get("_target_") in table:
        return table[section["_target_"]]
    return ScoreLoss(section, key, arguments, built_in=table)
