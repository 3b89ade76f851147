"""Speed of encoding and decoding, compared with stock NeMo, EnCodec, DAC and Mimi.

    python benchmarks/inference.py [--model FILE.nemo] [--threads N] [--rounds 3] [--precisions fp32,bf16]
        [--plot docs/images/inference.png]

Without --model, a full-size checkpoint (112.7 M parameters) with random weights is written first. All implementations
run in one process under `no_grad` in alternating rounds; NeMo runs without its discriminator. The cases are single
clips of 1, 10 and 60 s, 8 clips of 5 s, and 8 clips of 1 to 15 s, which NeMo computes as a padded batch. Before a case
is timed, its results are compared with reference results, for which NeMo computes one clip at a time. Tokens must be
equal except for rounding ties, and audio must agree within 1e-4. For bf16 the percentage of equal tokens and the SNR
of the audio are printed instead. The other codecs also have random weights, which do not affect their speed.

The last tables list the convolutions of the execution plan, grouped by their numbers of channels. They show each
group's share of the time, the rate of its multiply-adds, and this rate relative to that of a large matrix product.
A Toom-Cook algorithm needs fewer multiply-adds than a direct convolution. For such an algorithm, only the
multiply-adds of its matrix products are counted.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import in_turns, machine, ratios, spread
from nemo_lfr.codec.codec import Codec
from nemo_lfr.pretrained import load
from tests.models import FULL_SIZE, codec_config, stock_model, synthesize, write_nemo
from tests.reference import assert_same_tokens

CASES: dict[str, list[float]] = {
    "1 s": [1.0],
    "10 s": [10.0],
    "60 s": [60.0],
    "8 x 5 s": [5.0] * 8,
    "8 of 1 to 15 s": np.random.default_rng(0).uniform(1, 15, 8).round(2).tolist(),
}
RAGGED = "8 of 1 to 15 s"
PEER_CASES = ("1 s", "10 s")


def pad(clips: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return clips as a zero-padded batch [B, T_audio], and their lengths [B]."""
    batch = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(clip) for clip in clips], batch_first=True)
    return batch, torch.tensor([len(clip) for clip in clips])


class Case:
    """Test clips, with the tokens and the decoded audio that NeMo computes for each clip alone."""

    def __init__(self, seconds: list[float], stock: Any, codec: Codec) -> None:
        self.clips = [synthesize(length, seed) for seed, length in enumerate(seconds)]
        self.audio, self.audio_len = pad(self.clips)
        self.alone = [stock.encode(audio=clip[None], audio_len=size[None])[0][0] for clip, size in self._each()]
        self.tokens, self.tokens_len = codec.encode(self.audio, self.audio_len)
        self.heard = [
            stock.decode(tokens=tokens[None], tokens_len=torch.tensor([tokens.shape[1]]))[0][0]
            for tokens in self._own_tokens(self.tokens)
        ]

    def _each(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(clip[:size], size) for clip, size in zip(self.audio, self.audio_len, strict=True)]

    def _own_tokens(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        return [row[:, :size] for row, size in zip(tokens, self.tokens_len.tolist(), strict=True)]

    def check(self, codec: Codec) -> str:
        """Check that fp32 results equal those of NeMo, and return a summary."""
        ties = sum(
            assert_same_tokens(codec, clip, row, expected)
            for clip, row, expected in zip(self.clips, self._own_tokens(self.tokens), self.alone, strict=True)
        )
        audio = codec.decode(self.tokens, self.tokens_len)[0]
        worst = max(
            float((row[: len(expected)] - expected).abs().max())
            for row, expected in zip(audio, self.heard, strict=True)
        )
        assert worst < 1e-4, worst
        total = int(self.tokens_len.sum()) * codec.num_codebooks
        return f"{ties} ties among {total} tokens, audio within {worst:.1e}"

    def agreement(self, codec: Codec) -> str:
        """Compare a codec of lower precision with NeMo.

        Returns:
            Text with the percentage of equal tokens and the SNR of the audio.
        """
        tokens = self._own_tokens(codec.encode(self.audio, self.audio_len)[0])
        same = sum(int((row == expected).sum()) for row, expected in zip(tokens, self.alone, strict=True))
        audio = codec.decode(self.tokens, self.tokens_len)[0]
        errors = [(row[: len(clean)] - clean) for row, clean in zip(audio, self.heard, strict=True)]
        noise = sum(float(error.square().sum()) for error in errors)
        power = sum(float(clean.square().sum()) for clean in self.heard)
        share = same / sum(row.numel() for row in self.alone)
        return f"{100 * share:.1f} % of tokens are equal, SNR {10 * np.log10(power / noise):.1f} dB"


def compare_with_stock(stock: Any, codecs: dict[str, Codec], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Time all cases against NeMo, and print a table.

    Returns:
        The speedup over NeMo in each round, as `result["encode bf16"][case][round]`.
    """
    names = list(codecs)
    found: dict[str, dict[str, list[float]]] = {}
    print(f"\n| seconds | stock | {' | '.join(names)} | {' | '.join(f'ratio, {name}' for name in names)} |")
    print("| --- " * (2 + 2 * len(names)) + "|")
    notes = []
    for title, seconds in CASES.items():
        case = Case(seconds, stock, codecs["fp32"])
        notes.append(f"{title}: fp32 {case.check(codecs['fp32'])}")
        notes[-1] += "".join(f"; {name} {case.agreement(codecs[name])}" for name in names[1:])
        sides = {
            "encode": {"stock": partial(stock.encode, audio=case.audio, audio_len=case.audio_len)}
            | {name: partial(codec.encode, case.audio, case.audio_len) for name, codec in codecs.items()},
            "decode": {"stock": partial(stock.decode, tokens=case.tokens, tokens_len=case.tokens_len)}
            | {name: partial(codec.decode, case.tokens, case.tokens_len) for name, codec in codecs.items()},
        }
        for side, ways in sides.items():
            took = in_turns(ways, rounds)
            faster = {name: ratios(took["stock"], took[name]) for name in names}
            for name in names:
                found.setdefault(f"{side} {name}", {})[title] = faster[name]
            cells = [f"{median(values):.2f}" for values in took.values()] + [spread(faster[name]) for name in names]
            print(f"| {side} {title} | {' | '.join(cells)} |", flush=True)
    for what, by_case in found.items():
        even = [geometric_mean(values) for title, values in by_case.items() if title != RAGGED]
        print(f"\n{what}: {geometric_mean(even):.2f} times as fast as NeMo (geometric mean without the ragged batch)")
    print("\n" + "\n".join(notes))
    return found


def compare_with_peers(codec: Codec, rounds: int) -> None:
    """Print the speeds of this codec, EnCodec, DAC and Mimi as multiples of real time."""
    import transformers

    dac = {"downsampling_ratios": [2, 4, 5, 8], "upsampling_ratios": [8, 5, 4, 2], "n_codebooks": 32}
    peers = {
        "EnCodec 24 kHz": transformers.EncodecModel(transformers.EncodecConfig()),
        "DAC 24 kHz": transformers.DacModel(transformers.DacConfig(sampling_rate=24000, **dac)),
        "Mimi": transformers.MimiModel(transformers.MimiConfig()),
    }
    print("\n| times real time | " + " | ".join(f"encode {case}, decode {case}" for case in PEER_CASES) + " |")
    print("| --- " * (1 + len(PEER_CASES)) + "|")
    rows: dict[str, list[str]] = {}
    for case in PEER_CASES:
        (seconds,) = CASES[case]
        clip = synthesize(seconds)
        tokens = codec.encode(clip)[0]
        encoders: dict[str, Any] = {"nemo_lfr": partial(codec.encode, clip)}
        decoders: dict[str, Any] = {"nemo_lfr": partial(codec.decode, tokens)}
        for name, model in peers.items():
            rate = model.eval().config.sampling_rate
            audio = torch.from_numpy(np.resize(clip, round(seconds * rate)))[None, None]
            coded = model.encode(audio)
            scales = {"audio_scales": coded.audio_scales} if "audio_scales" in coded else {}
            encoders[name] = partial(model.encode, audio)
            decoders[name] = partial(model.decode, audio_codes=coded.audio_codes, **scales)
        for ways in (encoders, decoders):
            for who, took in in_turns(ways, rounds).items():
                rows.setdefault(who, []).append(f"{seconds / median(took):.1f}")
    for who, cells in rows.items():
        print(f"| {who} | {cells[0]}, {cells[1]} | {cells[2]}, {cells[3]} |")


class Convolutions(TorchDispatchMode):
    """Profiler that sums the seconds and multiply-adds of convolutions and matrix products.

    Attributes:
        seconds: a dict from (number of input channels, number of output channels) to the total time in seconds.
        sums: a dict from (number of input channels, number of output channels) to the total number of multiply-adds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[tuple[int, int], float] = defaultdict(float)
        self.sums: defaultdict[tuple[int, int], int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        took = time.perf_counter() - started
        match func:
            case torch.ops.mkldnn._convolution_pointwise.default:
                signal, taps = args[0], args[1].shape[3]
            case torch.ops.mkldnn._convolution_pointwise.binary:
                signal, taps = args[0], args[2].shape[3]
            case torch.ops.aten.mm.default:
                signal, taps = args[0], 1
            case torch.ops.aten.addmm.default | torch.ops.aten.addmm_.default:
                signal, taps = args[1], 1
            case _:
                return result
        kind = signal.shape[1], result.shape[1]
        self.seconds[kind] += took
        self.sums[kind] += result.numel() * signal.shape[1] * taps
        return result


def stages(codec: Codec) -> None:
    """Print a row for each size of convolution: its share of the time, and its GFLOP/s.

    Convolutions with the same numbers of input and output channels share a row. Rows of at most 1 % are left out.
    """
    left, right = torch.rand(2048, 2048), torch.rand(2048, 2048)
    took = in_turns({"product": partial(torch.mm, left, right)}, 9)["product"]
    peak = 2 * 2048**3 / min(took) / 1e9
    print(f"\nA product of 2048 x 2048 matrices: {peak:.0f} GFLOP/s on {torch.get_num_threads()} threads")
    clip = synthesize(6.0)
    tokens = codec.encode(clip)[0]
    for side, way in (("encode", partial(codec.encode, clip)), ("decode", partial(codec.decode, tokens))):
        way()  # warm up: oneDNN compiles its kernels on the first call
        started = time.perf_counter()
        with Convolutions() as found:
            way()
        total = time.perf_counter() - started
        print(f"\n| {side}: channels in, out | share of the time | GFLOP/s | relative to the matrix product |")
        print("| --- " * 4 + "|")
        for (inputs, outputs), seconds in sorted(found.seconds.items(), key=lambda item: -item[1]):
            if seconds > 0.01 * total:
                rate = 2 * found.sums[inputs, outputs] / seconds / 1e9
                share = 100 * seconds / total
                print(f"| {inputs}, {outputs} | {share:.0f} % | {rate:.0f} | {100 * rate / peak:.0f} % |")
        print(f"| everything else | {100 * (1 - sum(found.seconds.values()) / total):.0f} % | | |")


def plot(found: dict[str, dict[str, list[float]]], path: Path, what: str) -> None:
    """Plot the median speedup over NeMo as bars, with the range over all rounds.

    Args:
        found: `found[implementation][case]` is a list with the speedup in each round.
        path: image file to write.
        what: title of the plot.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    width = 0.8 / len(found)
    for number, (name, by_case) in enumerate(found.items()):
        middles = [median(values) for values in by_case.values()]
        below = [middle - min(values) for middle, values in zip(middles, by_case.values(), strict=True)]
        above = [max(values) - middle for middle, values in zip(middles, by_case.values(), strict=True)]
        places = np.arange(len(by_case)) + (number - (len(found) - 1) / 2) * width
        axes.bar(places, middles, width, yerr=[below, above], label=name, error_kw={"linewidth": 0.8})
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(CASES)), list(CASES))
    axes.set(ylabel="times as fast as stock NeMo", title=what)
    axes.legend(frameon=False, ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)


@torch.no_grad()
def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--precisions", default="fp32,bf16", help="precisions to time, fp32 first (default %(default)s)"
    )
    parser.add_argument("--parts", default="stock,peers,stages", help="parts to run (default %(default)s)")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or write_nemo(Path(folder, "full.nemo"), codec_config(**FULL_SIZE))
        codecs = {name: load(path, "cpu", name) for name in args.precisions.split(",")}
        title = f"{machine()}, {args.threads} threads"
        print(title)
        if "stock" in args.parts:
            stock = stock_model(path)
            stock.discriminator = None
            found = compare_with_stock(stock, codecs, args.rounds)
            if args.plot:
                plot(found, args.plot, title)
            del stock
    if "peers" in args.parts:
        compare_with_peers(codecs["fp32"], args.rounds)
    if "stages" in args.parts:
        stages(codecs["fp32"])


if __name__ == "__main__":
    main()
