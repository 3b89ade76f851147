"""Memory of the server while live streams come and go.

    python benchmarks/serve_memory.py [--minutes 10] [--streams 12] [--plot memory.png]

The script starts `nemo-lfr serve` with the bundled codec. At any time, about `--streams` streams are open, half of
them encoding and half decoding, each in real time for 1 to 20 seconds. The script samples the memory and the file
descriptors of the server every second, prints both by minute, and checks that every stream received all of its
results.
"""

import argparse
import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.measure import machine
from benchmarks.misbehave import state_of
from nemo_lfr.client import AsyncClient

FRAME_S = 1024 / 22050


async def live(items: list[np.ndarray]) -> AsyncIterator[np.ndarray]:
    """Yield the items, each of which is one frame, at the rate of live audio."""
    start = time.monotonic()
    for number, item in enumerate(items):
        await asyncio.sleep(max(0.0, start + number * FRAME_S - time.monotonic()))
        yield item


async def stream(client: AsyncClient, rng: np.random.Generator, closed: Counter[str]) -> None:
    """Run one stream, and check that the numbers of sent and returned frames are equal."""
    num_frames = int(rng.integers(20, 430))
    if rng.random() < 0.5:
        tokens = rng.integers(0, 2016, (8, num_frames))
        async with client.decode_stream() as decoder:
            pieces = [piece async for piece in decoder.through(live(list(tokens.T)))]
        assert sum(map(len, pieces)) == num_frames * 1024
        closed["decode"] += 1
    else:
        samples = rng.uniform(-0.1, 0.1, (num_frames, 1024)).astype(np.float32)
        async with client.encode_stream() as encoder:
            pieces = [piece async for piece in encoder.through(live(list(samples)))]
        assert sum(piece.shape[1] for piece in pieces) == num_frames
        closed["encode"] += 1


async def keep_busy(url: str, number: int, until: float, closed: Counter[str]) -> None:
    """Run streams one after the other, with pauses, until `time.monotonic()` reaches `until`."""
    rng = np.random.default_rng(number)
    client = AsyncClient(url)
    while time.monotonic() < until:
        await stream(client, rng, closed)
        await asyncio.sleep(rng.uniform(0, 1))


async def sample(pid: int, until: float) -> list[tuple[float, int, int]]:
    """Sample a process once per second, until `time.monotonic()` is `until`.

    Returns:
        For each sample, the seconds since the first one, the memory in MB and the number of open descriptors.
    """
    start = time.monotonic()
    found = []
    while time.monotonic() < until:
        state = state_of(pid)
        found.append((time.monotonic() - start, state["memory_mb"], state["descriptors"]))
        await asyncio.sleep(1)
    return found


def draw(samples: list[tuple[float, int, int]], path: Path) -> None:
    """Write a plot of the memory over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([seconds / 60 for seconds, _, _ in samples], [memory for _, memory, _ in samples])
    axes.set(xlabel="minutes", ylabel="resident memory (MB)", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


async def run(
    url: str, pid: int, minutes: float, num_streams: int
) -> tuple[list[tuple[float, int, int]], Counter[str]]:
    """Keep streams open for some minutes, and sample the server.

    Returns:
        The samples that `sample` returns, and the number of finished streams by kind ("encode" or "decode").
    """
    closed: Counter[str] = Counter()
    until = time.monotonic() + 60 * minutes
    tasks = [keep_busy(url, number, until, closed) for number in range(num_streams)]
    samples, *_ = await asyncio.gather(sample(pid, until), *tasks)
    return samples, closed


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=12)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    print(machine())
    command = [sys.executable, "-m", "nemo_lfr", "serve", "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        url = next(line for line in server.stderr if "serving at" in line).split()[-1]
        samples, closed = asyncio.run(run(url, server.pid, options.minutes, options.streams))
    finally:
        server.terminate()
        server.wait()
    print(f"{closed['encode']} streams encoded, {closed['decode']} decoded; each received all of its results")
    print("| minute | memory (MB): lowest, highest | descriptors: highest |\n| --- | --- | --- |")
    for minute in range(int(options.minutes)):
        rows = [row for row in samples if 60 * minute <= row[0] < 60 * (minute + 1)]
        memory = [row[1] for row in rows]
        print(f"| {minute + 1} | {min(memory)}, {max(memory)} | {max(row[2] for row in rows)} |")
    if options.plot is not None:
        draw(samples, options.plot)


if __name__ == "__main__":
    main()
