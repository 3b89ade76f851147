"""Discriminators for the last phase of a run.

The discriminators are small, and have their own learning rate. They first train alone. After that, the generator uses
their gradients too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils import parametrize

from nemo_lfr.signal.spectra import Spectra
from nemo_lfr.training.audio_discriminator import AudioDiscriminator, preprocess_audio, score_views
from nemo_lfr.training.discriminators import (
    Discriminator,
    MultiPeriodDiscriminator,
    MultiResolutionDiscriminatorSTFT,
    build_discriminator,
)
from nemo_lfr.training.losses import discriminator_squared, feature_matching, generator_squared
from recipes.bundled_codec.losses import resolution
from recipes.bundled_codec.optimizer import adamw, load_adamw

STFT_WINDOWS = (512, 1024, 2048)
MAX_NORM = 10.0


@dataclass
class DiscriminatorConfig:
    """Settings of the discriminators, which are used only if `from_update` is set.

    Attributes:
        from_update: first update with discriminators. Choose an update at which the log-mel distance no longer falls.
        lr: constant learning rate of the discriminators.
        learn_alone: number of updates in which the discriminators train before the generator uses their gradients.
        ramp: number of updates in which the weight of the score term grows from zero to `score`, starting when the
            generator first uses the gradients. The feature-matching term has its full weight at once.
        feature: weight of the generator's feature-matching term.
        score: weight of the generator's score term.
        batch_size: how many of the segments in each batch the discriminators process; None for all.
        generator_rate: factor on the generator's learning rate once it uses the gradients of the discriminators.
        period_channels: number of channels in the multi-period discriminator; 0 for no such discriminator.
        custom: config sections of additional discriminators, each with a `_target_`; see
            `nemo_lfr.training.components`.
    """

    from_update: int | None = None
    lr: float = 1e-3
    learn_alone: int = 300
    ramp: int = 2000
    feature: float = 5.0
    score: float = 1.0
    batch_size: int | None = None
    generator_rate: float = 0.5
    period_channels: int = 8
    custom: list[dict[str, Any]] = field(default_factory=list)


class Adversary:
    """Discriminators with their optimizer.

    Args:
        config: settings of the discriminators.
        device: device of the discriminators.
        dtype: dtype in which their convolutions compute.

    Raises:
        ConfigError: if a discriminator in `config.custom` cannot be built.
    """

    def __init__(self, config: DiscriminatorConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        networks: list[AudioDiscriminator] = [
            MultiResolutionDiscriminatorSTFT([resolution(window) for window in STFT_WINDOWS], pad_mode="zeros")
        ]
        if config.period_channels:
            networks.append(MultiPeriodDiscriminator(channels=config.period_channels, pad_mode="zeros"))
        networks += [build_discriminator(section) for section in config.custom]
        self.module = Discriminator(networks).to(device)
        self.parameters = list(self.module.parameters())
        self.lr, self.score_weight = torch.zeros((), device=device), torch.zeros((), device=device)
        self.optimizer = adamw(self.parameters, self.lr)
        self.updates = 0

    @property
    def is_heard(self) -> bool:
        """Return whether the generator already uses the gradients of the discriminators."""
        return self.updates >= self.config.learn_alone

    def begin_update(self) -> None:
        """Set the learning rate, and the weight of the generator's score term, for the next update."""
        heard = self.updates - self.config.learn_alone
        ramp = min(1.0, max(0.0, heard / self.config.ramp)) if self.config.ramp else 1.0
        self.lr.fill_(self.config.lr)
        self.score_weight.fill_(self.config.score * ramp)

    def step(self, real: Spectra, gen: Spectra, heard: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Update the discriminators, and compute the gradient for the generator.

        The gradients for the discriminators and for the generator come from the same forward pass, before the update.

        Args:
            real: recordings [B, T_audio] with cached STFTs.
            gen: reconstructions [B, T_audio] with cached STFTs; `gen.audio` requires a gradient.
            heard: whether to compute the gradient for the generator.

        Returns:
            A dict from the names of the loss terms to scalars, and the gradient of the generator's score and
            feature-matching terms with respect to `gen.audio`, [B, T_audio]. The gradient is None if `heard` is False.
        """
        lower = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=lower), parametrize.cached():
            with torch.no_grad():
                views_real = preprocess_audio(self.module, real)
            views_gen = preprocess_audio(self.module, gen)
            inputs = [view.detach().requires_grad_(heard) for view in views_gen]
            scores_real, maps_real = score_views(self.module, views_real)
            scores_gen, maps_gen = score_views(self.module, inputs)
            loss = discriminator_squared(scores_real, scores_gen)
            terms = {
                "score": generator_squared(scores_gen),
                "feature": feature_matching([[layer.detach() for layer in layers] for layers in maps_real], maps_gen),
                "discriminator": loss,
            }
            gradients = None
            if heard:
                total = self.score_weight * terms["score"] + self.config.feature * terms["feature"]
                gradients = torch.autograd.grad(total, inputs, retain_graph=True)
            learned = torch.autograd.grad(loss, self.parameters)
        norm = torch.stack(torch._foreach_norm(learned)).norm()
        self.lr.mul_(norm.isfinite())
        scale = (MAX_NORM / (norm + 1e-6)).clamp_max(1).nan_to_num()
        for parameter, grad in zip(self.parameters, learned, strict=True):
            parameter.grad = grad.nan_to_num() * scale
        self.optimizer.step()
        return terms, torch.autograd.grad(views_gen, gen.audio, gradients)[0] if heard else None

    def state_dict(self) -> dict[str, Any]:
        """Return the weights, the state of the optimizer and the number of updates."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state dict that was saved on any device."""
        self.module.load_state_dict(state["module"])
        load_adamw(self.optimizer, state["optimizer"], self.lr)
        self.updates = state["updates"]
