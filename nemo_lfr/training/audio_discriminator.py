"""Base class for discriminators, and functions that check their outputs."""

from typing import Any

import torch
from torch import nn

from nemo_lfr.errors import ConfigError
from nemo_lfr.signal.spectra import Spectra
from nemo_lfr.training.components import described

Views = list[torch.Tensor]
# Scores and feature maps, with one entry per network
DiscriminatorOutput = tuple[list[torch.Tensor], list[list[torch.Tensor]]]


class AudioDiscriminator(nn.Module):
    """Base class for discriminators, which consist of one or more networks.

    A subclass must define `score`. It must also define `preprocess` if the input of its networks is not the waveform,
    `num_networks` if it has several networks, and `min_samples` if it cannot score very short audio.
    """

    @property
    def num_networks(self) -> int:
        """Return the number of networks, 1 by default. Each network has one input, called its view, and one output."""
        return 1

    @property
    def min_samples(self) -> int:
        """Return the length, in samples, of the shortest audio that `score` accepts; 1 by default.

        Training pads batches of shorter audio to this length.
        """
        return 1

    def preprocess(self, audio: Spectra) -> Views:
        """Compute the input of each network, called its view. This step has no trainable weights.

        Args:
            audio: signals [B, T_audio] with cached STFTs.

        Returns:
            A list with one tensor [B, ...] per network; by default the waveform [B, T_audio].
        """
        return [audio.audio]

    def score(self, views: Views) -> DiscriminatorOutput:
        """Score the views that `preprocess` returned.

        Args:
            views: list with one tensor [B, ...] per network.

        Returns:
            Two lists with one entry per network: the scores, each a tensor [B, ...], and the feature maps, each a list
            of tensors [B, ...].
        """
        raise NotImplementedError

    def forward(
        self, audio_real: torch.Tensor, audio_gen: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[list[torch.Tensor]], list[list[torch.Tensor]]]:
        """Score real and generated audio.

        Args:
            audio_real: recordings, shape [B, T_audio].
            audio_gen: reconstructions, shape [B, T_audio].

        Returns:
            Scores of real audio, scores of generated audio, feature maps of real audio, and feature maps of generated
            audio. NeMo's discriminators return them in the same order.
        """
        scores_real, maps_real = score_views(self, preprocess_audio(self, Spectra(audio_real)))
        scores_gen, maps_gen = score_views(self, preprocess_audio(self, Spectra(audio_gen)))
        return scores_real, scores_gen, maps_real, maps_gen


def preprocess_audio(discriminator: AudioDiscriminator, audio: Spectra) -> Views:
    """Call a discriminator's `preprocess`, and check the views that it returns.

    Args:
        discriminator: any discriminator.
        audio: signals [B, T_audio] with cached STFTs.

    Raises:
        ConfigError: if `preprocess` does not return a list with one tensor [B, ...] per network.
    """
    views = discriminator.preprocess(audio)
    _check(discriminator, "preprocess", views, len(audio.audio))
    return views


def score_views(discriminator: AudioDiscriminator, views: Views) -> DiscriminatorOutput:
    """Call a discriminator's `score`, and check the scores and feature maps that it returns.

    Args:
        discriminator: any discriminator.
        views: list with one tensor [B, ...] per network.

    Raises:
        ConfigError: if the result of `score` does not have the form that `AudioDiscriminator.score` describes.
    """
    output = discriminator.score(views)
    if not isinstance(output, tuple) or len(output) != 2:
        raise _wrong(discriminator, "score", "a tuple of scores and feature maps", output)
    scores, feature_maps = output
    batch = len(views[0])
    _check(discriminator, "score", scores, batch, " as scores")
    if not isinstance(feature_maps, list) or len(feature_maps) != len(scores):
        wanted = f"a list with one item per network ({len(scores)})"
        raise _wrong(discriminator, "score", wanted, feature_maps, " as feature maps")
    for layers in feature_maps:
        if not isinstance(layers, list) or not all(torch.is_tensor(layer) and len(layer) == batch for layer in layers):
            raise _wrong(
                discriminator,
                "score",
                f"a list of tensors [B, ...] with B = {batch}",
                layers,
                " as the feature maps of a network",
            )
    return output


def _check(discriminator: AudioDiscriminator, method: str, values: Any, batch: int, role: str = "") -> None:
    """Raise ConfigError unless `values` is a list or tuple with one tensor [batch, ...] per network.

    `role` is a phrase for the message, such as " as scores". It is empty if `values` is the whole result of `method`.
    """
    count = discriminator.num_networks
    is_list = isinstance(values, list | tuple) and all(isinstance(value, torch.Tensor) for value in values)
    if not is_list or len(values) != count:
        raise _wrong(discriminator, method, f"a list of {count} tensor{'s' if count > 1 else ''}", values, role)
    for value in values:
        if not value.dim() or len(value) != batch:
            raise _wrong(discriminator, method, f"tensors [B, ...] with B = {batch}", value, role)


def _wrong(discriminator: AudioDiscriminator, method: str, wanted: str, found: Any, role: str = "") -> ConfigError:
    return ConfigError(
        f"discriminator: {type(discriminator).__name__}.{method} returned {described(found)}{role}; expected {wanted}."
    )
