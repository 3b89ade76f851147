"""Live decoding: how many streams the server sustains in real time, compared with two modes without batching.

    python benchmarks/serve.py [--seconds 20] [--buffer 0.2] [--most 256]

Each stream receives one frame of tokens per 46 ms, as from a language model that produces them in real time. Its audio
is played from `--buffer` seconds after the first audio of the stream arrives. The stream has a gap if audio arrives
later than it should be played. For each mode, the number of streams is doubled, then bisected, to find the largest
number without any gap. This number is at most `--most`, and about 5 % too low at worst. The modes are:

- server: `nemo-lfr serve`, with this process as the client of all streams.
- processes: one process per stream, which pushes each frame to a `StreamDecoder`.
- one process: one process for all streams, which pushes each frame of each stream to a `StreamDecoder` separately.

The table shows this largest number, and the time from the first frame of a stream to its first audio (median and 95th
percentile) with 1 stream, with 8, and with 80 % of the largest number. The client of the server runs on the same
cores; the other modes have no client.
"""

import argparse
import asyncio
import multiprocessing
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.measure import machine

FRAME_S = 1024 / 22050
MODES = ("server", "processes", "one process")


@dataclass
class Player:
    """Player of one stream, which receives audio in pieces.

    Attributes:
        arrivals: for each piece, the time when it arrived and its duration, in seconds. Time 0 is when the first frame
            of tokens should be sent.
    """

    arrivals: list[tuple[float, float]] = field(default_factory=list)

    def has_gap(self, buffer_s: float) -> bool:
        """Return whether the player runs out of audio before the last piece arrives; True if no piece arrives.

        Args:
            buffer_s: time in seconds from the arrival of the first piece to the start of the playback.
        """
        if not self.arrivals:
            return True
        start, played = self.arrivals[0][0] + buffer_s, 0.0
        for at, seconds in self.arrivals:
            if at > start + played + 1e-9 and played:
                return True
            played += seconds
        return False


def tokens_of(num_frames: int) -> np.ndarray:
    """Return random tokens [C, T]."""
    return np.random.default_rng(0).integers(0, 2016, (8, num_frames))


async def _client(url: str, frames: list[bytes], start: float) -> Player:
    from websockets.asyncio.client import connect

    player = Player()
    async with connect(url, proxy=None, compression=None, max_size=None) as socket:
        await socket.recv()
        clock = asyncio.get_running_loop().time

        async def send() -> None:
            for number, frame in enumerate(frames):
                await asyncio.sleep(max(0.0, start + number * FRAME_S - clock()))
                await socket.send(frame)
            await socket.send('{"type": "end"}')

        sending = asyncio.create_task(send())
        async for message in socket:
            if isinstance(message, bytes):
                player.arrivals.append((clock() - start, len(message) / 2 / 22050))
        await sending
    return player


def run_server(num_streams: int, num_frames: int) -> list[Player]:
    """Decode streams on one server, with one connection per stream. Return the player of each stream."""
    command = [sys.executable, "-m", "nemo_lfr", "serve", "--port", "0", "--max-streams", "100000"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    address = next(line for line in server.stderr if "serving at" in line).split()[-1]
    url = address.replace("http", "ws") + "/v1/decode/stream"
    frames = [np.ascontiguousarray(frame).astype("<i2").tobytes() for frame in tokens_of(num_frames).T]

    async def run() -> list[Player]:
        await _client(url, frames[:20], 0.0)  # warm up
        clock = asyncio.get_running_loop().time
        base = clock() + 1 + num_streams * 0.005
        starts = np.random.default_rng(1).uniform(0, 1, num_streams)
        return list(await asyncio.gather(*(_client(url, frames, base + start) for start in starts)))

    try:
        return asyncio.run(run())
    finally:
        server.terminate()
        server.wait()


def _decode(streams: int, num_frames: int, seed: int, ready: object, go: object, queue: object) -> None:
    import torch

    import nemo_lfr

    torch.set_num_threads(1)
    codec = nemo_lfr.load()
    tokens = tokens_of(num_frames)
    warm = codec.stream_decoder()
    for number in range(20):
        warm.push(tokens[:, number : number + 1])
    decoders = [codec.stream_decoder() for _ in range(streams)]
    starts = np.random.default_rng(seed).uniform(0, 1, streams)
    due = sorted(
        (starts[number] + frame * FRAME_S, number, frame) for number in range(streams) for frame in range(num_frames)
    )
    players = [Player() for _ in range(streams)]
    ready.release()  # type: ignore[attr-defined]
    go.wait()  # type: ignore[attr-defined]
    base = time.monotonic()
    for at, number, frame in due:
        time.sleep(max(0.0, base + at - time.monotonic()))
        audio = decoders[number].push(tokens[:, frame : frame + 1])
        if frame == num_frames - 1:
            audio = np.concatenate([audio, decoders[number].flush()])
        if len(audio):
            players[number].arrivals.append((time.monotonic() - base - starts[number], len(audio) / 22050))
    queue.put(players)  # type: ignore[attr-defined]


def run_processes(num_streams: int, num_frames: int, each: int = 1) -> list[Player]:
    """Decode without batching, in processes with `each` streams per process. Return the player of each stream."""
    context = multiprocessing.get_context("spawn")
    ready, go, queue = context.Semaphore(0), context.Event(), context.Queue()
    workers = [
        context.Process(target=_decode, args=(each, num_frames, seed, ready, go, queue))
        for seed in range(num_streams // each)
    ]
    for worker in workers:
        worker.start()
    for _ in workers:
        ready.acquire()
    go.set()
    players = [player for _ in workers for player in queue.get()]
    for worker in workers:
        worker.join()
    return players


def run(mode: str, num_streams: int, num_frames: int) -> list[Player]:
    """Run one mode with a number of streams."""
    if mode == "server":
        return run_server(num_streams, num_frames)
    return run_processes(num_streams, num_frames, 1 if mode == "processes" else num_streams)


def most_without_gap(mode: str, num_frames: int, buffer_s: float, most: int) -> int:
    """Return, to about 5 %, the largest number of streams that a mode decodes without a gap in any of them."""

    def holds(count: int) -> bool:
        gaps = sum(player.has_gap(buffer_s) for player in run(mode, count, num_frames))
        print(f"  {mode}: {count} streams, {gaps} with a gap", file=sys.stderr, flush=True)
        return not gaps

    low, high = 0, 1
    while high <= most and holds(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > max(1, low // 20):
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--buffer", type=float, default=0.2)
    parser.add_argument("--most", type=int, default=256)
    options = parser.parse_args()
    num_frames = round(options.seconds / FRAME_S)
    print(machine())
    counts = {mode: most_without_gap(mode, num_frames, options.buffer, options.most) for mode in MODES}
    print(
        "| mode | streams without a gap | first audio at 1 stream | at 8 | at 80 % |\n| --- | --- | --- | --- | --- |"
    )
    for mode in MODES:
        cells = []
        for count in (1, 8, max(1, int(counts[mode] * 0.8))):
            firsts = [player.arrivals[0][0] for player in run(mode, count, num_frames) if player.arrivals]
            late = np.percentile(firsts, 95)
            cells.append(f"{statistics.median(firsts) * 1000:.0f} ms ({late * 1000:.0f} ms)")
        print(f"| {mode} | {counts[mode]} | {' | '.join(cells)} |", flush=True)
    best = max(counts["processes"], counts["one process"])
    ratio = counts["server"] / max(1, best)
    print(f"\nThe server sustains {ratio:.1f} times as many streams as the better of the other modes.")


if __name__ == "__main__":
    main()
