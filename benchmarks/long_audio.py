"""Memory of an hour-long file through the light door, and tokens against the one-piece encoding.

    python benchmarks/long_audio.py [--minutes 60] [--model FILE.nemo]

Writes noise-modulated harmonics to a temporary file, encodes it from disk to disk and decodes it back, and prints the
peak memory above the loaded model; then compares a two-minute file with the encoding of its samples in one piece.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nemo_lfr
from nemo_lfr.tokens.format import TokenReader
from tests.models import speech_like


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def write_speech(path: Path, seconds: int) -> None:
    block = speech_like(60 * 22050).numpy()
    with soundfile.SoundFile(path, "w", 22050, 1) as file:
        for start in range(0, seconds, 60):
            gain = 0.5 + 0.5 * np.cos(start)
            file.write((gain * block)[: (seconds - start) * 22050])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--model", help="a .nemo; the embedded codec if not given")
    args = parser.parse_args()
    codec = nemo_lfr.load(args.model, device="cpu")
    codec.decode(codec.encode(speech_like(22050))[0])
    before = peak_mib()
    with tempfile.TemporaryDirectory() as folder:
        long, tokens, back = (Path(folder, name) for name in ("long.flac", "long.lfr", "back.flac"))
        write_speech(long, args.minutes * 60)
        started = time.perf_counter()
        samples = codec.encode_file(long, tokens)
        encoded = time.perf_counter()
        codec.decode_file(tokens, back)
        decoded = time.perf_counter()
        assert soundfile.info(back).frames == samples
        print(
            f"{samples / 22050 / 60:.0f} min: encoded in {encoded - started:.0f} s, "
            f"decoded in {decoded - encoded:.0f} s, {tokens.stat().st_size} bytes, "
            f"peak {peak_mib() - before} MiB above the model's {before} MiB"
        )
        short = Path(folder, "short.wav")
        write_speech(short, 120)
        codec.encode_file(short, tokens, overwrite=True)
        with TokenReader(tokens) as reader:
            chunked = reader.read()
        codec.chunk_frames = 1 << 20
        whole = codec.encode(soundfile.read(short, dtype="float32")[0])[0][0].numpy()
        print(f"2 min in one piece: {int((whole != chunked).sum())} of {whole.size} tokens differ")


if __name__ == "__main__":
    main()
