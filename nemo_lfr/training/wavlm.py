"""Frozen WavLM (arXiv 2110.13900) for the SLM discriminator."""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from nemo_lfr.errors import ConfigError, first_line, install_command
from nemo_lfr.io.locate import check_model_name, looks_local
from nemo_lfr.io.shortage import missing_extra

logger = logging.getLogger(__name__)

# Receptive field of the convolutions of WavLM's feature extractor, in samples
MIN_SAMPLES = 400


class WavLM:
    """Feature extractor that returns all hidden states of a pretrained WavLM.

    The model is loaded on first use. This class is not an `nn.Module`, so WavLM is neither trained nor saved with the
    discriminator, and stays in evaluation mode.

    Args:
        name: Hub id of the model, or a folder that contains it.
        hidden: hidden size of the model.
        layers: number of hidden states: the number of layers plus 1 (for the input of the first layer).

    Attributes:
        fallback: function to call if the model `name` is not available, or None. It returns the weights of WavLM from
            a checkpoint of the codec, in which NeMo 3.0 saves them.
    """

    def __init__(self, name: str, hidden: int, layers: int) -> None:
        self.name, self.hidden, self.layers = name, hidden, layers
        self.fallback: Callable[[], Mapping[str, torch.Tensor]] | None = None
        self._model: nn.Module | None = None

    def __call__(self, audio: torch.Tensor) -> torch.Tensor:
        """Compute hidden states. Gradients flow through the model to the audio.

        Args:
            audio: samples at the model's sample rate, shape [B, T_audio].

        Returns:
            Hidden states, shape [B, layers * hidden, frames].

        Raises:
            ConfigError: if the model is not available, or its size differs from `hidden` or `layers`.
        """
        if self._model is None:
            self._model = self._load().eval().requires_grad_(False)
        model = self._model.to(audio.device)
        states = model(audio, output_hidden_states=True).hidden_states
        return torch.cat(states, dim=-1).transpose(1, 2)

    def _load(self) -> nn.Module:
        try:
            from transformers import AutoModel
        except Exception as error:  # importing transformers can raise any exception
            needed = f"the SLM discriminator needs transformers: {install_command('transformers')}"
            message = f"{needed}, or remove the SLM discriminator from the config."
            raise missing_extra(error, "transformers", message) from error
        try:
            check_model_name(self.name, ConfigError)
            model: nn.Module = AutoModel.from_pretrained(os.path.expanduser(self.name))
        except (OSError, ValueError) as error:
            weights = self.fallback() if self.fallback is not None else {}
            if not weights:
                reason = first_line(error)
                is_local = looks_local(self.name) or os.path.exists(os.path.expanduser(self.name))
                problem = "could not be loaded" if is_local else "could not be loaded from the Hub"
                raise ConfigError(
                    f"the SLM discriminator's model {self.name!r} {problem} ({reason}); set slm_model_name to a "
                    "folder with a complete copy, or remove this discriminator."
                ) from error
            logger.warning("%s could not be loaded; using the copy of its weights in the checkpoint.", self.name)
            model = build_wavlm(weights, self.layers - 1)
        config: Any = model.config
        if (config.hidden_size, config.num_hidden_layers + 1) != (self.hidden, self.layers):
            raise ConfigError(
                f"slm_hidden {self.hidden} and slm_layers {self.layers} do not match {self.name!r}; set slm_hidden to "
                f"{config.hidden_size} and slm_layers to {config.num_hidden_layers + 1}."
            )
        return model


def build_wavlm(weights: Mapping[str, torch.Tensor], layers: int) -> nn.Module:
    """Build a WavLM model whose sizes are determined by the shapes of its weights.

    Args:
        weights: state dict of a WavLM "base" model, which has a layer norm after each block.
        layers: number of layers.

    Returns:
        The model.

    Raises:
        ConfigError: if the weights are not those of a WavLM "base" model.
    """
    from transformers import WavLMConfig, WavLMModel

    try:
        first = "encoder.layers.0."
        convs = [weights[f"feature_extractor.conv_layers.{i}.conv.weight"] for i in range(7)]
        position = next(
            value
            for key, value in weights.items()
            if key.startswith("encoder.pos_conv_embed.conv") and value.dim() == 3 and value.shape[1] > 1
        )
        config = WavLMConfig(
            hidden_size=weights["encoder.layer_norm.weight"].shape[0],
            num_hidden_layers=layers,
            num_attention_heads=weights[first + "attention.rel_attn_embed.weight"].shape[1],
            num_buckets=weights[first + "attention.rel_attn_embed.weight"].shape[0],
            intermediate_size=weights[first + "feed_forward.intermediate_dense.weight"].shape[0],
            conv_dim=[weight.shape[0] for weight in convs],
            conv_kernel=[weight.shape[2] for weight in convs],
            num_conv_pos_embeddings=position.shape[2],
            num_conv_pos_embedding_groups=weights["encoder.layer_norm.weight"].shape[0] // position.shape[1],
        )
        model = WavLMModel(config)
        model.load_state_dict(dict(weights))
    except (KeyError, StopIteration, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the WavLM weights in the checkpoint are not valid ({str(error)[:200]}); set slm_model_name to a "
            "downloaded copy."
        ) from error
    return model
