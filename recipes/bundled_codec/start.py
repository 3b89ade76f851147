"""Initialize the weights as a filter bank, so that the tokens carry the phase of the signal.

**Motivation.** At 21.5 frames/s, a decoder that knows only the pitch cannot place the pitch periods, because the phase
of a harmonic is the integral of its frequency from the start of the recording. With spectral losses, an encoder does
not learn to transmit this phase within thousands of updates. With a waveform loss and random initial weights, the
output converges to zero. With the weights from this module, the network transmits a waveform before the first update,
and the losses only have to preserve it.

**Linear network.** The channels form mirrored pairs [u, -u] (Balduzzi et al., arXiv 1702.08591). For a leaky ReLU f
with slope s, f(u) - f(-u) = (1 + s) u. A convolution with the weights [w, -w] / (1 + s) for a pair of input channels
therefore computes the linear map w of u. Weights [w; -w] for a pair of output channels make the output a mirrored pair
again. The last weights in residual branches are zero, so the branches have no effect. During training, this
linear network becomes nonlinear.

**Filter bank.** With D encoded dimensions at frame rate F, the network can transmit D real coefficients per frame.
These suffice for a bandwidth of B = D F / 2, which is 344.5 Hz for D = 32 and F = 21.5 Hz. A stage with stride R and
output rate f applies one of two operations to the channels that carry the signal (signal channels):

- If one channel suffices for the bandwidth (B <= f / 2), the stage decimates. Its low-pass filter is a Hann window of
  2 R samples.
- Otherwise the stage expands n channels to n P channels, P <= R, by an MDCT with stride R. Its basis consists of P
  functions with 2 R samples,

      b_k(t) = sqrt(2 / R) sin(pi (t + 1/2) / 2R) cos(pi / R (t + 1/2 + R/2) (k + 1/2)),  k < P,

  and is orthonormal with overlap R (Princen and Bradley 1986). The MDCT is lossless if P = R. If P < R, it keeps the
  lowest P / R of the bandwidth.

The decoder uses the transposed windows and bases: the inverse of an orthonormal transform is its transpose. The
other channels contain random features of the signal, which the output layer initially ignores.

**Scales.** On a batch of speech, each encoded dimension is centered and scaled to a standard deviation of 0.9, a range
that the FSQ levels cover. The first layer of the decoder divides by this scale. The output is multiplied by a gain
that is fitted to the input by least squares.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from nemo_lfr.modules.residual import ResidualBlock
from recipes.bundled_codec.model import SAMPLE_RATE, Generator

LEAKY_SLOPE = 0.01
ENCODED_STD = 0.9
MIRROR = 1 / (1 + LEAKY_SLOPE)


def mdct_basis(stride: int) -> torch.Tensor:
    """Return the basis of a windowed MDCT, which is orthonormal with an overlap of `stride`.

    Args:
        stride: number of basis functions, which is also the hop in samples.

    Returns:
        Basis functions, float32, shape [stride, 2 * stride].
    """
    sample = torch.arange(2 * stride, dtype=torch.float64)[None]
    band = torch.arange(stride, dtype=torch.float64)[:, None]
    window = torch.sin(math.pi * (sample + 0.5) / (2 * stride))
    phase = math.pi / stride * (sample + 0.5 + stride / 2) * (band + 0.5)
    return (math.sqrt(2 / stride) * window * torch.cos(phase)).float()


def signal_channels(rates: Sequence[int], encoded_dim: int, sample_rate: int = SAMPLE_RATE) -> list[int]:
    """Return the number of channels that carry the signal after each stage of the encoder.

    Args:
        rates: strides of the encoder's stages.
        encoded_dim: number of encoded dimensions.
        sample_rate: sample rate of the audio in Hz.

    Returns:
        A list that begins with 1, for the audio, and continues with one number for each stage.

    Raises:
        ValueError: if the last number would not be `encoded_dim`, or if a number would not be a multiple of the number
            before it.
    """
    bandwidth = encoded_dim * sample_rate / math.prod(rates) / 2
    channels, rate = [1], float(sample_rate)
    for stride in rates:
        rate /= stride
        needed = max(1, math.ceil(bandwidth / (rate / 2) - 1e-6))
        channels.append(min(needed, channels[-1] * stride))
    if channels[-1] != encoded_dim or any(after % before for before, after in pairwise(channels)):
        raise ValueError(
            f"strides {list(rates)} give the numbers of signal channels {channels}; choose strides that make the last "
            f"of these numbers {encoded_dim}, and each number a multiple of the one before it."
        )
    return channels


def stage_filters(stride: int, before: int, after: int) -> torch.Tensor:
    """Return the filters of an encoder stage.

    They are low-pass filters if the number of signal channels stays the same. Otherwise, they split each input channel
    into its lowest `after // before` MDCT bands.

    Args:
        stride: stride of the stage.
        before: number of signal channels at the input of the stage.
        after: number of signal channels at the output of the stage.

    Returns:
        Filters, shape [after, before, 2 * stride].
    """
    filters = torch.zeros(after, before, 2 * stride)
    if before == after:
        window = torch.hann_window(2 * stride, periodic=False)
        filters[range(after), range(before)] = 2 * window / window.sum()
        return filters
    bands = after // before
    for channel in range(before):
        filters[channel * bands : (channel + 1) * bands, channel] = mdct_basis(stride)[:bands]
    return filters


def inverse_filters(stride: int, before: int, after: int) -> torch.Tensor:
    """Return the filters of a decoder stage.

    They interpolate if the number of signal channels stays the same. Otherwise, they compute an inverse MDCT.

    Args:
        stride: stride of the stage.
        before: number of signal channels at the input of the stage.
        after: number of signal channels at the output of the stage.

    Returns:
        Filters, shape [after, before, 2 * stride].
    """
    filters = torch.zeros(after, before, 2 * stride)
    if before == after:
        filters[range(after), range(before)] = torch.hann_window(2 * stride, periodic=False)
        return filters
    bands = before // after
    for channel in range(after):
        filters[channel, channel * bands : (channel + 1) * bands] = mdct_basis(stride)[:bands]
    return filters


@torch.no_grad()
def looks_linear_(generator: Generator) -> None:
    """Make a generator linear, in place.

    Channels form mirrored pairs (see the module's docstring), filters are random and orthogonal, and the output of
    residual branches is zero.

    Args:
        generator: generator with leaky ReLUs and without weight norm.
    """
    encoder, decoder = generator.audio_encoder, generator.audio_decoder
    for first, stages, last in (
        (encoder.pre_conv, encoder.down_sample_conv_layers, encoder.post_conv),
        (decoder.pre_conv, decoder.up_sample_conv_layers, decoder.post_conv),
    ):
        _fill_orthogonal(first.conv, mirror_in=False)
        for stage in stages:
            _fill_orthogonal(_convolution(stage))
        _fill_orthogonal(last.conv, mirror_out=False)
    for block in generator.modules():
        if isinstance(block, ResidualBlock):
            _convolution(block.skip_conv).weight.zero_()
            for layer in (block.input_conv, block.skip_conv):
                _zero_bias(_convolution(layer))


@torch.no_grad()
def transform_start_(generator: Generator, audio: torch.Tensor) -> float:
    """Initialize a generator as a filter bank and its inverse, in place.

    Args:
        generator: generator with leaky ReLUs and without weight norm.
        audio: batch of speech in complete frames, shape [B, T_audio].

    Returns:
        The SNR of the network's output for `audio`, in dB.

    Raises:
        ValueError: if the network has too few channels or other strides than the filter bank needs.
    """
    encoder, decoder = generator.audio_encoder, generator.audio_decoder
    encoded_dim = encoder.encoded_dim
    channels = signal_channels(encoder.down_sample_rates, encoded_dim)
    if decoder.up_sample_rates != encoder.down_sample_rates[::-1]:
        raise ValueError(
            f"up_sample_rates are {list(decoder.up_sample_rates)}; pass the reversed rates of the encoder, "
            f"{list(encoder.down_sample_rates[::-1])}."
        )
    looks_linear_(generator)

    _put(encoder.pre_conv.conv, _identity(1, encoder.pre_conv.conv.kernel_size[0]), mirror_in=False)
    stages = zip(encoder.down_sample_conv_layers, encoder.down_sample_rates, channels, channels[1:], strict=False)
    for stage, stride, before, after in stages:
        _put(_convolution(stage), stage_filters(stride, before, after))
    _put(encoder.post_conv.conv, _identity(encoded_dim, encoder.post_conv.conv.kernel_size[0]), mirror_out=False)

    _put(decoder.pre_conv.conv, _identity(encoded_dim, decoder.pre_conv.conv.kernel_size[0]), mirror_in=False)
    channels.reverse()
    stages = zip(decoder.up_sample_conv_layers, decoder.up_sample_rates, channels, channels[1:], strict=False)
    for stage, stride, before, after in stages:
        _put(_convolution(stage), inverse_filters(stride, before, after))
    output = decoder.post_conv.conv
    output.weight.zero_()  # so that the output layer reads only the signal channels
    _put(output, _identity(1, output.kernel_size[0]), mirror_out=False)

    _normalize_encoded(generator, audio)
    codes, _ = generator.vector_quantizer(encoder.encode_frames(audio))
    decoded = decoder.decode_frames(codes)
    output.weight.mul_((decoded * audio).sum() / decoded.square().sum().clamp_min(1e-9))
    error = (decoder.decode_frames(codes) - audio).square().sum() / audio.square().sum()
    return -10 * math.log10(error.item())


def _normalize_encoded(generator: Generator, audio: torch.Tensor) -> None:
    """Change the encoder so that each dimension of its output has mean 0 and standard deviation `ENCODED_STD`.

    The mean and the standard deviation are measured on `audio`. The decoder is changed to undo the scaling.
    """
    encoder, decoder = generator.audio_encoder, generator.audio_decoder
    encoded = encoder.encode_frames(audio)
    mean, scale = encoded.mean(dim=(0, 2)), ENCODED_STD / encoded.std(dim=(0, 2)).clamp_min(1e-6)
    last, first = encoder.post_conv.conv, decoder.pre_conv.conv
    last.weight.mul_(scale[:, None, None])
    assert last.bias is not None
    last.bias.copy_(-mean * scale)
    half = first.weight.shape[0] // 2
    for row in (0, half):
        first.weight[row : row + encoder.encoded_dim].div_(scale[None, :, None])


def _identity(channels: int, kernel_size: int) -> torch.Tensor:
    """Return identity filters [channels, channels, kernel_size]."""
    filters = torch.zeros(channels, channels, kernel_size)
    filters[..., kernel_size // 2] = torch.eye(channels)
    return filters


def _convolution(layer: nn.Module) -> nn.Conv1d | nn.ConvTranspose1d:
    """Return the PyTorch convolution inside a layer of the codec."""
    conv = layer.conv
    assert isinstance(conv, nn.Conv1d | nn.ConvTranspose1d)
    return conv


def _out_in_taps(conv: nn.Conv1d | nn.ConvTranspose1d) -> torch.Tensor:
    """Return a view of the weight as [H_out, H_in, K]."""
    return conv.weight.transpose(0, 1) if isinstance(conv, nn.ConvTranspose1d) else conv.weight


def _fill_orthogonal(conv: nn.Conv1d | nn.ConvTranspose1d, *, mirror_in: bool = True, mirror_out: bool = True) -> None:
    """Fill a layer with random orthogonal filters, and set the bias to zero.

    Args:
        conv: the layer.
        mirror_in: whether the second half of the input channels is the negative of the first half. Both halves then
            have the same filters with opposite signs.
        mirror_out: whether to make the second half of the output channels the negative of the first half.
    """
    weight = _out_in_taps(conv)
    num_out, num_in = weight.shape[0] // (1 + mirror_out), weight.shape[1] // (1 + mirror_in)
    filters = torch.empty(num_out, num_in * weight.shape[2])
    nn.init.orthogonal_(filters)
    filters = filters.view(num_out, num_in, -1)
    if mirror_in:
        filters = torch.cat([filters, -filters], dim=1) * MIRROR
    if mirror_out:
        filters = torch.cat([filters, -filters], dim=0)
    weight.copy_(filters)
    _zero_bias(conv)


def _zero_bias(conv: nn.Conv1d | nn.ConvTranspose1d) -> None:
    assert conv.bias is not None
    conv.bias.zero_()


def _put(
    conv: nn.Conv1d | nn.ConvTranspose1d, filters: torch.Tensor, *, mirror_in: bool = True, mirror_out: bool = True
) -> None:
    """Set the filters of a layer, in place, for its signal channels and their mirror images.

    The output channels of these filters get zero weights for all other input channels.

    Args:
        conv: layer to change.
        filters: filters, shape [n_out, n_in, K].
        mirror_in: whether the input contains a mirror image (-u) of each signal channel u.
        mirror_out: whether the output contains a mirror image of each signal channel.

    Raises:
        ValueError: if the layer has too few channels.
    """
    weight = _out_in_taps(conv)
    num_out, num_in, _ = filters.shape
    half_out, half_in = weight.shape[0] // (1 + mirror_out), weight.shape[1] // (1 + mirror_in)
    if num_out > half_out or num_in > half_in:
        raise ValueError(
            f"a layer with {weight.shape[1]} input and {weight.shape[0]} output channels is too small for {num_in} "
            f"and {num_out} signal channels and their mirror images; increase base_channels."
        )
    out_signs = ((1, 0), (-1, half_out)) if mirror_out else ((1, 0),)
    in_signs = ((MIRROR, 0), (-MIRROR, half_in)) if mirror_in else ((1.0, 0),)
    for out_sign, row in out_signs:
        weight[row : row + num_out] = 0
        for in_sign, column in in_signs:
            weight[row : row + num_out, column : column + num_in] = out_sign * in_sign * filters
