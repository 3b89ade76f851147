"""Speed of corpus tokenization by nemo_lfr (also with Ray) and by stock NeMo, and memory use of nemo_lfr.

    python benchmarks/tokenize_corpus.py [--model FILE.nemo] [--clips 160] [--plot docs/images/tokenize_memory.png]

The NeMo loop reads files with NeMo's own reader, calls `encode` and keeps the tokens. It uses one thread per core. It
is timed with one clip at a time, and with padded batches of 8. Only the tokens of single clips are compared with those
of nemo_lfr, because tokens from a NeMo batch depend on the other clips. nemo_lfr runs `nemo-lfr tokenize` with one
single-threaded worker per core. Speeds exclude the loading of models. Each round times every program once, and tables
show medians over the rounds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import soundfile
import torch

from benchmarks.measure import machine, ratios, spread
from nemo_lfr.corpus.config import TokenizeConfig
from nemo_lfr.corpus.dataset import TokenDataset
from nemo_lfr.corpus.run import Totals, tokenize
from nemo_lfr.io.hub import find_checkpoint
from tests.models import RATE, stock_model, synthesize

SHARD = 4


def write_corpus(root: Path, seconds: list[float]) -> Path:
    """Write one synthetic clip for each duration in `seconds`, and a manifest. Return the path of the manifest."""
    lines = []
    for number, length in enumerate(seconds):
        soundfile.write(root / f"{number}.wav", synthesize(length, seed=number), RATE)
        lines.append(json.dumps({"audio_filepath": f"{number}.wav", "duration": length}))
    manifest = root / f"{len(seconds)}-{seconds[0]:.3f}.json"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def stock_loop(
    model: Any, manifest: Path, batch_size: int, limit: int | None = None
) -> tuple[float, list[torch.Tensor]]:
    """Encode the corpus, or its first `limit` clips, with NeMo.

    Returns:
        Duration of the loop in seconds, and the tokens of each clip, shape [C, T_encoded].
    """
    from nemo.collections.asr.parts.preprocessing.segment import AudioSegment

    lines = manifest.read_text().splitlines()[:limit]
    paths = [manifest.parent / json.loads(line)["audio_filepath"] for line in lines]
    found = []
    started = time.perf_counter()
    with torch.no_grad():
        for start in range(0, len(paths), batch_size):
            clips = [
                torch.from_numpy(AudioSegment.from_file(str(path), target_sr=RATE).samples)
                for path in paths[start : start + batch_size]
            ]
            lengths = torch.tensor([len(clip) for clip in clips])
            audio = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
            tokens, frames = model.encode(audio=audio, audio_len=lengths)
            found += [row[:, :total] for row, total in zip(tokens, frames.tolist(), strict=True)]
    return time.perf_counter() - started, found


def ours(manifest: Path, out: Path, model: str | None, workers: int, ray: str | None = None) -> float:
    """Tokenize as `nemo-lfr tokenize` does, and return the speed.

    Returns:
        Seconds of audio per second, measured after the first shard of every worker.
    """
    times: list[tuple[float, int]] = []

    def watch(totals: Totals) -> None:
        times.append((time.perf_counter(), totals.samples))

    job = TokenizeConfig(str(manifest), str(out), "lfr", model=model, shard_size=SHARD)
    tokenize(job, workers=workers, device="cpu", ray=ray, watch=watch)
    (begin, before), (end, after) = times[workers], times[-1]
    return (after - before) / RATE / (end - begin)


def memory_over_a_run(manifest: Path, out: Path, model: str | None) -> list[tuple[float, float]]:
    """Tokenize in this process, and return (seconds, MiB of resident memory) samples."""
    page, samples = os.sysconf("SC_PAGE_SIZE"), []
    done = threading.Event()
    started = time.perf_counter()

    def sample() -> None:
        while not done.wait(0.5):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            samples.append((time.perf_counter() - started, pages * page / 2**20))

    watcher = threading.Thread(target=sample)
    watcher.start()
    ours(manifest, out, model, 1)
    done.set()
    watcher.join()
    return samples


def plot(samples: list[tuple[float, float]], path: Path) -> None:
    """Plot resident memory over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 2.5), layout="constrained")
    axes.plot(*zip(*samples, strict=True))
    axes.set(xlabel="seconds", ylabel="MiB in memory", ylim=(0, None), title="nemo-lfr tokenize, one worker")
    figure.savefig(path, dpi=100)


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint (default: the bundled codec)")
    parser.add_argument("--clips", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument(
        "--parts",
        default="memory,stock,batches,ray",
        help="comma-separated parts to run (default %(default)s); 'batches' only runs together with 'stock'",
    )
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ragged = write_corpus(root, [round(float(length), 3) for length in rng.uniform(1, 15, args.clips)])
        outs = iter(root / f"out{number}" for number in range(1000))
        if "memory" in args.parts:
            samples = memory_over_a_run(ragged, next(outs), args.model)
            half = [mib for _, mib in samples[len(samples) // 2 :]]
            print(f"memory in the second half of the run: {min(half):.0f} to {max(half):.0f} MiB")
            if args.plot:
                plot(samples, args.plot)
        if "stock" in args.parts:
            batches = "batches" in args.parts
            compare_with_stock(ragged, outs.__next__, args.model, args.rounds, cores, batches)
        if "ray" in args.parts:
            even = write_corpus(root, [10.0] * (args.clips // 2))
            compare_with_ray(even, outs.__next__, args.model, args.rounds)
    print(f"\n{machine()}")


def compare_with_stock(
    manifest: Path, out: Callable[[], Path], model: str | None, rounds: int, cores: int, batches: bool
) -> None:
    """Print the speeds of `nemo-lfr tokenize` and of the NeMo loop, and how many of their tokens differ."""
    torch.set_num_threads(cores)
    stock = stock_model(find_checkpoint(model)).eval()
    seconds = sum(json.loads(line)["duration"] for line in manifest.read_text().splitlines())
    stock_loop(stock, manifest, 1, limit=4)  # warm up
    if batches:
        stock_loop(stock, manifest, 8, limit=8)
    own: list[float] = []
    loops: dict[str, list[float]] = {"one clip at a time": []}
    if batches:
        loops["batches of 8"] = []
    for _ in range(rounds):
        folder = out()
        own.append(ours(manifest, folder, model, cores))
        torch.set_num_threads(cores)
        took, tokens = stock_loop(stock, manifest, 1)
        loops["one clip at a time"].append(seconds / took)
        if batches:
            loops["batches of 8"].append(seconds / stock_loop(stock, manifest, 8)[0])
    differing = total = 0
    for utterance in TokenDataset(folder):
        expected = tokens[int(utterance.id)]
        assert utterance.tokens.shape == expected.shape
        differing += int((utterance.tokens != expected).sum())
        total += expected.numel()
    print("\n| | seconds of audio per second |\n| --- | --- |")
    print(f"| `nemo-lfr tokenize`, {cores} workers of one thread | {spread(own)} |")
    for name, values in loops.items():
        print(f"| NeMo loop, {name}, {cores} threads | {spread(values)} |")
        print(f"| speedup over the NeMo loop, {name} | {spread(ratios(own, values))} |")
    print(f"\n{differing} of {total} tokens differ from those of NeMo for single clips")


def compare_with_ray(manifest: Path, out: Callable[[], Path], model: str | None, rounds: int) -> None:
    """Print the speed without Ray, with one Ray worker and with two Ray workers, and the ratios of these speeds."""
    import ray

    ray.init("local", include_dashboard=False, logging_level="error", log_to_driver=False)
    rates: dict[str, list[float]] = {"in this process": [], "one Ray worker": [], "two Ray workers": []}
    for _ in range(rounds):
        rates["in this process"].append(ours(manifest, out(), model, 1))
        rates["one Ray worker"].append(ours(manifest, out(), model, 1, "local"))
        rates["two Ray workers"].append(ours(manifest, out(), model, 2, "local"))
    ray.shutdown()
    print("\n| one thread each, clips of 10 s | seconds of audio per second |\n| --- | --- |")
    for name, values in rates.items():
        print(f"| {name} | {spread(values)} |")
    bare, one, two = rates.values()
    print(f"| one Ray worker / in this process | {spread(ratios(one, bare))} |")
    print(f"| two Ray workers / one | {spread(ratios(two, one))} |")


if __name__ == "__main__":
    main()
