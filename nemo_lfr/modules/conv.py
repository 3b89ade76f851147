"""1-d convolutions of the codec: symmetric or causal, down- and up-sampling, with or without weight norm.

All of them take and give `[B, H, T]`. The arithmetic runs as a 2-d convolution of height 1 in channels-last memory,
which CPUs and tensor cores do up to 1.5 times faster than `conv1d` on the same numbers, as long as there is more
signal than weights; see `convolve`.
State-dict keys are those of NeMo's `Conv1dNorm`, `ConvTranspose1dNorm` and their causal twins.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm as add_weight_norm

from nemo_lfr.errors import ConfigError
from nemo_lfr.modules.altered import must_be_called
from nemo_lfr.modules.padding import PAD_MODES, pad_signal


def channels_last(hidden: torch.Tensor) -> torch.Tensor:
    """The same [B, H, T] values with H innermost in memory."""
    if torch.compiler.is_exporting():
        return hidden
    return hidden.unsqueeze(2).contiguous(memory_format=torch.channels_last).squeeze(2)


def convolve(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int = 1,
    dilation: int = 1,
    padding: int = 0,
) -> torch.Tensor:
    """`F.conv1d` of [B, H_in, T], with `padding` zeros at both ends, and [H_out, H_in, K], by a CPU's fastest way.

    In the deep layers of a short clip the weights are larger than the signal, and what counts is to move them once:
    channels-last kernels copy them, and in training their gradients, into another layout on every call, and far beyond
    that oneDNN's convolutions are up to 8 times slower than a matrix product (1,536 outputs of 768 x 16 weights for 24
    frames). An exported graph leaves the way to who runs it.
    """
    if torch.compiler.is_exporting():
        return F.conv1d(hidden, weight, bias, stride=stride, padding=padding, dilation=dilation)
    outweighs = _outweighs(weight, hidden)
    # A dilated product's gradient would be spread over the span's gaps first.
    if outweighs >= (16 if not torch.is_grad_enabled() else 4 if dilation == 1 else math.inf):
        if padding:
            hidden = F.pad(hidden.unsqueeze(2), (padding, padding, 0, 0)).squeeze(2)
        return convolve_by_product(hidden, weight, bias, stride, dilation)
    plane = hidden.unsqueeze(2)
    layout = torch.contiguous_format if outweighs >= 1 else torch.channels_last
    result = F.conv2d(
        plane.contiguous(memory_format=layout),
        weight.unsqueeze(2),
        bias,
        stride=(1, stride),
        padding=(0, padding),
        dilation=(1, dilation),
    )
    # A signal of one channel lies in both layouts, and PyTorch's result then need not be in the one it is wanted in.
    return result.contiguous(memory_format=layout).squeeze(2)


def _outweighs(weight: torch.Tensor, hidden: torch.Tensor) -> float:
    """Weights for each item of the signal, where it matters: on a CPU."""
    return weight.numel() / max(hidden.numel(), 1) if hidden.device.type == "cpu" else 0.0


def convolve_by_product(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int = 1, dilation: int = 1
) -> torch.Tensor:
    """`F.conv1d` as one matrix product, for which the signal is copied once for every tap and the weights never."""
    span = (weight.shape[2] - 1) * dilation + 1
    seen = hidden.transpose(1, 2).unfold(1, span, stride)[..., ::dilation]  # [B, T_out, H_in, K]
    return F.linear(seen.flatten(2), weight.flatten(1), bias).transpose(1, 2)


class Conv1d(nn.Module):
    """A convolution that divides the length by `stride`.

    Symmetric: `padding` samples at both ends in `pad_mode`. Causal: zeros before the first sample only.

    Raises:
        ConfigError: for an unknown `pad_mode`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        causal: bool = False,
        pad_mode: str = "reflect",
        weight_norm: bool = True,
    ) -> None:
        super().__init__()
        if pad_mode not in PAD_MODES:
            raise ConfigError(f"pad_mode {pad_mode!r} is unknown; use one of {sorted(PAD_MODES)}.")
        self.pad_mode = "constant" if causal else PAD_MODES[pad_mode]
        span = (kernel_size - 1) * dilation + 1
        if causal:
            self.pad = (span - stride, 0)
        elif stride > 1:
            self.pad = ((span - stride + 1) // 2,) * 2
        else:
            self.pad = ((span - 1) // 2,) * 2
        # Kept here, as a caller may put another module in the place of `conv`. `span`: items of the padded input that
        # one output sees, from the first to the last.
        self.stride, self.span = stride, span
        conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride=stride, dilation=dilation, dtype=torch.float32)
        self.conv = add_weight_norm(conv) if weight_norm else conv

    @property
    def min_length(self) -> int:
        """Shortest input that the padding can be taken from."""
        return max(self.pad) + 1 if self.pad_mode == "reflect" else 1

    def pad_ends(self, hidden: torch.Tensor, first: bool = True, last: bool = True) -> torch.Tensor:
        """[B, H, T] with this layer's padding where the signal begins, and where it ends."""
        return pad_signal(hidden, (self.pad[0] * first, self.pad[1] * last), self.pad_mode)

    def convolve(self, padded: torch.Tensor) -> torch.Tensor:
        """[B, H_in, T] -> [B, H_out, (T - span) // stride + 1], nothing padded."""
        conv = self.conv
        return convolve(padded, conv.weight, conv.bias, conv.stride[0], conv.dilation[0])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and must_be_called(self.conv, nn.Conv1d):
            result: torch.Tensor = self.conv(self.pad_ends(hidden))
            return result
        if self.pad_mode == "constant" and self.pad[0] == self.pad[1]:
            conv = self.conv
            return convolve(hidden, conv.weight, conv.bias, conv.stride[0], conv.dilation[0], self.pad[0])
        return self.convolve(self.pad_ends(hidden))


class ConvTranspose1d(nn.Module):
    """A transposed convolution with a kernel of twice its stride, which multiplies the length by `stride`.

    Symmetric: the extra `stride` output samples are cut half on each side. Causal: all of them at the end.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        groups: int = 1,
        causal: bool = False,
        weight_norm: bool = True,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.first_sample = 0 if causal else (stride + 1) // 2
        conv = nn.ConvTranspose1d(in_channels, out_channels, 2 * stride, stride, groups=groups, dtype=torch.float32)
        self.conv = add_weight_norm(conv) if weight_norm else conv

    def overlap(self, hidden: torch.Tensor) -> torch.Tensor:
        """What lies between the first and the last input: [B, H_in, T] -> [B, H_out, (T - 1) * stride].

        Output sample t * stride + r sees inputs t and t - 1 alone.
        """
        conv = self.conv
        stride, groups = conv.stride[0], conv.groups
        if torch.compiler.is_exporting():
            return F.conv_transpose1d(hidden, conv.weight, conv.bias, stride=stride, groups=groups)[
                ..., stride:-stride
            ]
        assert conv.bias is not None
        if groups == 1 and torch.is_grad_enabled() and _outweighs(conv.weight, hidden) >= 4:
            # One product with the weights where they lie: rearranged for the convolution below, they and their
            # gradients would be copied four times.
            taps = (hidden.transpose(1, 2) @ conv.weight.flatten(1)).unflatten(2, (-1, 2, stride))
            full = taps[:, 1:, :, 0] + taps[:, :-1, :, 1]  # [B, T - 1, H_out, stride]
            return full.permute(0, 1, 3, 2).flatten(1, 2).transpose(1, 2) + conv.bias[:, None]
        if groups == 1:
            phases = convolve(hidden, _phase_weight(conv.weight, stride), None)
            return interleave(phases, stride) + conv.bias[:, None]
        full = F.conv_transpose1d(hidden.contiguous(), conv.weight, conv.bias, stride=stride, groups=groups)
        return channels_last(full[..., stride:-stride])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        stride, length = self.stride, hidden.shape[-1]
        hidden = F.pad(hidden, (1, 1))
        if not torch.compiler.is_compiling() and must_be_called(self.conv, nn.ConvTranspose1d):
            full = self.conv(hidden)[..., stride:-stride]
        else:
            full = self.overlap(hidden)  # [B, H_out, (T + 1) * stride]
        return full[..., self.first_sample : self.first_sample + length * stride]


def fold(layer: Conv1d | ConvTranspose1d) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a layer's weight, weight norm folded, and its bias, as those of a plain convolution without gradient.

    Returns:
        [H_out, H_in, K] and [H_out]. Of a transposed layer without groups, [stride * H_out, H_in, 2] and
        [stride * H_out]: a convolution of its input, one item padded at both ends, to phases for `interleave`.
    """
    weight, bias = layer.conv.weight.detach(), layer.conv.bias
    bias = None if bias is None else bias.detach()
    if isinstance(layer, Conv1d) or layer.conv.groups > 1:
        return weight, bias
    stride = layer.conv.stride[0]
    return _phase_weight(weight, stride), None if bias is None else bias.repeat(stride)


def _phase_weight(weight: torch.Tensor, stride: int) -> torch.Tensor:
    """[H_in, H_out, 2 * stride] -> [stride * H_out, H_in, 2]: output t * stride + phase sees inputs t and t - 1."""
    taps = weight.unflatten(2, (2, stride)).flip(2)  # [H_in, H_out, 2, stride]
    return taps.permute(3, 1, 0, 2).flatten(0, 1)


def interleave(phases: torch.Tensor, stride: int) -> torch.Tensor:
    """[B, stride * H, T] -> [B, H, T * stride]; with channels innermost, memory already lies in this order."""
    return phases.unflatten(1, (stride, -1)).permute(0, 3, 1, 2).flatten(1, 2).transpose(1, 2)
