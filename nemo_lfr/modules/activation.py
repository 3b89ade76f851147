"""Activation functions, with the state-dict keys of NeMo's `CodecActivation`."""

import torch
from torch import nn

from nemo_lfr.errors import ConfigError


class Snake(nn.Module):
    """Snake activation, x + sin(alpha x)^2 / alpha (Ziyin et al., arXiv 2006.08195).

    Each channel has its own learned alpha.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1, dtype=torch.float32))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the activation to [B, H, T]."""
        # 1e-9 avoids a division by zero if alpha = 0. NeMo uses the same value.
        return hidden + torch.sin(self.alpha * hidden).square() / (self.alpha + 1e-9)


class HalfSnake(nn.Module):
    """Activation with snake on the first half of the channels and leaky ReLU on the rest (NanoCodec)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.snake_act = Snake(channels // 2)
        self.lrelu = nn.LeakyReLU()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the activation to [B, H, T]."""
        periodic, linear = hidden.tensor_split([hidden.shape[1] // 2], dim=1)
        return torch.cat([self.snake_act(periodic), self.lrelu(linear)], dim=1)


class Clamp(nn.Module):
    """Output activation that limits audio to [-1, 1] without changing values in this range."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Clamp every value to [-1, 1]."""
        return hidden.clamp(-1.0, 1.0)


class CodecActivation(nn.Module):
    """Activation that is selected by its name in a config.

    Args:
        name: "lrelu", "elu", "snake" or "half_snake".
        channels: number of channels H.

    Raises:
        ConfigError: for an unknown name.
    """

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        self.activation: nn.Module
        match name.lower():
            case "lrelu":
                self.activation = nn.LeakyReLU()
            case "elu":
                self.activation = nn.ELU()
            case "snake":
                self.activation = Snake(channels)
            case "half_snake":
                self.activation = HalfSnake(channels)
            case _:
                raise ConfigError(f"activation {name!r} is unknown; use 'lrelu', 'elu', 'snake' or 'half_snake'.")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the activation to [B, H, T]."""
        result: torch.Tensor = self.activation(hidden)
        return result


def output_activation(name: str) -> nn.Module:
    """Build the output activation of a decoder, which limits audio to [-1, 1].

    Args:
        name: "tanh" or "clamp".

    Raises:
        ConfigError: for an unknown name.
    """
    match name:
        case "tanh":
            return nn.Tanh()
        case "clamp":
            return Clamp()
    raise ConfigError(f"output_activation {name!r} is unknown; use 'tanh' or 'clamp'.")
