"""1-d convolutions: symmetric or causal, down- or up-sampling, with or without weight norm.

Inputs and outputs are `[B, H, T]`. A convolution usually runs as a 2-d convolution of height 1 in channels-last
memory. On CPUs and tensor cores this is up to 1.5 times faster than `conv1d` if the signal is larger than the weights.
For smaller signals, a CPU uses the default memory layout or a matrix product (see `convolve`). The state-dict keys are
those of NeMo's `Conv1dNorm`, `ConvTranspose1dNorm` and their causal variants.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm as add_weight_norm

from nemo_lfr.errors import ConfigError
from nemo_lfr.modules.altered import must_be_called
from nemo_lfr.modules.padding import PAD_MODES, pad_signal
from nemo_lfr.modules.token_checks import mask
from nemo_lfr.modules.weights import contiguous_values, current_value


def channels_last(hidden: torch.Tensor) -> torch.Tensor:
    """Return a signal [B, H, T] with the channels H innermost in memory."""
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
    """Convolve as `F.conv1d` does, with the implementation that is fastest on a CPU.

    An exported graph contains `conv1d`, so that its runtime can choose an implementation.

    Args:
        hidden: [B, H_in, T].
        weight: [H_out, H_in, K].
        bias: [H_out], or None.
        stride: time steps between outputs.
        dilation: time steps between taps.
        padding: number of zeros to add at each end.

    Returns:
        [B, H_out, T_out].
    """
    if torch.compiler.is_exporting():
        return F.conv1d(hidden, weight, bias, stride=stride, padding=padding, dilation=dilation)
    # A channels-last convolution copies the weights, and in training also their gradients, on every call. In a short
    # clip, the weights of the deep layers are larger than the signal, so the default layout is faster. If they are
    # much larger, oneDNN's convolutions are up to 8 times slower than a matrix product, for example with H_in = 768,
    # H_out = 1536, K = 16 and T = 24.
    outweighs = _outweighs(weight, hidden)
    # With gradients, a dilated convolution is never a matrix product, because the backward pass of the product would
    # also process the gaps between the taps.
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
    # A signal with one channel is in both layouts, so PyTorch may return the result in the other layout.
    return result.contiguous(memory_format=layout).squeeze(2)


def _outweighs(weight: torch.Tensor, hidden: torch.Tensor) -> float:
    """Return the ratio of weight size to signal size on a CPU, and 0 on other devices."""
    return weight.numel() / max(hidden.numel(), 1) if hidden.device.type == "cpu" else 0.0


def convolve_by_product(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int = 1, dilation: int = 1
) -> torch.Tensor:
    """Convolve as `F.conv1d` does, but with one matrix product of the signal's windows and the weights."""
    span = (weight.shape[2] - 1) * dilation + 1
    seen = hidden.transpose(1, 2).unfold(1, span, stride)[..., ::dilation]  # [B, T_out, H_in, K]
    return F.linear(seen.flatten(2), weight.flatten(1), bias).transpose(1, 2)


class Conv1d(nn.Module):
    """Padded convolution that divides the length of a signal by `stride`.

    A symmetric convolution pads both ends with the mode `pad_mode`. A causal one only adds zeros before the first time
    step, so that no output depends on later inputs.

    The child `conv` has the same settings as in NeMo. It is only called if a caller has altered it (see
    `must_be_called`). Otherwise, only its weights are used. The child `activation` does nothing unless a caller
    replaces it.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: number of taps.
        stride: time steps between outputs.
        dilation: time steps between taps.
        causal: whether the convolution is causal instead of symmetric.
        pad_mode: "reflect", "zeros" or "replicate"; ignored by causal convolutions.
        weight_norm: whether the convolution has weight norm.

    Attributes:
        pad: numbers of time steps that are added before and after the signal.
        stride: time steps between outputs.
        span: receptive field of an output, in time steps: (kernel_size - 1) * dilation + 1.

    Raises:
        ConfigError: for an unknown `pad_mode`, or if `span` is even in a symmetric convolution with stride 1.
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
        span = (kernel_size - 1) * dilation + 1
        if causal:
            self.pad = (span - stride, 0)
        elif stride == 1 and span % 2 == 0:
            raise ConfigError(f"the kernel size {kernel_size} is even; use an odd one, or a causal network.")
        elif stride > 1:
            self.pad = ((span - stride + 1) // 2,) * 2
        else:
            self.pad = ((span - 1) // 2,) * 2
        # These settings are stored here, because a caller may replace `conv` with a module that does not have them.
        self.stride, self.span, self.causal = stride, span, causal
        self._pad_mode = "constant" if causal else PAD_MODES[pad_mode]
        conv = nn.Conv1d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=0 if causal else self.pad[0],
            dilation=dilation,
            padding_mode=pad_mode,  # type: ignore[arg-type]
            dtype=torch.float32,
        )
        self.conv = add_weight_norm(conv) if weight_norm else conv
        self.activation = nn.Identity()

    @property
    def pad_mode(self) -> str:
        """PyTorch's name of the padding mode: "reflect", "constant" (zeros) or "replicate"."""
        conv = self._modules["conv"]
        if self.causal or not isinstance(conv, nn.Conv1d):
            return self._pad_mode
        return PAD_MODES.get(conv.padding_mode, conv.padding_mode)

    @pad_mode.setter
    def pad_mode(self, mode: str) -> None:
        self._pad_mode = mode
        if not self.causal and isinstance(self.conv, nn.Conv1d):
            setattr(self.conv, "padding_mode", "zeros" if mode == "constant" else mode)  # noqa: B010 mypy expects a literal

    @property
    def is_consistent(self) -> bool:
        """Whether the settings of `conv` still match the settings of this layer; a caller may have changed `conv`."""
        conv = self.conv
        if not isinstance(conv, nn.Conv1d):
            return True  # the caller has replaced `conv`, and this layer calls the new module
        span = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1
        settings = conv.stride[0], span, conv.groups
        padding = (0,) if self.causal else self.pad[:1]
        is_padded = conv.padding == padding or conv.padding == "same"
        return settings == (self.stride, self.span, 1) and is_padded and self.pad_mode in PAD_MODES.values()

    @property
    def min_length(self) -> int:
        """Length of the shortest valid input. Reflection needs an input that is longer than the padding."""
        return max(self.pad) + 1 if self.pad_mode == "reflect" else 1

    def pad_ends(self, hidden: torch.Tensor, first: bool = True, last: bool = True) -> torch.Tensor:
        """Pad a signal [B, H, T] for `convolve`: at the start if `first` is set, at the end if `last` is set."""
        return pad_signal(hidden, (self.pad[0] * first, self.pad[1] * last), self.pad_mode)

    def convolve(self, padded: torch.Tensor) -> torch.Tensor:
        """Convolve without padding: [B, H_in, T] -> [B, H_out, (T - span) // stride + 1]."""
        conv = self.conv
        return convolve(padded, conv.weight, conv.bias, conv.stride[0], conv.dilation[0])

    def forward(self, inputs: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Pad and convolve: [B, H_in, T] -> [B, H_out, T // stride].

        As in NeMo, outputs after the first `input_len` [B] time steps are set to zero.
        """
        if _must_be_called(self):
            result = self.conv(self.pad_ends(inputs) if self.causal else inputs)
        elif self.pad_mode == "constant" and self.pad[0] == self.pad[1]:
            conv = self.conv
            result = convolve(inputs, conv.weight, conv.bias, conv.stride[0], conv.dilation[0], self.pad[0])
        else:
            result = self.convolve(self.pad_ends(inputs))
        return mask(self.activation(result), input_len)


class ConvTranspose1d(nn.Module):
    """Transposed convolution that multiplies the length of a signal by `stride`.

    The kernel size is 2 * stride, so there are `stride` more outputs than needed. A symmetric layer removes half of
    the extra outputs at each end (if `stride` is odd, one more at the start than at the end). A causal layer removes
    all extra outputs at the end.

    The child `conv` has the same settings as in NeMo: `conv` itself removes the extra outputs of a symmetric layer. If
    the stride is 1, the layer removes them instead, because PyTorch refuses NeMo's settings for this stride. See
    `Conv1d` for the cases in which `conv` is called, and for the child `activation`.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        stride: outputs per input.
        groups: number of groups.
        causal: whether the layer is causal instead of symmetric.
        weight_norm: whether the convolution has weight norm.

    Attributes:
        stride: outputs per input.
        first_sample: number of outputs that are removed at the start.
        cut: `padding` and `output_padding` of `conv`; (0, 0) if the layer removes the extra outputs.
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
        self.cut = (0, 0) if causal or stride == 1 else (self.first_sample, stride % 2)
        conv = nn.ConvTranspose1d(
            in_channels,
            out_channels,
            2 * stride,
            stride,
            padding=self.cut[0],
            output_padding=self.cut[1],
            groups=groups,
            dtype=torch.float32,
        )
        self.conv = add_weight_norm(conv) if weight_norm else conv
        self.activation = nn.Identity()

    @property
    def is_consistent(self) -> bool:
        """Whether the settings of `conv` still match the settings of this layer; a caller may have changed `conv`."""
        conv = self.conv
        if not isinstance(conv, nn.ConvTranspose1d):
            return True
        settings = conv.kernel_size[0], conv.stride[0], conv.dilation[0], (*conv.padding, *conv.output_padding)
        return settings == (2 * self.stride, self.stride, 1, self.cut) and conv.padding_mode == "zeros"

    def overlap(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return only the outputs that depend on two inputs: [B, H_in, T] -> [B, H_out, (T - 1) * stride].

        Outputs t * stride to (t + 1) * stride - 1 depend on inputs t and t + 1.
        """
        conv = self.conv
        stride, groups = conv.stride[0], conv.groups
        if torch.compiler.is_exporting():
            return F.conv_transpose1d(hidden, conv.weight, conv.bias, stride=stride, groups=groups)[
                ..., stride:-stride
            ]
        assert conv.bias is not None
        if groups == 1 and torch.is_grad_enabled() and _outweighs(conv.weight, hidden) >= 4:
            # One matrix product, without copies of the weights. The convolution below would copy the weights and
            # their gradients four times.
            taps = torch.unflatten(hidden.transpose(1, 2) @ conv.weight.flatten(1), 2, (-1, 2, stride))
            full = taps[:, 1:, :, 0] + taps[:, :-1, :, 1]  # [B, T - 1, H_out, stride]
            samples = full.permute(0, 1, 3, 2).flatten(1, 2).transpose(1, 2)  # [B, H_out, (T - 1) * stride]
            result: torch.Tensor = samples + conv.bias[:, None]
            return result
        if groups == 1:
            phases = convolve(hidden, _phase_weight(conv.weight, stride), None)
            return interleave(phases, stride) + conv.bias[:, None]
        full = F.conv_transpose1d(hidden.contiguous(), conv.weight, conv.bias, stride=stride, groups=groups)
        return channels_last(full[..., stride:-stride])

    def forward(self, inputs: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Up-sample: [B, H_in, T] -> [B, H_out, T * stride]; see `Conv1d.forward` for `input_len`."""
        stride, length = self.stride, inputs.shape[-1]
        if _must_be_called(self):
            result = self.conv(inputs)
            if not self.cut[0]:  # `conv` has not removed the extra outputs
                result = result[..., self.first_sample : result.shape[-1] - stride + self.first_sample]
        else:
            full = self.overlap(F.pad(inputs, (1, 1)))  # [B, H_out, (T + 1) * stride]
            result = full[..., self.first_sample : self.first_sample + length * stride]
        return mask(self.activation(result), input_len)


def _must_be_called(layer: Conv1d | ConvTranspose1d) -> bool:
    """Return whether a caller has altered the child `conv` or its settings, so that `conv` must be called."""
    kind = nn.Conv1d if isinstance(layer, Conv1d) else nn.ConvTranspose1d
    return must_be_called(layer.conv, kind) or not layer.is_consistent


def fold(layer: Conv1d | ConvTranspose1d) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a layer's weight, with weight norm folded, and its bias, both detached and contiguous.

    A transposed layer without groups is converted to an ordinary convolution with two taps. The input of the ordinary
    convolution must be padded with one zero at each end. `interleave` turns the output channels into time steps.

    Returns:
        Weight [H_out, H_in, K], and bias [H_out] or None. For a converted layer, the shapes are
        [stride * H_out, H_in, 2] and [stride * H_out]. A grouped transposed layer keeps PyTorch's shapes.
    """
    weight, bias = current_value(layer.conv, "weight"), current_value(layer.conv, "bias")
    bias = None if bias is None else contiguous_values(bias)
    if isinstance(layer, Conv1d) or layer.conv.groups > 1:
        return contiguous_values(weight), bias
    stride = layer.conv.stride[0]
    return _phase_weight(weight.detach(), stride), None if bias is None else bias.repeat(stride)


def _phase_weight(weight: torch.Tensor, stride: int) -> torch.Tensor:
    """Convert the weight of a transposed convolution to that of an ordinary convolution with two taps.

    Each of the `stride` outputs per input is a phase; the phases become output channels.

    Args:
        weight: [H_in, H_out, 2 * stride].
        stride: stride of the transposed convolution.

    Returns:
        [stride * H_out, H_in, 2].
    """
    taps = torch.unflatten(weight, 2, (2, stride)).flip(2)  # [H_in, H_out, 2, stride]
    return taps.permute(3, 1, 0, 2).flatten(0, 1).contiguous()


def interleave(phases: torch.Tensor, stride: int) -> torch.Tensor:
    """Interleave phases in time: [B, stride * H, T] -> [B, H, T * stride].

    If channels are innermost in memory, this needs no copy.
    """
    return torch.unflatten(phases, 1, (stride, -1)).permute(0, 3, 1, 2).flatten(1, 2).transpose(1, 2)
