"""Tests that packed CPU weights give the results of the layers, and are never outdated."""

import copy as copying
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrizations import weight_norm

from nemo_lfr.codec import torch_backend
from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.cpu import network as inference
from nemo_lfr.codec.cpu import packed as plan
from nemo_lfr.codec.cpu.packed import ModuleWeights, PackedWeights, weights_of
from nemo_lfr.codec.cpu.winograd import slack
from nemo_lfr.codec.cuda.folded import Activation, Layer, Precision
from nemo_lfr.codec.torch_backend import TorchBackend
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.modules.activation import CodecActivation
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d
from tests.models import build_codec, cached_codec, same_parts, speech_like
from tests.tiers import slow_after, slow_except

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
needs_bf16 = pytest.mark.skipif(not plan.has_bf16(), reason="this CPU has no bf16 instructions")
WIDE = {"audio_encoder": {"base_channels": 32}, "audio_decoder": {"base_channels": 256}}


class Two(torch.nn.Module):
    """Smallest module whose weights can be packed."""

    def __init__(self, *layers: Conv1d) -> None:
        super().__init__()
        self.pre_conv, self.post_conv = Conv1d(1, 4, 3), Conv1d(4, 1, 3)
        self.layers = torch.nn.ModuleList(layers)


def in_memory(batch: int, channels: int, width: int) -> torch.Tensor:
    """Return noise [B, H, T] with the channels innermost in memory, followed by more rows."""
    rows = torch.randn(batch * width + slack(5), channels)
    return rows[: batch * width].view(batch, width, channels).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dilation", [1, 3, 5])
@pytest.mark.parametrize("kernel_size", [3, 5, 7, 11])
def test_winograd_equals_direct_convolution(kernel_size, dilation, batch):
    torch.manual_seed(0)
    layer = Conv1d(40, 48, kernel_size, dilation=dilation)
    padded = in_memory(batch, 40, 1301)
    (found,) = PackedWeights(Two(layer), torch.float32).winograd([layer], padded, [0])
    expected = F.conv1d(padded.double(), layer.conv.weight.double(), layer.conv.bias.double(), dilation=dilation)
    assert found.shape == expected.shape
    # Rounding errors of 2^-24 in sums of a few hundred terms, times 4 for the Winograd transforms.
    assert (found - expected).abs().max() < 2e-5 * expected.std()


@torch.no_grad()
def test_layers_that_share_an_input_start_at_their_own_offsets():
    torch.manual_seed(0)
    layers = [Conv1d(40, 40, size) for size in (3, 5, 7, 9, 11)]
    padded, starts = in_memory(2, 40, 700), [4, 3, 2, 1, 0]
    found = PackedWeights(Two(*layers), torch.float32).winograd(layers, padded, starts)
    for layer, start, result in zip(layers, starts, found, strict=True):
        expected = layer.convolve(padded[:, :, start:])
        assert result.shape == expected.shape
        assert (result - expected).abs().max() < 2e-5 * expected.std()


@torch.no_grad()
@pytest.mark.parametrize("piece", slow_except([inference.PIECE, 1], inference.PIECE))
@pytest.mark.parametrize("kind", slow_except(["symmetric", "causal", "nano"], "nano"))
def test_packed_weights_equal_modules(kind, piece, monkeypatch):
    monkeypatch.setattr(plan, "WINOGRAD_MIN_PRODUCTS", 1)
    monkeypatch.setattr(inference, "PIECE", piece)
    codec = cached_codec(kind)
    lengths = [20, 33, 31]
    audio, least = speech_like(3 * 33 * 1024).reshape(3, -1), 1e-5
    found = inference.encode_frames(codec.encoder, audio, lengths)
    inputs = codec.quantizer.decode(codec.quantizer.encode(found))
    heard = inference.decode_frames(codec.decoder, inputs, lengths)
    for row, length in enumerate(lengths):
        alone = codec.encoder.encode_frames(audio[row : row + 1, : length * 1024])[0]
        assert (found[row, :, :length] - alone).abs().max() < 2 * least * (1 + alone.abs().max())
        alone = codec.decoder.decode_frames(inputs[row : row + 1, :, :length])[0]
        assert (heard[row, : length * 1024] - alone).abs().max() < least


def step(part):
    optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
    for parameter in part.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def load(part):
    part.load_state_dict({key: value * 1.1 for key, value in part.state_dict().items()})


def assign(part):
    part.load_state_dict({key: value * 1.1 for key, value in part.state_dict().items()}, assign=True)


@torch.no_grad()
def copy(part):
    for parameter in part.parameters():
        parameter.copy_(parameter * 1.1)


def through_data(part):
    for parameter in part.parameters():
        parameter.data.mul_(1.1)


def round_to_half(part):
    part.half().float()


@pytest.mark.slow
@pytest.mark.parametrize("change", slow_after(2, [step, load, assign, copy, through_data, round_to_half]))
def test_outdated_packed_weights_are_never_used(change):
    codec = build_codec()
    audio = speech_like(20 * 1024)[None]
    for part, run, reference in (
        (codec.encoder, inference.encode_frames, codec.encoder.encode_frames),
        (codec.decoder, inference.decode_frames, codec.decoder.decode_frames),
    ):
        inputs = audio if part is codec.encoder else codec.quantizer.decode(torch.zeros(8, 1, 20, dtype=torch.long))
        before = run(part, inputs)
        old = weights_of(part, torch.float32)
        assert weights_of(part, torch.float32) is old
        part.requires_grad_(True)
        change(part)
        part.requires_grad_(False)
        assert weights_of(part, torch.float32) is not old
        after, expected = run(part, inputs), reference(inputs)
        assert (after - expected).abs().max() < 1e-5 * (1 + expected.abs().max())
        assert not torch.equal(after, before)


LAYOUTS = {
    "column": lambda value: torch.stack([value, torch.full_like(value, 7.0)], -1)[..., 0],
    "row": lambda value: F.pad(value, (1, 2), value=7.0).narrow(-1, 1, value.shape[-1]),
    "inner": lambda value: F.pad(value.flatten(), (3, 5), value=7.0)[3:-5].view(value.shape),
    "outputs innermost": lambda value: value.movedim(0, -1).contiguous().movedim(-1, 0),
    "negated": lambda value: torch.complex(torch.zeros_like(value), -value).conj().imag,
    "expanded": lambda value: value.flatten()[:1].expand(value.shape),
}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("layout", slow_after(1, LAYOUTS))
@pytest.mark.parametrize("kind", slow_after(1, ["symmetric", "causal", "nano"]))
def test_parameters_may_be_views_of_other_tensors(kind, layout):
    """Kernels that read weights by pointer must use a parameter's values, whatever its strides and offset are."""
    codec = build_codec(kind)
    if kind == "symmetric":
        for layer in [*codec.encoder.modules(), *codec.decoder.modules()]:
            if isinstance(layer, Conv1d | ConvTranspose1d):
                weight_norm(layer.conv)
    same = copying.deepcopy(codec)
    for part, plain in ((codec.encoder, same.encoder), (codec.decoder, same.decoder)):
        state = {key: LAYOUTS[layout](value) for key, value in plain.state_dict().items()}
        assert layout == "inner" or any(not value.is_contiguous() for value in state.values())
        plain.load_state_dict(state)
        part.load_state_dict(state, assign=True)
        assert all(value.is_contiguous() for value in plain.state_dict().values())
    clip = speech_like(9 * codec.samples_per_frame)
    tokens, expected = codec.encode(clip)[0], same.encode(clip)[0]
    assert torch.equal(tokens, expected)
    assert torch.equal(codec.decode(tokens)[0], same.decode(tokens)[0])
    assert codec.fingerprint == same.fingerprint
    streams = codec.stream_encoder(), codec.stream_decoder()
    pushed = np.concatenate([streams[0].push(clip.numpy()), streams[0].flush()], 1)
    assert np.array_equal(pushed, expected[0].numpy())
    audio = np.concatenate([streams[1].push(pushed), streams[1].flush()])
    assert np.abs(audio - same.decode(tokens)[0][0].numpy()).max() < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folded_layers_for_cuda_are_contiguous(layout):
    """Triton's kernels read biases and alphas by pointer."""
    torch.manual_seed(0)
    for layer in (Conv1d(4, 6, 3), ConvTranspose1d(4, 2, stride=2), ConvTranspose1d(4, 2, stride=2, groups=2)):
        layer.conv.bias = torch.nn.Parameter(LAYOUTS[layout](layer.conv.bias.detach()))
        bias = Layer.of(layer, Precision(torch.float32)).bias
        assert bias.is_contiguous() and torch.equal(bias, layer.conv.bias.repeat(len(bias) // len(layer.conv.bias)))
    for kind in ("snake", "half_snake"):
        activation = CodecActivation(kind, 8)
        snake = activation.activation if kind == "snake" else activation.activation.snake_act
        snake.alpha = torch.nn.Parameter(LAYOUTS[layout](torch.rand_like(snake.alpha)))
        alpha = Activation.of(activation).alpha
        assert alpha.is_contiguous() and torch.equal(alpha, snake.alpha.flatten())


@pytest.mark.slow
def test_training_and_deletion_free_packed_weights():
    codec = build_codec()
    assert isinstance(weights_of(codec.encoder, torch.float32), PackedWeights)
    assert isinstance(weights_of(codec.encoder.train(), torch.float32), ModuleWeights)
    kept = weakref.ref(weights_of(codec.encoder.eval(), torch.float32))
    assert kept() is not None
    del codec
    gc.collect()
    assert kept() is None


@pytest.mark.slow
@needs_bf16
def test_bf16_is_near_fp32(recwarn):
    parts = build_codec("symmetric", **WIDE)
    codec = Codec(TorchBackend(parts.encoder, parts.quantizer, parts.decoder, parts.sample_rate, precision="bf16"))
    tokens, _ = parts.encode(speech_like(30_000))
    clean, found = parts.decode(tokens)[0], codec.decode(tokens)[0]
    assert found.dtype == torch.float32 and not torch.equal(found, clean)
    # An 8-bit mantissa gives an SNR of 30 to 40 dB through a hundred layers.
    assert 10 * torch.log10(clean.square().sum() / (found - clean).square().sum()) > 25
    assert (codec.encode(speech_like(30_000))[0] == tokens).float().mean() > 0.3
    assert not [warning for warning in recwarn if "bf16" in str(warning.message)]


@needs_bf16
@torch.no_grad()
def test_inaccurate_bf16_shape_warns_once_and_runs_in_fp32(monkeypatch):
    layer = Conv1d(48, 48, 7)
    convolve = plan._convolve
    monkeypatch.setattr(plan, "_convolve", lambda padded, way: convolve(padded, way) * 2)
    own = PackedWeights(Two(layer), torch.bfloat16)
    padded = torch.randn(1, 48, 200).bfloat16()
    with pytest.warns(UserWarning, match="inaccurate in bf16") as caught:
        found = [own.convolve(layer, padded) for _ in range(2)]
    assert len(caught) == 1
    for result in found:
        assert (result.float() - layer.convolve(padded.float())).abs().max() < 0.05


def test_bf16_raises_without_cpu_support(monkeypatch):
    monkeypatch.setattr("nemo_lfr.codec.torch_backend.has_bf16", lambda: False)
    parts = cached_codec("symmetric")
    with pytest.raises(NemoLfrError, match="AVX512-bf16"):
        Codec(TorchBackend(parts.encoder, parts.quantizer, parts.decoder, parts.sample_rate, precision="bf16"))


def test_fp16_on_a_cpu_is_warned_about_once(caplog):
    torch_backend._warn_about_fp16.cache_clear()
    for precision in ("fp32", "fp16", "fp16"):
        same_parts(cached_codec("symmetric"), precision=precision)
    assert [record.message.partition(".")[0] for record in caplog.records] == ['precision "fp16" is for GPUs']
