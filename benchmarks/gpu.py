"""GPU benchmark of the codec: agreement, and speed compared with stock NeMo.

    python benchmarks/gpu.py [--device cuda] [--minutes 8] [--precisions bf16,fp32] [--batches 32] [--speech FOLDER]
                             [--parts peaks,kernels,speech,latency,saturation,stages,upload] [--small]
    python benchmarks/gpu.py --pack .gpu_inputs.pt [--speech FOLDER]

The benchmark takes at most 8 minutes by default. It needs torch and numpy, and Triton for the fused kernels. It needs
neither internet access nor NeMo. The full-size codec (112.7 M parameters) has random weights, which do not affect its
speed. The "PyTorch reference" is always timed. It implements NeMo's operations in plain PyTorch. NeMo is timed too if
it is installed. A speedup "over stock" is relative to NeMo if it is timed, and otherwise to the PyTorch reference. In
fp32, NeMo and the reference use PyTorch's defaults, which means TF32 in the convolutions of cuDNN.

Agreement of tokens is measured with the bundled codec, relative to fp32 on the CPU. If soundfile or omegaconf are
missing, run --pack on a machine that has them: it writes the codec and speech to one file. Without --speech, the
benchmark reads `.gpu_inputs.pt` in the root of the repository if it exists.

The parts run independently. If one of them fails, the exit code is nonzero.
"""

import argparse
import copy
import math
import os
import platform
import sys
import time
import traceback
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

try:
    import soundfile  # noqa: F401
except ImportError:
    # The package imports soundfile, but only uses it to read audio files, which this script then avoids.
    sys.modules["soundfile"] = types.ModuleType("soundfile")
    HAS_SOUNDFILE = False
else:
    HAS_SOUNDFILE = True

from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.cuda import folded
from nemo_lfr.codec.cuda.autotuner import Autotuner, gpu_seconds
from nemo_lfr.codec.cuda.folded import Activation, Layer, Precision
from nemo_lfr.codec.cuda.graphs import CudaCapture, GraphCache
from nemo_lfr.codec.cuda.plan import AUTOTUNER, PRECISIONS, Plan, Step, find_kernels
from nemo_lfr.codec.torch_backend import TorchBackend
from nemo_lfr.modules.activation import CodecActivation
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d
from nemo_lfr.modules.decoder import HiFiGANDecoder
from nemo_lfr.modules.encoder import HiFiGANEncoder
from nemo_lfr.modules.quantizer import GroupFiniteScalarQuantizer
from nemo_lfr.modules.residual import ResidualLayer

PACKED = ROOT / ".gpu_inputs.pt"
RATE, FRAME = 22050, 1024
# Maximum error of a fused convolution relative to the largest value of the reference.
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
TF32_CLOSE = 4e-3


class Stock:
    """Reference codec with the same operations as NeMo's `AudioCodecModel`."""

    def __init__(
        self, encoder: HiFiGANEncoder, quantizer: GroupFiniteScalarQuantizer, decoder: HiFiGANDecoder
    ) -> None:
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder

    @torch.no_grad()
    def encode(self, audio: torch.Tensor, audio_len: torch.Tensor) -> torch.Tensor:
        """Encode audio [B, T_audio] to tokens [B, C, T_encoded]."""
        frames = torch.where(audio_len % FRAME == 0, audio_len / FRAME, torch.ceil(audio_len / FRAME))
        length = FRAME * frames.int()
        hidden = F.pad(audio, (0, int(length.max().item()) - audio.shape[1])).unsqueeze(1)
        encoded, length = self.encoder.run(StockOps(), (hidden, length))
        tokens = []
        for group, fsq in zip(encoded.chunk(self.quantizer.num_groups, dim=1), self.quantizer.fsqs, strict=True):
            scale = (fsq.num_levels - 1) / 2 * (1 - fsq.eps)
            offset = torch.where(fsq.num_levels % 2 == 0, 0.5, 0)
            shift = (offset / scale).tan()
            compressed = scale * (group + shift).tanh() - offset
            rounded = compressed + (torch.round(compressed) - compressed).detach()
            middle = fsq.num_levels // 2
            codes = rounded / middle
            indices = torch.sum((middle * codes + middle) * fsq.dim_base_index, dim=1).to(torch.int32)
            _ = masked(codes, length)
            tokens.append(masked(indices, length).unsqueeze(0))
        return torch.cat(tokens).transpose(0, 1)

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, tokens_len: torch.Tensor) -> torch.Tensor:
        """Decode tokens [B, C, T_encoded] to audio [B, T_audio]."""
        codes = []
        for group, fsq in zip(
            tokens.transpose(0, 1).chunk(self.quantizer.num_groups), self.quantizer.fsqs, strict=True
        ):
            digits = (group.squeeze(0).unsqueeze(1) // fsq.dim_base_index) % fsq.num_levels
            middle = fsq.num_levels // 2
            codes.append(masked((digits - middle) / middle, tokens_len))
        hidden, _ = self.decoder.run(StockOps(), (torch.cat(codes, dim=1), tokens_len))
        return self.decoder.out_activation(hidden).squeeze(1)


# Values [B, H, T] and the valid length of each example [B].
Masked = tuple[torch.Tensor, torch.Tensor]


class StockOps:
    """Operations of NeMo's layers. Each layer masks its output."""

    def conv(self, layer: Conv1d, signal: Masked, activation: CodecActivation | None = None) -> Masked:
        """Apply an activation, padding and a convolution."""
        hidden, length = signal
        conv = layer.conv
        padded = F.pad(hidden if activation is None else activation(hidden), layer.pad, mode=layer.pad_mode)
        result = F.conv1d(padded, conv.weight, conv.bias, stride=conv.stride, dilation=conv.dilation)
        length = (length // conv.stride[0]).long() if conv.stride[0] > 1 else length
        return masked(result, length), length

    def upsample(self, layer: ConvTranspose1d, signal: Masked, activation: CodecActivation) -> Masked:
        """Apply an activation and a transposed convolution."""
        hidden, length = signal
        conv, rate = layer.conv, layer.conv.stride[0]
        result = F.conv_transpose1d(activation(hidden), conv.weight, conv.bias, rate, (rate + 1) // 2, rate % 2)
        return masked(result, length * rate), length * rate

    def residual(self, layer: ResidualLayer, signal: Masked) -> Masked:
        """Run the branches of a residual layer, and return the mean of their outputs."""
        results = []
        for blocks in layer.branches:
            result = signal
            for block in blocks:
                middle = self.conv(block.input_conv, result, block.input_activation)
                added, length = self.conv(block.skip_conv, middle, block.skip_activation)
                result = result[0] + added, length
            results.append(result[0])
        return sum(results) / len(results), signal[1]


def masked(values: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Zero values [B, ..., T] after each example's length [B]."""
    shape = (values.shape[0], *[1] * (values.dim() - 2), values.shape[-1])
    mask = torch.ones(shape, dtype=length.dtype, device=length.device).cumsum(dim=-1)
    return values * (mask <= length.reshape(-1, *[1] * (values.dim() - 1)))


class Bench:
    """Shared state of the parts of the benchmark: device, time limit and failures."""

    def __init__(
        self, device: str, minutes: float, small: bool, precisions: Sequence[str], batches: Sequence[int]
    ) -> None:
        self.device = torch.device(device)
        self.small, self.precisions, self.batches = small, precisions, batches
        self.failures: list[str] = []
        self._end = time.monotonic() + 60 * minutes
        self.on_gpu = self.device.type == "cuda"
        self.peak, self.bandwidth = float("nan"), float("nan")  # bf16 FLOP/s, bytes/s

    def left(self) -> float:
        """Return the remaining time in seconds."""
        return self._end - time.monotonic()

    def part(self, name: str, needs: float, run: Callable[[], None]) -> None:
        """Run a part of the benchmark, and record its failure.

        Args:
            name: name of the part.
            needs: approximate duration in seconds; the part fails if less time remains.
            run: function to run; its exceptions are printed and do not stop the benchmark.
        """
        print(f"\n## {name}\n", flush=True)
        started = time.monotonic()
        if self.left() < needs:
            self.failures.append(name)
            print(
                f"NOT RUN: it needs about {needs:.0f} s, but only {max(0.0, self.left()):.0f} s are left", flush=True
            )
            return
        try:
            run()
        except Exception as error:
            self.failures.append(name)
            print(f"FAILED: {name}: {type(error).__name__}: {error}", flush=True)
            traceback.print_exc(limit=-4, file=sys.stdout)
        if self.on_gpu:
            torch.cuda.empty_cache()
        print(f"\n({name}: {time.monotonic() - started:.1f} s)", flush=True)

    def seconds(self, way: Callable[[], Any], most: float = 4.0) -> list[float]:
        """Time up to 30 synchronized calls after two warm-up calls.

        Args:
            way: function to time.
            most: approximate time limit in seconds for all calls.

        Returns:
            Duration of each timed call in seconds, including the time until the device has finished.
        """
        took: list[float] = []
        started = time.monotonic()
        least = 3 if self.small else 5
        while len(took) < 32 and (len(took) < least or (time.monotonic() - started < most and not self.small)):
            self.wait()
            begin = time.perf_counter()
            way()
            self.wait()
            took.append(time.perf_counter() - begin)
            if len(took) > 2 and time.monotonic() - started > 3 * most:
                break
        return took[2:]

    def wait(self) -> None:
        """Wait until the device has finished."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def full_size(bench: Bench) -> tuple[Codec, Stock]:
    """Build the released architecture with random weights, as `Codec` and as `Stock`."""
    torch.manual_seed(0)
    small = bench.small
    encoder = HiFiGANEncoder(32, (2, 2, 4, 8, 8), 4 if small else 48, resblock_dilation_sizes=(1,))
    decoder = HiFiGANDecoder(32, (8, 8, 4, 2, 2), 64 if small else 1024, 7, 3)
    quantizer = GroupFiniteScalarQuantizer(8, [8, 7, 6, 6])
    parts = [part.to(bench.device).eval().requires_grad_(False) for part in (encoder, quantizer, decoder)]
    return Codec(TorchBackend(*parts, RATE)), Stock(*parts)  # type: ignore[arg-type]


def with_precision(codec: Codec, precision: str) -> Codec:
    """Return a codec with the same weights at another precision."""
    return Codec(TorchBackend(codec.encoder, codec.quantizer, codec.decoder, codec.sample_rate, precision=precision))


def clip(seconds: float, device: torch.device, batch: int = 1) -> torch.Tensor:
    """Synthesize harmonics with noise, shape [B, T_audio]."""
    steps = torch.arange(round(seconds * RATE), device=device)
    tone = sum(torch.sin(steps * (0.03 * harmonic)) / harmonic for harmonic in range(1, 8))
    return 0.1 * tone + 0.03 * torch.randn(batch, len(steps), device=device)


def peaks(bench: Bench) -> None:
    """Measure the peak matrix-product rates and copy bandwidth of the device."""
    size = 512 if bench.small else 8192
    rows = []
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.float16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        left, right = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        rate = 2 * size**3 / min(bench.seconds(partial(torch.matmul, left, right), 2.0))
        torch.backends.cuda.matmul.allow_tf32 = False
        rows.append(f"{name} {rate / 1e12:.0f}")
        if name == "bf16":
            bench.peak = rate
    source = torch.empty(2 ** (22 if bench.small else 30), dtype=torch.int32, device=bench.device)
    target = torch.empty_like(source)
    bench.bandwidth = 2 * source.nbytes / min(bench.seconds(partial(target.copy_, source), 2.0))
    print(f"products of {size} x {size}, TFLOP/s: {', '.join(rows)}")
    print(f"copy: {bench.bandwidth / 1e12:.2f} TB/s read and written")


@torch.no_grad()
def check_kernels(bench: Bench) -> None:
    """Compare fused convolutions with the reference, for all tiles and precisions."""
    kernels = find_kernels(bench.device)
    if kernels is None:
        print("no kernels on this device: everything below is plain PyTorch")
        if bench.on_gpu:
            raise RuntimeError("Triton's kernels cannot be used; the reason is logged above")
        return
    cases: list[tuple[str, Conv1d | ConvTranspose1d, str]] = [
        ("48, 11 taps", Conv1d(48, 48, 11), "lrelu"),
        ("32, dilation 5", Conv1d(32, 32, 7, dilation=5), "half_snake"),
        ("96 to 192, stride 2", Conv1d(96, 192, 4, stride=2), "lrelu"),
        ("128 to 64, up 2", ConvTranspose1d(128, 64, stride=2), "lrelu"),
        ("1 to 48", Conv1d(1, 48, 7, pad_mode="replicate"), "none"),
        ("32 to 1, causal", Conv1d(32, 1, 3, causal=True), "lrelu"),
    ]
    ends = torch.tensor([1500, 1018], device=bench.device)
    tries: dict[str, Callable[[], str]] = {}
    for title, module, name in cases:
        module.to(bench.device)
        for called, precision in PRECISIONS.items():
            layer = Layer.of(module, precision)
            signal = torch.randn(2, 1500, layer.inputs, device=bench.device).to(precision.dtype)
            activation = None if name == "none" else CodecActivation(name, layer.inputs).to(bench.device)
            before = None if activation is None else Activation.of(activation)
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                exact = Layer.of(module, Precision(torch.float32))
                expected = folded.convolution(exact, signal.float(), ends, activation=before)
                others = [torch.randn_like(expected).to(precision.dtype) for _ in range(2)]
                expected = (expected + others[0].float() + others[1].float()) / 3
            for tile in kernels.tiles(layer, before):
                run = partial(
                    kernels.convolution,
                    layer,
                    signal,
                    ends,
                    tile,
                    activation=before,
                    residual=others[0],
                    total=others[1],
                    scale=1 / 3,
                )
                close = TF32_CLOSE if precision.tf32 else CLOSE[precision.dtype]
                kept = (ends * layer.upsample_stride // layer.stride).tolist()
                tries[f"{title}, {called}, {tuple(tile)}"] = partial(_error_of, run, expected, kept, close)
    bench.wait()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # kernel compilation dominates the time
        found = dict(zip(tries, pool.map(lambda way: way(), tries.values()), strict=True))
    wrong = {what: error for what, error in found.items() if error}
    print(f"{len(found) - len(wrong)} of {len(found)} fused convolutions equal the reference")
    if wrong:
        raise AssertionError("\n" + "\n".join(f"{what}: {error}" for what, error in wrong.items()))


@torch.no_grad()
def _error_of(run: Callable[[], torch.Tensor], expected: torch.Tensor, kept: list[int], close: float) -> str:
    """Compare a result with the expected one.

    Args:
        run: function that computes the result, [B, T, ...].
        expected: expected result, [B, T, ...].
        kept: number of time steps of each example to compare.
        close: maximum error, relative to the peak of the expected example.

    Returns:
        A description of the mismatch, or of the exception that `run` raised; "" if the results agree.
    """
    try:
        found = run()
        errors = [
            float((row[:end].float() - want[:end]).abs().max() / want[:end].abs().max())
            for row, want, end in zip(found, expected, kept, strict=True)
        ]
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return "" if max(errors) <= close else f"off by {max(errors):.2e}"


def real_speech(folder: Path | None) -> tuple[Codec, list[torch.Tensor]]:
    """Load the bundled codec and speech clips [T_audio] on the CPU."""
    if folder is None and PACKED.exists():
        held = torch.load(PACKED, weights_only=False)
        return Codec(TorchBackend(*held["parts"], held["sample_rate"])), held["clips"]
    return _load_speech(folder)


def _load_speech(folder: Path | None) -> tuple[Codec, list[torch.Tensor]]:
    if not HAS_SOUNDFILE:
        raise RuntimeError(
            f"soundfile is not installed; write {PACKED.name} with --pack on another machine that has soundfile, copy "
            "the file here, and run without --speech"
        )
    from nemo_lfr.cli.demo import demo_clip
    from nemo_lfr.io.audio import AudioReader
    from nemo_lfr.pretrained import load

    codec = load(None, "cpu")
    paths = [demo_clip()]
    if folder is not None:
        paths += sorted(path for path in folder.rglob("*") if path.suffix in (".flac", ".wav", ".ogg"))[:16]
    clips = []
    for path in paths:
        with AudioReader(path, codec.sample_rate) as reader:
            clips.append(torch.cat([torch.from_numpy(block.copy()) for block in reader.blocks()])[: 8 * RATE])
    return codec, clips


@torch.no_grad()
def speech(bench: Bench, folder: Path | None) -> None:
    """Compare each precision with fp32 on the CPU, using real speech.

    Args:
        bench: benchmark state.
        folder: folder of additional recordings, or None.

    Raises:
        AssertionError: if more than 0.05 % of the fp32 tokens on the device differ from those on the CPU.
    """
    codec, clips = real_speech(folder)
    lengths = [len(wave) for wave in clips]
    batch = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    tokens, counts = codec.encode(batch, lengths)
    audio = codec.decode(tokens, counts)[0]
    valid = torch.arange(tokens.shape[2]) < counts[:, None]
    total = int(valid.sum()) * codec.num_codebooks
    moved = [part.to(bench.device) for part in (codec.encoder, codec.quantizer, codec.decoder)]
    print(f"{len(clips)} clips, {sum(lengths) / RATE:.0f} s, {total} tokens\n")
    print("| precision | equal tokens | SNR of the audio, dB |\n| --- | --- | --- |")
    agreement: dict[str, float] = {}

    def report(name: str, fast: Codec) -> None:
        for _ in range(3):  # runs eagerly, captures a CUDA graph, replays it
            found, heard = fast.encode(batch, lengths)[0].cpu(), fast.decode(tokens, counts)[0].cpu()
        same = int(((found == tokens) & valid[:, None]).sum())
        agreement[name] = same / total
        noise = float((heard[:, : audio.shape[1]] - audio).square().sum())
        ratio = 10 * math.log10(float(audio.square().sum()) / max(noise, 1e-30))
        alone = [fast.encode(wave)[0][0].cpu() for wave in clips[:3]]
        apart = sum(int((row[:, : one.shape[1]] != one).sum()) for row, one in zip(found, alone, strict=False))
        print(
            f"| {name} | {100 * same / total:.3f} % ({total - same} differ; alone {apart}) | {ratio:.1f} |", flush=True
        )

    try:
        AUTOTUNER.force = "library"
        for precision in PRECISIONS:
            report(precision, Codec(TorchBackend(*moved, codec.sample_rate, precision=precision)))
    finally:
        AUTOTUNER.force = None
    if bench.on_gpu:  # kernels are chosen once per network; copies allow another choice
        report(
            "bf16, fused where faster", Codec(TorchBackend(*copy.deepcopy(moved), codec.sample_rate, precision="bf16"))
        )
    print('\n"alone" is the number of tokens of the first 3 clips that differ between the batch and each clip alone.')
    stock = Stock(*moved)
    one = batch[:1, : lengths[0] // FRAME * FRAME].to(bench.device)
    size = torch.tensor([one.shape[1]], device=bench.device)
    expected = tokens[:1, :, : one.shape[1] // FRAME]
    for name, context in stock_ways(bench).items():
        with context():
            found = stock.encode(one, size).cpu()
        # The last frames differ, because the truncated clip lacks their lookahead.
        same = (found == expected)[..., : max(1, expected.shape[2] - 7)].float()
        print(f"PyTorch reference, {name}, first clip: {100 * float(same.mean()):.2f} % equal tokens")
    if agreement["fp32"] < 0.9995:
        raise AssertionError(
            f"in fp32, only {100 * agreement['fp32']:.3f} % of the tokens equal those of the CPU; at most 0.05 % may "
            "differ, because of rounding ties"
        )


def stock_ways(bench: Bench) -> dict[str, Callable[[], Any]]:
    """Return the contexts in which the reference is timed: PyTorch's default precision, and autocast to bf16."""
    return {
        "fp32 (TF32 convolutions)" if bench.on_gpu else "fp32": nullcontext,
        "autocast bf16": lambda: torch.autocast(bench.device.type, dtype=torch.bfloat16),
    }


def nemo_stock(codec: Codec) -> Any:
    """Build NeMo's full-size model, or return None if NeMo is not installed."""
    try:
        import nemo.collections.tts.models.audio_codec  # noqa: F401
    except Exception as reason:
        print(f"NeMo cannot be imported ({type(reason).__name__}): only the PyTorch reference is timed.")
        return None
    import tempfile

    from tests.models import FULL_SIZE, codec_config, stock_model, write_nemo

    with tempfile.TemporaryDirectory() as folder:
        model = stock_model(write_nemo(Path(folder, "full.nemo"), codec_config(**FULL_SIZE)))
    model.discriminator = None
    return model.to(codec.device)


def stock_calls(bench: Bench, codec: Codec, stock: Stock) -> dict[str, Any]:
    """Return a dict from the name of each reference implementation to its functions (encode, decode)."""
    calls: dict[str, Any] = {"PyTorch reference": (stock.encode, stock.decode)}
    model = nemo_stock(codec) if bench.on_gpu else None
    if model is not None:
        calls["stock NeMo"] = (
            torch.no_grad()(lambda audio, size: model.encode(audio=audio, audio_len=size)[0]),
            torch.no_grad()(lambda tokens, size: model.decode(tokens=tokens, tokens_len=size)[0]),
        )
    return calls


@torch.no_grad()
def latency(bench: Bench, codec: Codec, stock: Stock) -> None:
    """Measure the latency of single clips, with input and output on the device."""
    for seconds in (0.5, 1.0) if bench.small else (1.0, 10.0):
        audio = clip(seconds, bench.device)
        audio_len = torch.tensor([audio.shape[1]], device=bench.device)
        tokens, tokens_len = codec.encode(audio)
        found = stock.encode(audio, audio_len)
        same = 100 * float((found[..., : tokens.shape[2]] == tokens).float().mean())
        print(f"\n1 x {seconds:g} s; {same:.2f} % of the fp32 tokens equal those of the PyTorch reference\n")
        print("| | encode, ms | decode, ms | both, speedup over stock |\n| --- | --- | --- | --- |")
        reference = float("nan")
        for who, (encode, decode) in stock_calls(bench, codec, stock).items():
            for name, context in stock_ways(bench).items():
                with context():
                    took = [
                        median(bench.seconds(partial(encode, audio, audio_len), 1.5)),
                        median(bench.seconds(partial(decode, tokens, tokens_len), 1.5)),
                    ]
                if name.startswith("fp32"):
                    reference = sum(took)
                print(_row(f"{who}, {name}", took, reference), flush=True)
        for precision in bench.precisions:
            if bench.left() < 45:
                print(f"{precision}: not measured, because too little time is left")
                continue
            fast = with_precision(codec, precision)
            started = time.perf_counter()
            fast.decode(fast.encode(audio)[0])
            bench.wait()
            first = time.perf_counter() - started
            took = [
                median(bench.seconds(partial(fast.encode, audio), 2.0)),
                median(bench.seconds(partial(fast.decode, tokens), 2.0)),
            ]
            print(_row(f"nemo_lfr {precision} (first call {first:.1f} s)", took, reference), flush=True)


def _row(name: str, took: list[float], reference: float) -> str:
    cells = " | ".join(f"{1e3 * value:.3f}" for value in took)
    return f"| {name} | {cells} | {reference / sum(took):.2f} |"


@torch.no_grad()
def saturation(bench: Bench, codec: Codec, stock: Stock) -> None:
    """Measure the throughput at the best batch size, with clips of 10 s."""
    sizes = [1, 2] if bench.small else bench.batches
    seconds = 1.0 if bench.small else 10.0
    print("| | encode | decode | both |\n| --- | --- | --- | --- |")
    best = 0.0

    def measure(name: str, encode: Callable[..., Any], decode: Callable[..., Any]) -> float:
        rates: list[dict[int, float]] = [{}, {}]
        for size in sizes:
            audio = clip(seconds, bench.device, size)
            audio_len = torch.full((size,), audio.shape[1], device=bench.device)
            count = -(-audio.shape[1] // FRAME)
            tokens = torch.randint(2016, (size, 8, count), device=bench.device)
            tokens_len = torch.full((size,), count, device=bench.device)
            try:
                for rate, way in (
                    (rates[0], partial(encode, audio, audio_len)),
                    (rates[1], partial(decode, tokens, tokens_len)),
                ):
                    rate[size] = size * seconds / median(bench.seconds(way, 1.5))
            except torch.cuda.OutOfMemoryError:
                print(f"{name}: a batch of {size} does not fit into memory")
                break
            finally:
                if bench.on_gpu:
                    torch.cuda.empty_cache()
        if not all(rates):
            return 0.0
        (at, fastest), (at_, fastest_) = (max(rate.items(), key=lambda item: item[1]) for rate in rates)
        both = 1 / (1 / fastest + 1 / fastest_)
        print(f"| {name} | {fastest:.0f} (batch {at}) | {fastest_:.0f} (batch {at_}) | {both:.0f} |", flush=True)
        return both

    for who, (encode, decode) in stock_calls(bench, codec, stock).items():
        for name, context in stock_ways(bench).items():
            with context():
                best = max(best, measure(f"{who}, {name}", encode, decode))
    for precision in bench.precisions:
        if bench.left() < 45:
            print(f"{precision}: not measured, because too little time is left")
            continue
        fast = with_precision(codec, precision)
        rate = measure(f"nemo_lfr {precision}", fast.encode, fast.decode)
        print(f"  {precision}: {rate / best:.2f} times the best rate of stock", flush=True)


@torch.no_grad()
def stages(bench: Bench, codec: Codec) -> None:
    """Profile each stage in bf16 with and without the fused kernels.

    It prints the time, rate and bandwidth of each stage for a large batch, and the speedup of the fused kernels for
    the large batch and for one clip.
    """
    kernels = find_kernels(bench.device)
    batch, frames = (1, 32) if bench.small else (16, 224)
    precision = PRECISIONS["bf16"]
    ends = torch.full((batch,), frames, device=bench.device)
    sides: dict[str, Any] = {
        "encode": (codec.encoder, clip(frames * FRAME / RATE, bench.device, batch)[:, : frames * FRAME, None]),
        "decode": (codec.decoder, torch.randn(batch, frames, 32, device=bench.device).tanh()),
    }
    for side, (part, signal) in sides.items():
        plans = {"library": Plan(part, precision, kernels, Autotuner(gpu_seconds, force="library"))}
        if kernels is not None and bench.on_gpu:
            plans["chosen"] = Plan(part, precision, kernels, AUTOTUNER)
        last = list(plans)[-1]
        print(f"\n{side}, {batch} x {frames} frames, bf16; {' and '.join(plans)}; MB: the bytes of each layer's ")
        print("input, output and weights, each counted once\n")
        print("| stage | GFLOP | MB | " + " | ".join(f"{name}, ms" for name in plans), end="")
        print(
            f" | {last}: TFLOP/s, share of the peak | TB/s, share of a copy's |\n| --- "
            + "| --- " * (4 + len(plans))
            + "|"
        )
        sums = dict.fromkeys(plans, 0.0)
        for number, step in enumerate(plans["library"].steps):
            took = {}
            for name, plan in plans.items():
                own = plan.steps[number]
                way = partial(own.run, signal, ends * own.rate)
                way()
                took[name] = gpu_seconds(way) if bench.on_gpu else median(bench.seconds(way, 0.5))
                sums[name] += took[name]
            signal = step.run(signal, ends * step.rate)
            flops, size = work(step, signal)
            cells = " | ".join(f"{1e3 * value:.3f}" for value in took.values())
            rate, speed = flops / took[last], size / took[last]
            print(
                f"| {step.name} | {flops / 1e9:.1f} | {size / 1e6:.0f} | {cells} | {rate / 1e12:.0f}, "
                f"{100 * rate / bench.peak:.0f} % | {speed / 1e12:.2f}, {100 * speed / bench.bandwidth:.0f} % |",
                flush=True,
            )
        print("| all | | | " + " | ".join(f"{1e3 * value:.3f}" for value in sums.values()) + " | | |")
        if len(plans) > 1:
            print(f"\nfused kernels alone, {side}, large batch: {sums['library'] / sums['chosen']:.2f} times as fast")
            one, frames_ = sides[side][1][:1].contiguous(), ends[:1]
            single = {}
            for name, plan in plans.items():
                cache = GraphCache(CudaCapture())
                single[name] = median(bench.seconds(partial(cache.run, 0, plan, one, frames_), 1.0))
            print(f"fused kernels alone, {side}, one clip: {single['library'] / single['chosen']:.2f} times as fast")
    for key, took in AUTOTUNER.measured.items():
        ways = ", ".join(f"{name} {1e6 * value:.0f}" for name, value in took.items())
        print(f"  {key}: {ways} us")


def work(step: Step, out: torch.Tensor) -> tuple[float, float]:
    """Count the operations and memory traffic of a step.

    Args:
        step: step of a plan.
        out: output of the step, shape [B, T_out, H_out].

    Returns:
        Floating-point operations, and bytes of the inputs, outputs and weights of the layers.
    """
    batch, length, _ = out.shape
    flops = size = 0.0
    for layer in step.layers:
        num_in = length * layer.stride // layer.upsample_stride
        flops += 2.0 * batch * layer.num_out(num_in) * layer.outputs * layer.reduction_size
        numbers = num_in * layer.inputs + length * layer.outputs // layer.upsample_stride
        size += out.element_size() * (batch * numbers + layer.weight.numel())
    return flops, size


def upload(bench: Bench) -> None:
    """Time the copy of 600 s of audio to the device, as in corpus tokenization."""
    count = RATE * (6 if bench.small else 600)
    ways = {"pageable": torch.zeros(count), "pinned": torch.zeros(count, pin_memory=bench.on_gpu)}
    for name, audio in ways.items():
        print(f"{name}: {1e3 * median(bench.seconds(partial(audio.to, bench.device), 1.0)):.2f} ms")


def main() -> int:
    """Run the requested parts, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--parts", default="peaks,kernels,speech,latency,saturation,stages,upload")
    parser.add_argument(
        "--precisions", default="bf16,fp32,fp16,tf32", help="precisions in the parts latency and saturation"
    )
    parser.add_argument("--batches", default="8,32,96", help="batch sizes in the part saturation")
    parser.add_argument("--small", action="store_true", help="use few channels and short clips, to try the script")
    parser.add_argument("--pack", type=Path, help="write the bundled codec and speech to this file, and exit")
    parser.add_argument("--speech", type=Path, help="folder of recordings to use in addition to the bundled one")
    args = parser.parse_args()
    if args.pack:
        codec, clips = _load_speech(args.speech)
        parts = (codec.encoder, codec.quantizer, codec.decoder)
        torch.save({"parts": parts, "sample_rate": codec.sample_rate, "clips": clips}, args.pack)
        print(f"{args.pack}: {args.pack.stat().st_size / 2**20:.1f} MiB, {len(clips)} clips")
        return 0
    unknown = set(args.precisions.split(",")) - set(PRECISIONS)
    if unknown:
        parser.error(f"--precisions: {', '.join(sorted(unknown))} unknown; use {', '.join(PRECISIONS)}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device; pass --device cpu --small to try the script on a CPU.")
        return 2
    batches = [int(batch) for batch in args.batches.split(",")]
    bench = Bench(args.device, args.minutes, args.small, args.precisions.split(","), batches)
    card = torch.cuda.get_device_name(bench.device) if bench.on_gpu else platform.processor() or platform.machine()
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    cuda, cudnn = torch.version.cuda, torch.backends.cudnn.version()
    print(f"{card}; torch {torch.__version__}, CUDA {cuda}, cuDNN {cudnn}, Triton {version}", end="; ")
    print(f"Python {platform.python_version()}")
    wanted = args.parts.split(",")
    codec, stock = full_size(bench)
    parts: dict[str, tuple[float, Callable[[], None]]] = {
        "peaks": (10, lambda: peaks(bench)),
        "kernels": (30, lambda: check_kernels(bench)),
        "speech": (40, lambda: speech(bench, args.speech)),
        "latency": (40, lambda: latency(bench, codec, stock)),
        "stages": (30, lambda: stages(bench, codec)),
        "saturation": (40, lambda: saturation(bench, codec, stock)),
        "upload": (5, lambda: upload(bench)),
    }
    for name, (needs, run) in parts.items():
        if name in wanted:
            bench.part(name, needs, run)
    print("\n" + (f"FAILED: {', '.join(bench.failures)}" if bench.failures else "every part ran and agreed"))
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
