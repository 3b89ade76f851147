"""Lossless compression of token files: bytes, block sizes, speed and memory.

    python benchmarks/entropy.py MANIFEST [--min-seconds 10] [--model FILE.nemo] [--entropy-model FILE.lfrm]

MANIFEST lists speech recordings that the entropy model was not trained on. Each recording is encoded once. Its token
file is written uncompressed and compressed, and must decode to the same tokens. The output shows:

1. File sizes in bytes, including headers and checksums, for recordings of at least `--min-seconds` and for all.
2. Bits per frame for several block sizes: of the payload alone, and of the payload with the overhead of the blocks.
3. The size of incompressible tokens, drawn uniformly at random.
4. Speed on one thread, as seconds of audio per second of CPU time. Other load on the machine hardly affects CPU time.
   "Frame by frame" uses blocks of one frame that are written and read separately. "One after the other" decodes blocks
   sequentially, as for a pipe. "Side by side" decodes the blocks of a file together.

The last row of the table is the peak memory that Python and NumPy allocate while a file is read.

Set OMP_NUM_THREADS=1 to measure a single core.
"""

import argparse
import io
import json
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.measure import machine
from nemo_lfr.codec.arrays import to_numpy
from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.entropy.find import model_for
from nemo_lfr.io.entropy.model import EntropyModel
from nemo_lfr.io.manifests import read_manifest
from nemo_lfr.io.token_file import Metadata, TokenReader, TokenStreamReader, TokenStreamWriter, TokenWriter
from nemo_lfr.pretrained import load

BLOCKS = (1, 8, 32, 64, 128, 256, 512, 1024)
RANDOM_FRAMES = 100_000
SPEED_FRAMES = 4096


def written(path: Path, metadata: Metadata, tokens: np.ndarray, num_samples: int, model: EntropyModel | None) -> int:
    """Write a token file, check that it decodes exactly, and return its size in bytes."""
    with TokenWriter(path, metadata, overwrite=True, model=model) as writer:
        writer.write(tokens)
        writer.finish(num_samples)
    with TokenReader(path, model=model) as reader:
        assert np.array_equal(reader.read(), tokens)
    return path.stat().st_size


def stream(metadata: Metadata, tokens: np.ndarray, model: EntropyModel | None, block: int) -> bytes:
    """Return the contents of a token file with `block` frames per block."""
    file = io.BytesIO()
    writer = TokenStreamWriter(file, metadata, model)
    for start in range(0, tokens.shape[1], block):
        writer.write(tokens[:, start : start + block])
    writer.finish(tokens.shape[1] * metadata.samples_per_frame)
    return file.getvalue()


def speed(frames: int, frame_rate: float, work: Callable[[], object]) -> float:
    """Return the best of three speeds, in seconds of audio per second of CPU time."""
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return frames / frame_rate / best


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--min-seconds", type=float, default=10)
    parser.add_argument("--model")
    parser.add_argument("--entropy-model")
    arguments = parser.parse_args()
    codec = load(arguments.model, "cpu")
    model = model_for(codec, arguments.entropy_model)
    metadata = Metadata.of(codec)
    print(machine())
    print(f"codec {codec.fingerprint}, entropy model {model.hash}, {len(model.to_bytes())} bytes\n")

    utterances = []
    for recording in read_manifest(arguments.manifest):
        with AudioReader(recording.path, codec.sample_rate) as reader:
            wave = np.concatenate([np.zeros(0, np.float32), *reader.blocks()])
        utterances.append((recording.name, to_numpy(codec.encode(wave)[0][0]), len(wave)))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.lfr")
        for name, tokens, samples in utterances:
            sizes = [written(path, metadata, tokens, samples, chosen) for chosen in (None, model)]
            rows.append((name, samples / codec.sample_rate, tokens.shape[1], *sizes))
    print("| file | seconds | frames | raw bytes | compressed | saved |\n| --- | --- | --- | --- | --- | --- |")
    long = [row for row in rows if row[1] >= arguments.min_seconds]
    for title, chosen in ((f"{len(long)} of at least {arguments.min_seconds:g} s", long), (f"all {len(rows)}", rows)):
        for row in chosen if chosen is long else []:
            print(
                f"| {row[0]} | {row[1]:.2f} | {row[2]} | {row[3]} | {row[4]} | {100 - 100 * row[4] / row[3]:.1f} % |"
            )
        seconds, frames, raw, small = (sum(row[column] for row in chosen) for column in (1, 2, 3, 4))
        print(f"| {title} | {seconds:.2f} | {frames} | {raw} | {small} | **{100 - 100 * small / raw:.1f} %** |")
        kilobits = [8 * size / seconds / 1000 for size in (raw, small)]
        print(f"| kbit/s | | | {kilobits[0]:.3f} | {kilobits[1]:.3f} | |")

    pieces = [tokens for _, tokens, samples in utterances if samples / codec.sample_rate >= arguments.min_seconds]
    frames = sum(piece.shape[1] for piece in pieces)
    print(
        "\n| frames per block | bits per frame: payload | payload, lengths and CRC | uncompressed, lengths and CRC |\n"
        "| --- | --- | --- | --- |"
    )
    for block in BLOCKS:
        payload = whole = raw = 0
        for piece in pieces:
            data = stream(metadata, piece, model, block)
            count = -(-piece.shape[1] // block)
            head = 9 + int.from_bytes(data[5:8], "little") + 4
            whole += len(data) - head - 20
            payload += len(data) - head - 20 - 12 * count
            raw += piece.shape[1] * metadata.bytes_per_frame + 8 * count
        print(f"| {block} | {8 * payload / frames:.2f} | {8 * whole / frames:.2f} | {8 * raw / frames:.2f} |")

    random = np.random.default_rng(0).integers(0, codec.codebook_size, (codec.num_codebooks, RANDOM_FRAMES))
    sizes = [len(stream(metadata, random, chosen, 256)) for chosen in (None, model)]
    print(f"\n{RANDOM_FRAMES} random frames: {sizes[0]} bytes raw, {sizes[1]} compressed\n")

    tokens = np.tile(np.concatenate(pieces, axis=1), (1, -(-SPEED_FRAMES // frames)))[:, :SPEED_FRAMES]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.lfr")
        result = {}
        for name, block in (("files (blocks of 256)", 256), ("frame by frame", 1)):
            data = stream(metadata, tokens, model, block)
            path.write_bytes(data)
            result[f"encode, {name}"] = speed(
                SPEED_FRAMES, codec.frame_rate, lambda block=block: stream(metadata, tokens, model, block)
            )
            result[f"decode, {name}, one after the other"] = speed(
                SPEED_FRAMES,
                codec.frame_rate,
                lambda data=data: list(TokenStreamReader(io.BytesIO(data), "a", model).blocks()),
            )
            with TokenReader(path, model=model) as reader:
                result[f"decode, {name}, side by side"] = speed(SPEED_FRAMES, codec.frame_rate, reader.read)
        peaks = []
        for times in (1, 4):
            path.write_bytes(stream(metadata, np.tile(tokens, (1, times)), model, 256))
            tracemalloc.start()
            with TokenReader(path, model=model) as reader:
                for _ in reader.blocks():
                    pass
            peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
            tracemalloc.stop()
    for name, value in result.items():
        print(f"| {name} | {value:.0f}x real time |")
    lengths = " and ".join(f"{times * SPEED_FRAMES / codec.frame_rate:.0f} s" for times in (1, 4))
    print(f"| memory to decode {lengths}, block by block | {peaks[0]:.1f} and {peaks[1]:.1f} MiB |")
    print(json.dumps({name: round(value, 1) for name, value in result.items()}))


if __name__ == "__main__":
    main()
