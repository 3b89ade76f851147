"""Tests of the fused convolutions against plain PyTorch, on the GPU or else in Triton's interpreter."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA, and is not installed")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's kernels need a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from nemo_lfr.codec.cuda import folded, kernels, plan
from nemo_lfr.codec.cuda.autotuner import Autotuner
from nemo_lfr.codec.cuda.folded import Activation, Layer, Precision
from nemo_lfr.codec.cuda.kernels import Tile
from nemo_lfr.modules.activation import CodecActivation
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d
from tests.models import KINDS, build_codec, cached_codec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tile(32, 16, 16, 4, 2)
LARGE = Tile(128, 64, 64, 4, 2)
FP32 = Precision(torch.float32)
# The interpreter cannot multiply bf16; bf16 kernels differ from fp16 kernels only in the type.
CLOSE = {torch.float32: 2e-6, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def _exact_references():
    """Run cuDNN's fp32 convolutions without TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def _counting_loops(monkeypatch):
    """Patch Triton 3.6's interpreter, whose loop counters need a conversion that NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *rest):
        patch(tensor, *rest)
        setter = rest[0].set_attr if rest else setattr
        setter(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def assert_same(found: torch.Tensor, expected: torch.Tensor, ends: torch.Tensor, close: float) -> None:
    """Compare the valid time steps of two signals [B, T, H]."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    for got, want, end in zip(found, expected, ends.tolist(), strict=True):
        got, want = got[:end].float(), want[:end].float()
        assert (got - want).abs().max() <= close * (1 + want.abs().max())


def random_signal(batch: int, length: int, channels: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, channels, generator=generator).to(dtype).to(DEVICE)


def random_activation(name: str, channels: int) -> Activation | None:
    if name == "none":
        return None
    module = CodecActivation(name, channels)
    for parameter in module.parameters():
        torch.nn.init.uniform_(parameter, 0.2, 3.0)
    return Activation.of(module.to(DEVICE))


ACTIVATIONS = st.sampled_from(["none", "lrelu", "half_snake", "snake"])


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@torch.no_grad()
def test_fused_convolution_equals_separate_operations(data):
    draw = data.draw
    inputs, outputs = draw(st.integers(1, 40), "inputs"), draw(st.integers(1, 20), "outputs")
    stride, dilation = draw(st.sampled_from([(1, 1), (1, 3), (1, 5), (2, 1), (3, 1), (4, 1)]), "stride, dilation")
    taps = 2 * stride if stride > 1 else draw(st.sampled_from([1, 3, 7, 11]), "taps")
    dtype = draw(st.sampled_from(list(CLOSE)), "dtype")
    torch.manual_seed(draw(st.integers(0, 99), "seed"))
    if up := draw(st.sampled_from([0, 0, 2, 3, 5]), "up"):
        module: Conv1d | ConvTranspose1d = ConvTranspose1d(inputs, outputs, stride=up, causal=draw(st.booleans()))
    else:
        module = Conv1d(
            inputs,
            outputs,
            taps,
            stride=stride,
            dilation=dilation,
            causal=draw(st.booleans(), "causal"),
            pad_mode=draw(st.sampled_from(["reflect", "zeros", "replicate"]), "mode"),
        )
    layer = Layer.of(module.to(DEVICE), Precision(dtype))
    step = layer.stride
    least = -(-max(getattr(module, "min_length", 1), 1) // step)
    lengths = draw(st.lists(st.integers(least, least + 37), min_size=1, max_size=3), "lengths")
    ends = torch.tensor(lengths, device=DEVICE) * step
    signal = random_signal(len(lengths), max(lengths) * step, inputs, dtype, 0)
    kept = ends * layer.upsample_stride // step
    others = [random_signal(len(lengths), int(kept.max()), outputs, dtype, seed) for seed in (1, 2)]
    options = {
        "activation": random_activation(draw(ACTIVATIONS, "before"), inputs),
        "after": random_activation(draw(ACTIVATIONS, "after"), outputs),
        "residual": others[0] if draw(st.booleans(), "residual") else None,
        "total": others[1] if draw(st.booleans(), "total") else None,
        "scale": draw(st.sampled_from([1.0, 1 / 3]), "scale"),
    }
    expected = folded.convolution(layer, signal, ends, **options)
    found = kernels.convolution(layer, signal, ends, SMALL, **options)
    assert_same(found, expected, kept, CLOSE[dtype])


@pytest.mark.slow
@torch.no_grad()
def test_values_after_the_valid_length_do_not_matter():
    layer = Layer.of(Conv1d(8, 8, 11, dilation=3).to(DEVICE), FP32)
    signal, ends = random_signal(2, 90, 8, torch.float32, 0), torch.tensor([90, 47], device=DEVICE)
    expected = kernels.convolution(layer, signal, ends, SMALL)
    signal[1, 47:] = float("nan")
    found = kernels.convolution(layer, signal, ends, SMALL)
    assert torch.equal(found[1, :47], expected[1, :47]) and torch.equal(found[0], expected[0])
    alone = kernels.convolution(layer, signal[1:, :47].contiguous(), ends[1:], SMALL)
    assert torch.equal(found[1, :47], alone[0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["reflect", "constant", "replicate"])
def test_pointwise_kernel_equals_separate_operations(dtype, mode):
    signal, ends = random_signal(2, 61, 6, dtype, 0), torch.tensor([61, 40], device=DEVICE)
    activation = random_activation("half_snake", 6)
    bias = random_signal(1, 1, 6, torch.float32, 1).flatten()
    residual, total = (random_signal(2, 61, 6, dtype, seed) for seed in (2, 3))
    sums = (signal.float() + bias + residual.float() + total.float()) * 0.5
    layer = folded.Layer(torch.empty(6, 6, 1, 12), bias, (5, 6), mode)
    # The sum is computed in fp32 and rounded once.
    expected = folded.padded(sums, layer, ends, activation).to(dtype)
    found = kernels.pointwise(
        signal,
        ends,
        pad=layer.pad,
        mode=mode,
        bias=bias,
        residual=residual,
        total=total,
        scale=0.5,
        activation=activation,
    )
    close = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert_same(found, expected, ends + 11, close)
    rows = kernels.pointwise(signal, ends, residual=residual, dtype=torch.float32)
    assert torch.equal(rows, signal.float() + residual.float())


def test_signals_may_be_slices_of_larger_ones():
    layer = Layer.of(Conv1d(6, 6, 3).to(DEVICE), FP32)
    whole = random_signal(2, 40, 6, torch.float32, 0)
    part, ends = whole[:, 3:35], torch.tensor([32, 20], device=DEVICE)
    expected = folded.convolution(layer, part, ends, residual=part)
    assert_same(kernels.convolution(layer, part, ends, SMALL, residual=part), expected, ends, 2e-6)
    crossed = part.transpose(1, 2).contiguous().transpose(1, 2)
    assert_same(kernels.convolution(layer, crossed, ends, SMALL, residual=crossed), expected, ends, 2e-6)


def test_tiles_cover_every_layer_and_fit():
    for inputs, outputs, taps in ((1, 48, 7), (48, 48, 11), (96, 192, 4), (192, 192, 3), (32, 1, 3), (5, 3, 1)):
        layer = Layer.of(Conv1d(inputs, outputs, taps, causal=taps % 2 == 0), Precision(torch.bfloat16))
        tiles = kernels.tiles(layer)
        assert len(set(tiles)) == len(tiles) > 1
        for tile in tiles:
            sizes = (tile.time, tile.channels, tile.sums)
            assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
            held = tile.stages * tile.sums * (tile.time + tile.channels) * 2
            assert held <= 200 * 1024  # bytes of a Hopper multiprocessor's shared memory


# Three stages instead of five, because the interpreter takes 50 s for 1 s of audio with the full network.
SHORT_FRAMES: dict[str, Any] = {
    "samples_per_frame": 32,
    "audio_encoder": {"down_sample_rates": [2, 4, 4]},
    "audio_decoder": {"up_sample_rates": [4, 4, 2]},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["two_stages", "nano"])
@pytest.mark.parametrize("way", ["library", f"fused {tuple(LARGE)}"])
@torch.no_grad()
def test_every_candidate_gives_the_same_network_output(monkeypatch, kind, way):
    """Check that each example in a batch of different lengths equals the output of the modules for it alone."""
    monkeypatch.setattr(kernels, "tiles", lambda *_: [LARGE])
    codec = cached_codec("two_stages") if kind == "two_stages" else build_codec(kind, **SHORT_FRAMES)
    least, rate = max(codec.encoder.min_frames, codec.decoder.min_frames), codec.samples_per_frame
    frames = [least + 3, least]
    audio = random_signal(2, max(frames) * rate, 1, torch.float32, 0).cpu() / 10
    tokens = torch.randint(codec.codebook_size, (codec.num_codebooks, 2, max(frames)))
    codes = codec.quantizer.decode(tokens)
    ends = torch.tensor(frames, device=DEVICE)
    # tf32 uses our kernels and fp32 uses PyTorch. The interpreter computes both exactly.
    precision = plan.PRECISIONS["fp32" if way == "library" else "tf32"]
    autotuner = Autotuner(lambda _: 0.0, force=way)
    encoder = plan.Plan(codec.encoder.to(DEVICE), precision, kernels, autotuner)
    decoder = plan.Plan(codec.decoder.to(DEVICE), precision, kernels, autotuner)
    encoded = encoder(audio.to(DEVICE), ends).cpu()
    decoded = decoder(codes.transpose(1, 2).to(DEVICE), ends).cpu()
    codec.encoder.cpu(), codec.decoder.cpu()
    close = 1e-5 if DEVICE == "cpu" or way == "library" else 5e-3
    for row, length in enumerate(frames):
        expected = codec.encoder.encode_frames(audio[row, : length * rate, 0][None])[0].T
        assert (encoded[row, :length] - expected).abs().max() < close * (1 + expected.abs().max())
        expected = codec.decoder.decode_frames(codes[row : row + 1, :, :length])[0]
        assert (decoded[row, : length * rate, 0] - expected).abs().max() < close


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from nemo_lfr.codec.cuda.kernels import leaky_pairs
from nemo_lfr.codec.cuda.triton_kernels import FREE as kernel_free, convolution_kernel as kernel

kind, pairs, precision = sys.argv[1], sys.argv[2], sys.argv[3]
fixed = dict(
    inputs=48, outputs=48, run=16, mode="reflect", kind="lrelu", slope=0.01, kind_after="none", slope_after=0.0,
    has_residual=True, has_total=False, precision=precision, tile_time=128, tile_channels=64, tile_sums=32,
    pairs=leaky_pairs(kind + "x2", 0x3C24) if pairs == "pairs" else "",
)
types = {name: "i32" for name in kernel.arg_names}
types |= dict.fromkeys(("signal", "weight", "residual", "total", "out"), "*" + kind)
types |= dict.fromkeys(("bias", "alpha", "alpha_after"), "*fp32") | {"ends": "*i64", "scale": "fp32"}
types |= dict.fromkeys(fixed, "constexpr")
at = kernel.arg_names.index
# As a launch finds them: pointers and sizes are multiples of 16.
aligned = [name for name in types if types[name][0] == "*" and name not in kernel_free]
aligned += ["out_size", "signal_step", "residual_step", "reduction_size", "shift", "period"]
source = ASTSource(
    kernel,
    types,
    {(at(name),): value for name, value in fixed.items()},
    {(at(name),): [["tt.divisibility", 16]] for name in aligned},
)
made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3})
assert made.asm["cubin"]
loop = made.asm["ttgir"].partition("scf.for")[2]
print("wgmma" in made.asm["ptx"], "max.bf16x2" in made.asm["ptx"], loop.count("async_copy_global"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "pairs", "precision"), [("bf16", "pairs", "ieee"), ("fp32", "single", "tf32")], ids=["bf16", "tf32"]
)
def test_kernels_compile_for_hopper_where_there_is_no_gpu(tmp_path, kind, pairs, precision):
    """The interpreter does not cover tensor cores and PTX."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, kind, pairs, precision], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Tensor cores, a leaky ReLU on pairs of values, and prefetching of both signal and weights.
    assert done.stdout.split() == ["True", str(pairs == "pairs"), "2"]


@pytest.mark.slow
def test_some_layers_of_every_codec_kind_are_fused_and_some_are_not():
    """Unsupported layers use PyTorch: grouped transposed convolutions, and those before an ELU."""
    found = set()
    for kind in KINDS:
        codec = cached_codec(kind)
        for part in (codec.encoder, codec.decoder):
            for step in plan.Plan(part, FP32, None).steps:
                found |= {kernels.fusable(layer) for layer in step.layers}
    assert found == {True, False}
    assert not kernels.fusable(Layer.of(Conv1d(4, 4, 3), FP32), Activation.of(CodecActivation("elu", 4)))
