"""From nothing to the first tokens, as a user's process: the light door against stock NeMo.

    python benchmarks/startup.py [--checkpoint FILE.nemo] [--runs 5]

Each run is a fresh process that imports, loads a checkpoint without discriminators, and encodes one second; the two
kinds take turns. Tokens must be equal. Without --checkpoint, a full-size one with random weights is written first.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIGHT = """
import sys, numpy, nemo_lfr
codec = nemo_lfr.load(sys.argv[1], device="cpu")
tokens, _ = codec.encode(numpy.load(sys.argv[2]))
"""
STOCK = """
import sys, numpy, torch
from nemo.collections.tts.models import AudioCodecModel
model = AudioCodecModel.restore_from(sys.argv[1], map_location="cpu").eval()
audio = torch.from_numpy(numpy.load(sys.argv[2]))[None]
with torch.no_grad():
    tokens, _ = model.encode(audio=audio, audio_len=torch.tensor([audio.shape[1]]))
"""
REPORT = """
import resource, zlib
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(zlib.crc32(tokens.int().numpy().tobytes()), memory)
"""


def run(script: str, checkpoint: Path, clip: Path) -> tuple[float, str, int]:
    """Seconds of the whole process, a checksum of its tokens, peak memory in MiB."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script + REPORT, checkpoint, clip], capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - started
    checksum, memory = done.stdout.strip().splitlines()[-1].split()
    return seconds, checksum, int(memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    os.environ["PYTHONPATH"] = str(root)
    sys.path.insert(0, str(root))
    import numpy as np

    from tests.models import FULL_SIZE, codec_config, speech_like, write_nemo

    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder, "clip.npy")
        np.save(clip, speech_like(22050).numpy())
        checkpoint = args.checkpoint or write_nemo(Path(folder, "full.nemo"), codec_config(**FULL_SIZE))
        rows: dict[str, list[tuple[float, str, int]]] = {"nemo_lfr": [], "stock NeMo": []}
        for round_number in range(args.runs + 1):  # the first round warms the disk cache
            for (_, results), script in zip(rows.items(), (LIGHT, STOCK), strict=True):
                result = run(script, checkpoint, clip)
                if round_number:
                    results.append(result)
    if len({checksum for results in rows.values() for _, checksum, _ in results}) != 1:
        raise SystemExit("the tokens differ")
    medians = {name: statistics.median(seconds for seconds, _, _ in results) for name, results in rows.items()}
    for name, results in rows.items():
        times = [seconds for seconds, _, _ in results]
        print(
            f"{name:12} median {medians[name]:6.2f} s  ({min(times):.2f} to {max(times):.2f})  "
            f"peak memory {max(memory for _, _, memory in results)} MiB"
        )
    print(json.dumps({"ratio": round(medians["stock NeMo"] / medians["nemo_lfr"], 2), "machine": platform.machine()}))


if __name__ == "__main__":
    main()
