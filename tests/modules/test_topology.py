"""Tests that a stage that a subclass adds to the network runs on every backend, because all use the same `run`."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import nemo_lfr
from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.cpu import network as inference
from nemo_lfr.codec.cuda.plan import PRECISIONS, Plan
from nemo_lfr.codec.torch_backend import TorchBackend
from nemo_lfr.errors import ConfigError
from nemo_lfr.modules.activation import CodecActivation
from nemo_lfr.modules.conv import Conv1d
from nemo_lfr.modules.decoder import HiFiGANDecoder
from nemo_lfr.modules.encoder import HiFiGANEncoder
from nemo_lfr.modules.quantizer import GroupFiniteScalarQuantizer
from nemo_lfr.modules.residual import ResidualLayer
from nemo_lfr.testing import TWO_STAGES, codec_config, random_parts
from nemo_lfr.training.initialize import initialize_from_data
from tests.models import RATE, speech_like, synthesize
from tests.reference import assert_same_tokens, changed_frames

SMALL = {"resblock_kernel_sizes": (3, 7), "resblock_dilation_sizes": (1, 2)}
FRAME = 15


class Stage(torch.nn.Module):
    """Container of a user, without a forward method."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer


class SmallLayer(ResidualLayer):
    """Layer with a constructor of its own."""

    def __init__(self, causal: bool) -> None:
        super().__init__(8, (3, 5), (1,), "snake", causal, "reflect", True)


class DeeperEncoder(HiFiGANEncoder):
    """Encoder with a filter before the first layer, and a residual stage after the last one."""

    def __init__(self, *, causal: bool = False) -> None:
        super().__init__(8, (3, 5), 4, **SMALL, causal=causal)
        self.filter = Stage(Conv1d(1, 1, 5, causal=causal))
        self.refine = SmallLayer(causal)

    def run(self, ops, audio):
        return ops.residual(self.refine, super().run(ops, ops.conv(self.filter.layer, audio)))


class DeeperDecoder(HiFiGANDecoder):
    """Decoder with a mixing layer before the first layer, and a filter after the last one."""

    def __init__(self, *, causal: bool = False) -> None:
        super().__init__(8, (5, 3), 16, **SMALL, causal=causal)
        self.mix = Conv1d(8, 8, 3, pad_mode="replicate", causal=causal)
        self.filter = Conv1d(1, 1, 5, causal=causal)
        self.filter_activation = CodecActivation("elu", 1)

    def run(self, ops, dequantized):
        hidden = super().run(ops, ops.conv(self.mix, dequantized))
        return ops.conv(self.filter, hidden, self.filter_activation)


@pytest.fixture(scope="module", params=[False, True], ids=["symmetric", "causal"])
def codec(request):
    torch.manual_seed(3)
    encoder, decoder = DeeperEncoder(causal=request.param), DeeperDecoder(causal=request.param)
    quantizer = GroupFiniteScalarQuantizer(2, [8, 7, 6, 6])
    initialize_from_data(encoder, quantizer, decoder, speech_like(2 * 200 * FRAME).reshape(2, -1))
    for module in (encoder, quantizer, decoder):
        module.eval().requires_grad_(False)
    return Codec(TorchBackend(encoder, quantizer, decoder, RATE))


def codes_of(codec, count: int) -> torch.Tensor:
    """Return dequantized frames [2, D, count]."""
    tokens = torch.randint(codec.codebook_size, (codec.num_codebooks, 2, count))
    return codec.quantizer.decode(tokens)


@pytest.mark.parametrize("causal", [False, True])
def test_context_counts_the_new_stages(causal):
    torch.manual_seed(0)
    encoder, decoder = DeeperEncoder(causal=causal).double(), DeeperDecoder(causal=causal).double()
    for function, inputs, context, items in (
        (lambda x: encoder.encode_frames(x)[0], torch.randn(1, 99 * FRAME).double(), encoder.context, FRAME),
        (decoder.decode_frames, torch.randn(1, 8, 99).double(), decoder.context, 1),
    ):
        changed = changed_frames(function, inputs, 50, items, 99)
        # The bound is of whole frames and may be one too wide.
        assert 50 - context.future <= changed[0] <= 50 - context.future + (not causal)
        assert 50 + context.past - 1 <= changed[-1] <= 50 + context.past
    assert encoder.context.past > HiFiGANEncoder(8, (3, 5), 4, **SMALL, causal=causal).context.past


@pytest.mark.slow
@torch.no_grad()
def test_packed_weights_run_new_stages(codec):
    lengths = [40, 23]
    audio, codes = speech_like(2 * 40 * FRAME).reshape(2, -1), codes_of(codec, 40)
    encoded = inference.encode_frames(codec.encoder, audio, lengths)
    decoded = inference.decode_frames(codec.decoder, codes, lengths)
    for row, length in enumerate(lengths):
        expected = codec.encoder.encode_frames(audio[row : row + 1, : length * FRAME])[0]
        assert (encoded[row, :, :length] - expected).abs().max() < 1e-5 * (1 + expected.abs().max())
        expected = codec.decoder.decode_frames(codes[row : row + 1, :, :length])[0]
        assert (decoded[row, : length * FRAME] - expected).abs().max() < 1e-5


@torch.no_grad()
def test_cuda_plan_runs_new_stages(codec):
    lengths = torch.tensor([40, 23])
    audio, codes = speech_like(2 * 40 * FRAME).reshape(2, -1), codes_of(codec, 40)
    encoded = Plan(codec.encoder, PRECISIONS["fp32"], None)(audio[..., None], lengths)
    decoded = Plan(codec.decoder, PRECISIONS["fp32"], None)(codes.transpose(1, 2), lengths)
    for row, length in enumerate(lengths.tolist()):
        expected = codec.encoder.encode_frames(audio[row : row + 1, : length * FRAME])[0].T
        assert (encoded[row, :length] - expected).abs().max() < 1e-5 * (1 + expected.abs().max())
        expected = codec.decoder.decode_frames(codes[row : row + 1, :, :length])[0]
        assert (decoded[row, : length * FRAME, 0] - expected).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("size", [7, 100, 1999])
def test_streams_and_chunks_run_new_stages(codec, size):
    codec = copy.copy(codec)
    codec.chunk_frames = 30
    wave = synthesize(0.1)
    tokens = codec.encode(wave)[0][0]
    assert_same_tokens(codec, wave, tokens)
    encoder, decoder = codec.stream_encoder(), codec.stream_decoder()
    pieces = [encoder.push(wave[at : at + size]) for at in range(0, len(wave), size)]
    assert_same_tokens(codec, wave, torch.from_numpy(np.concatenate([*pieces, encoder.flush()], axis=1)))
    heard = [decoder.push(tokens[:, at : at + 3].numpy()) for at in range(0, tokens.shape[1], 3)]
    expected = codec.decode(tokens)[0][0].numpy()
    assert np.abs(np.concatenate([*heard, decoder.flush()]) - expected).max() < 1e-5


def test_new_stages_train():
    torch.manual_seed(0)
    encoder, decoder = DeeperEncoder(), DeeperDecoder()
    audio, audio_len = speech_like(2 * 40 * FRAME).reshape(2, -1), torch.tensor([40 * FRAME, 23 * FRAME + 4])
    encoded, encoded_len = encoder(audio, audio_len)
    decoded, decoded_len = decoder(encoded, encoded_len)
    assert encoded_len.tolist() == [40, 24] and decoded_len.tolist() == [40 * FRAME, 24 * FRAME]
    decoded.square().mean().backward()
    for network in (encoder, decoder):
        assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_layer_that_lacks_attributes_is_named(part):
    network = getattr(random_parts(codec_config(**TWO_STAGES)), part)
    network.pre_conv = torch.nn.Sequential(network.pre_conv)
    with pytest.raises(ConfigError, match=r"replaced by .*'Sequential' object has no attribute 'pad'"):
        _ = network.min_frames


def test_only_the_network_knows_the_order_of_its_layers():
    root = Path(nemo_lfr.__file__).parent
    for name, home in (("down_sample_conv_layers", "encoder.py"), ("up_sample_conv_layers", "decoder.py")):
        sources = [*root.rglob("*.py"), *(root.parent / "benchmarks").glob("*.py")]
        assert {path.name for path in sources if name in path.read_text()} == {home}
