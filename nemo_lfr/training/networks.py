"""Networks of the discriminators: stacks of 2-D convolutions with weight norm."""

from collections.abc import Iterable, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from nemo_lfr.errors import ConfigError, shorten
from nemo_lfr.modules.conv import convolve_by_product

PadMode = Literal["reflect", "zeros"]


class Conv2d(nn.Module):
    """2-D convolution with weight norm.

    With odd kernel sizes and a stride of 1, height and width do not change.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: height and width of the kernel.
        stride: stride along height and width.
        dilation: dilation along height and width.
        pad_mode: "reflect" or "zeros".

    Raises:
        ConfigError: if `pad_mode` is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        pad_mode: PadMode = "reflect",
    ) -> None:
        super().__init__()
        if pad_mode not in ("reflect", "zeros"):
            raise ConfigError(f"pad_mode {shorten(str(pad_mode))!r} is unknown; use 'reflect' or 'zeros'.")
        padding = ((kernel_size[0] - 1) * dilation[0] // 2, (kernel_size[1] - 1) * dilation[1] // 2)
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode=pad_mode)
        self.conv = weight_norm(conv)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the convolution to hidden states [B, C, H, W]."""
        conv = self.conv
        zeros = conv.padding_mode == "zeros"
        if hidden.device.type != "cpu" or conv.kernel_size[1] > 1:
            convolved: torch.Tensor = conv(hidden.contiguous(memory_format=torch.channels_last) if zeros else hidden)
            return convolved
        # A kernel of width 1 processes each column independently, so the columns can be the rows of a matrix
        # product. In deep layers, where there are few rows and the weights are larger than the signal, this is faster
        # on a CPU than a convolution: it runs near peak speed, and does not copy the weights.
        columns = hidden.transpose(2, 3).transpose(1, 2).flatten(0, 1)  # [B * W, C, H], C innermost in memory
        mode = "constant" if zeros else "reflect"
        padded = F.pad(columns.unsqueeze(2), (conv.padding[0],) * 2 + (0, 0), mode=mode).squeeze(2)
        result = convolve_by_product(padded, conv.weight.squeeze(3), conv.bias, conv.stride[0], conv.dilation[0])
        return torch.unflatten(result, 0, (hidden.shape[0], -1)).permute(0, 2, 3, 1)


def _least_size(convs: Iterable[Conv2d], axis: int) -> int:
    """Return the smallest input height (axis 0) or width (axis 1) that a stack of convolutions accepts."""
    size = 1
    for layer in reversed(list(convs)):
        conv = layer.conv
        padding = cast(tuple[int, int], conv.padding)[axis]
        size = (size - 1) * conv.stride[axis] + conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1 - 2 * padding
        size = max(size, padding + 1 if conv.padding_mode == "reflect" else 1)
    return size


class Network(nn.Module):
    """Stack of convolutions with leaky ReLUs, followed by a convolution that computes the scores.

    The feature maps are the outputs of all layers.
    """

    def __init__(self, conv_layers: Sequence[Conv2d], conv_post: Conv2d, lrelu_slope: float) -> None:
        super().__init__()
        self.lrelu_slope = lrelu_slope
        self.conv_layers = nn.ModuleList(conv_layers)
        self.conv_post = conv_post

    def least_size(self, axis: int) -> int:
        """Return the smallest height (axis 0) or width (axis 1) of a view that this network accepts."""
        return _least_size([*cast(Iterable[Conv2d], self.conv_layers), self.conv_post], axis)

    def check_bins(self, bins: int, what: str) -> None:
        """Check that the spectra that this network will score have enough frequency bins.

        Args:
            bins: number of frequency bins.
            what: config value that determines this number, for the error message.

        Raises:
            ConfigError: if there are too few bins.
        """
        if bins < (least := self.least_size(1)):
            raise ConfigError(
                f"{what} has {bins} frequency bins; the discriminator needs at least {least}. Use a larger FFT size."
            )

    def forward(self, view: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Score a view.

        Args:
            view: representation of the audio, shape [B, C, H, W].

        Returns:
            Scores [B, W, H], and a list with the feature map of each layer, [B, C, H, W]. C, H and W depend on the
            layer; H and W of the scores are those of the last layer.
        """
        feature_maps = []
        hidden = view
        for conv in self.conv_layers:
            hidden = F.leaky_relu(conv(hidden), self.lrelu_slope)
            feature_maps.append(hidden)
        score = self.conv_post(hidden)
        feature_maps.append(score)
        return score.squeeze(1).transpose(1, 2), feature_maps
