"""Streaming compared with offline processing: agreement, speed and lookahead.

    python benchmarks/streaming.py [MANIFEST] [--model FILE.nemo] [--chunkings 200] [--threads 1]

MANIFEST lists speech recordings; the default is the clip inside the package. Random excerpts (200 by default) are
streamed in chunks of random lengths, through the codec and through a codec with NanoCodec's causal decoder and random
weights. Tokens must equal offline tokens except for rounding ties, and audio must agree within 1e-5. The first table
shows the time to process a chunk of 20, 80 or 320 ms, for one stream and for 16 streams in a batch. Speed relative to
real time is the total over all streams. The next two tables show the effect of `lookahead` on the tokens and on the
decoded audio. The last table shows the SNR of the first frames for each `first_lookahead`.
"""

import argparse
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.measure import machine
from nemo_lfr.cli.demo import demo_clip
from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.streaming import push_decoders, push_encoders
from nemo_lfr.evaluation.metrics import Signal, measure
from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.manifests import read_manifest
from nemo_lfr.pretrained import load
from tests.models import codec_config, write_nemo
from tests.reference import assert_same_tokens

PUSHES_MS = (20, 80, 320)
STREAMS = (1, 16)
WARM_UP = 4
QUALITY = ("ESTOI", "mel distance")


def read(path: Path, rate: int) -> np.ndarray:
    """Read a recording as mono samples [T] at `rate` Hz."""
    with AudioReader(path, rate) as reader:
        return np.concatenate([np.zeros(0, np.float32), *reader.blocks()])


def cut(rng: np.random.Generator, total: int, frame: int, longest: int) -> list[tuple[int, int]]:
    """Split `total` items into chunks [start, stop) of random lengths.

    Each length is 0, 1, 997, `frame`, or a random number below `longest`.
    """
    edges = [0]
    while edges[-1] < total:
        kind = int(rng.integers(6))
        length = (0, 1, frame, 997)[kind] if kind < 4 else int(rng.integers(1, longest))
        edges.append(min(total, edges[-1] + length))
    return list(pairwise(edges))


def encode(codec: Codec, wave: np.ndarray, pieces: list[tuple[int, int]], lookahead: int | None = None) -> np.ndarray:
    """Encode chunks of audio [T_audio] as a stream; returns tokens [C, T_encoded]."""
    stream = codec.stream_encoder(lookahead)
    return np.concatenate([*(stream.push(wave[a:b]) for a, b in pieces), stream.flush()], axis=1)


def decode(
    codec: Codec, tokens: np.ndarray, pieces: list[tuple[int, int]], lookahead: int | None = None
) -> np.ndarray:
    """Decode chunks of tokens [C, T_encoded] as a stream; returns audio [T_audio]."""
    stream = codec.stream_decoder(lookahead)
    return np.concatenate([*(stream.push(tokens[:, a:b]) for a, b in pieces), stream.flush()])


def check(codec: Codec, waves: list[np.ndarray], chunkings: int, seed: int) -> str:
    """Check that streaming equals offline processing for random chunks.

    Args:
        codec: codec to check.
        waves: recordings, each of shape [T_audio].
        chunkings: number of random excerpts, each of which is split into random chunks.
        seed: random seed.

    Returns:
        Summary of the agreement.
    """
    rng = np.random.default_rng(seed)
    ties, worst, frames = 0, 0.0, 0
    for number in range(chunkings):
        wave = waves[number % len(waves)]
        start = int(rng.integers(0, max(1, len(wave) - 4 * codec.sample_rate)))
        wave = wave[start : start + int(rng.integers(1, 4 * codec.sample_rate))]
        expected = codec.encode(wave)[0][0]
        found = encode(codec, wave, cut(rng, len(wave), codec.samples_per_frame, 9000))
        ties += assert_same_tokens(codec, wave, torch.from_numpy(found), expected)
        audio = codec.decode(expected)[0][0].numpy()
        heard = decode(codec, expected.numpy(), cut(rng, expected.shape[1], 2, 9))
        assert heard.shape == audio.shape
        worst = max(worst, float(np.abs(heard - audio).max(initial=0)))
        frames += expected.shape[1]
    assert worst < 1e-5, worst
    return f"{chunkings} chunkings of {frames} frames: {ties} ties, audio within {worst:.1e}"


def time_pushes(codec: Codec, wave: np.ndarray, push_ms: int, count: int) -> tuple[list[float], list[float]]:
    """Measure the seconds per chunk of `push_ms` for `count` encoders and `count` decoders.

    Returns:
        Two lists with one entry per chunk: the seconds to push the chunk to all encoders, and the seconds to push the
        tokens of these encoders to all decoders.
    """
    size = codec.sample_rate * push_ms // 1000
    encoders = [codec.stream_encoder() for _ in range(count)]
    decoders = [codec.stream_decoder() for _ in range(count)]
    took: tuple[list[float], list[float]] = ([], [])
    # Shift the audio of each stream, since the streams of a server carry different audio.
    waves = [np.roll(wave, 977 * number) for number in range(count)]
    for start in range(0, len(wave) - size + 1, size):
        begin = time.perf_counter()
        tokens = push_encoders(encoders, [wave[start : start + size] for wave in waves])
        middle = time.perf_counter()
        push_decoders(decoders, tokens)
        took[0].append(middle - begin)
        took[1].append(time.perf_counter() - middle)
    return took


def speed(codec: Codec, wave: np.ndarray) -> None:
    """Print the latency and speed for each number of streams and chunk duration."""
    print("\n| streams | chunk | encode: median, 95 % | decode: median, 95 % | x real time: encode, decode, both |")
    print("| --- | --- | --- | --- | --- |")
    for count in STREAMS:
        clip = np.tile(wave, 3)[: codec.sample_rate * (20 if count == 1 else 8)]
        for push_ms in PUSHES_MS:
            time_pushes(codec, clip[: codec.sample_rate * 4], push_ms, count)
            sides = time_pushes(codec, clip, push_ms, count)
            cells, factors = [], []
            for took in sides:
                took = took[WARM_UP:]
                cells.append(f"{1e3 * statistics.median(took):.1f} ms, {1e3 * np.quantile(took, 0.95):.1f} ms")
                factors.append(count * push_ms * len(took) / 1e3 / sum(took))
            both = 1 / sum(1 / factor for factor in factors)
            print(
                f"| {count} | {push_ms} ms | {cells[0]} | {cells[1]} | "
                f"{factors[0]:.1f}, {factors[1]:.1f}, {both:.1f} |",
                flush=True,
            )


def lookahead(codec: Codec, waves: list[np.ndarray]) -> None:
    """Print the share of equal tokens, and the quality, for each lookahead up to the full one."""
    frame_ms = 1000 / codec.frame_rate
    print("\n| frames of lookahead | delay | tokens equal to those with full lookahead |")
    print("| --- | --- | --- |")
    exact = [codec.encode(wave)[0][0].numpy() for wave in waves]
    steps = [[(a, a + 1024) for a in range(0, len(wave), 1024)] for wave in waves]
    for frames in range(codec.encoder.context.future + 1):
        found = [encode(codec, wave, pieces, frames) for wave, pieces in zip(waves, steps, strict=True)]
        same = sum(int((a == b).sum()) for a, b in zip(found, exact, strict=True)) / sum(a.size for a in exact)
        print(f"| {frames} | {frames * frame_ms:.0f} ms | {100 * same:.1f} % |", flush=True)
    print("\n| frames of lookahead | delay | SNR relative to full lookahead | ESTOI, mel distance to the original |")
    print("| --- | --- | --- | --- |")
    wholes = [codec.decode(tokens)[0][0].numpy() for tokens in exact]
    for frames in range(codec.decoder.context.future + 1):
        heard = [decode(codec, a, [(n, n + 1) for n in range(a.shape[1])], frames) for a in exact]
        error = sum(float(((a - b) ** 2).sum()) for a, b in zip(heard, wholes, strict=True))
        power = sum(float((b**2).sum()) for b in wholes)
        snr = f"{10 * np.log10(power / error):.1f} dB" if error > 1e-9 * power else "equal"
        quality = [
            measure(Signal(wave, codec.sample_rate), Signal(audio[: len(wave)], codec.sample_rate), QUALITY)
            for wave, audio in zip(waves, heard, strict=True)
        ]
        values = [statistics.mean(float(each[name]) for each in quality) for name in QUALITY]
        print(f"| {frames} | {frames * frame_ms:.0f} ms | {snr} | {values[0]:.3f}, {values[1]:.4f} |", flush=True)


def first_lookahead(codec: Codec, waves: list[np.ndarray]) -> None:
    """Print the SNR of the first frames for each `first_lookahead`, for streams that start in the middle of speech."""
    exact = [codec.encode(wave)[0][0].numpy() for wave in waves]
    excerpts = [tokens[:, start : start + 24] for tokens in exact for start in range(10, tokens.shape[1] - 24, 20)]
    wholes = [codec.decode(tokens)[0][0].numpy() for tokens in excerpts]
    full = codec.decoder.context.future
    frames = "token frames that must arrive before the first frame of audio"
    print(f"\n| first_lookahead | {frames} | number of approximate frames | SNR of these frames |")
    print("| --- | --- | --- | --- |")
    for first in range(full):
        error = power = 0.0
        for tokens, whole in zip(excerpts, wholes, strict=True):
            stream = codec.stream_decoder(first_lookahead=first)
            heard = np.concatenate([stream.push(tokens[:, n : n + 1]) for n in range(full)])
            early = whole[: len(heard)]
            error += float(((heard - early) ** 2).sum())
            power += float((early**2).sum())
        print(f"| {first} | {first + 1} | {full - first} | {10 * np.log10(power / error):.1f} dB |", flush=True)


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", nargs="?", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--chunkings", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clips", type=int, default=10, help="number of recordings for the lookahead tables")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    codec = load(arguments.model, "cpu")
    paths = [demo_clip()]
    if arguments.manifest is not None:
        paths = [Path(line.path) for line in read_manifest(arguments.manifest, arguments.manifest.parent)]
    waves = [read(path, codec.sample_rate) for path in paths]
    print(codec)
    print(f"{machine()}, {arguments.threads} threads")
    print(check(codec, waves, arguments.chunkings, 0))
    with tempfile.TemporaryDirectory() as folder:
        nano = load(write_nemo(Path(folder, "nano.nemo"), codec_config("nano")), "cpu")
        print(check(nano, waves, arguments.chunkings, 1), "with the causal decoder, random weights")
    speed(codec, np.concatenate(waves[:10]))
    chosen = waves[:: max(1, len(waves) // arguments.clips)][: arguments.clips]
    lookahead(codec, chosen)
    first_lookahead(codec, chosen)


if __name__ == "__main__":
    main()
