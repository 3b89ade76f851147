"""Peak memory of encoding and decoding by duration, compared with stock NeMo.

    python benchmarks/memory.py [--model FILE.nemo] [--seconds 60 600] [--stock-seconds 60]

Each measurement runs in a new process, which loads a checkpoint and processes two seconds of audio. The process then
measures its resident memory (the loaded model), and processes the recording. nemo_lfr reads the recording from a file
and writes the result to a file. NeMo processes the recording in one call under `no_grad`, which needs tens of GiB for
ten minutes of audio. Without --model, a full-size checkpoint with random weights is written first. At most one in ten
thousand tokens may differ from NeMo's, because of rounding ties.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import soundfile

from benchmarks.measure import alone, machine

START = """
import ctypes, sys, time
import numpy as np, soundfile

def loaded():
    global whole
    ctypes.CDLL(None).malloc_trim(0)
    whole = peak()
    open("/proc/self/clear_refs", "w").write("5")  # the peak restarts
    return peak()

model, wave, tokens, audio, side = sys.argv[1:]
clip = np.random.default_rng(0).standard_normal(44100).astype(np.float32) / 10
"""
OURS = """
import nemo_lfr
from nemo_lfr.codec.cpu.malloc import configure_malloc
configure_malloc()  # as the command line does
codec = nemo_lfr.load(model, device="cpu")
short = codec.encode(clip)[0]
if side == "decode":
    codec.decode(short)
before, started = loaded(), time.perf_counter()
codec.encode_file(wave, tokens) if side == "encode" else codec.decode_file(tokens, audio)
"""
STOCK = """
import torch
from nemo.collections.tts.models import AudioCodecModel
codec = AudioCodecModel.restore_from(model, map_location="cpu").eval()
codec.discriminator = None
with torch.no_grad():
    rows = torch.from_numpy(clip)[None]
    short, frames = codec.encode(audio=rows, audio_len=torch.tensor([rows.shape[1]]))
    if side == "decode":
        codec.decode(tokens=short, tokens_len=frames)
    before, started = loaded(), time.perf_counter()
    if side == "encode":
        rows = torch.from_numpy(soundfile.read(wave, dtype="float32")[0])[None]
        found, _ = codec.encode(audio=rows, audio_len=torch.tensor([rows.shape[1]]))
        np.save(tokens, found[0].numpy())
    else:
        rows = torch.from_numpy(np.load(tokens))[None]
        heard, _ = codec.decode(tokens=rows, tokens_len=torch.tensor([rows.shape[2]]))
        soundfile.write(audio, heard[0].numpy(), 22050)
"""
END = """
print(peak() - before, max(whole, peak()), time.perf_counter() - started)
"""


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seconds", type=int, nargs="+", default=[60, 600])
    parser.add_argument("--stock-seconds", type=int, nargs="*", default=[60])
    args = parser.parse_args()
    from nemo_lfr.io.token_file import TokenReader
    from tests.models import FULL_SIZE, RATE, codec_config, synthesize, write_nemo

    print(machine())
    print("\n| | audio, s | peak memory beyond the loaded model | peak memory of the process | time |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = args.model or write_nemo(root / "full.nemo", codec_config(**FULL_SIZE))
        minute = synthesize(60.0)
        for seconds in args.seconds:
            wave = root / f"{seconds}.wav"
            with soundfile.SoundFile(wave, "w", RATE, 1) as file:
                for start in range(0, seconds, 60):
                    file.write((0.7 + 0.3 * np.cos(start)) * minute[: (seconds - start) * RATE])
            kinds = {"nemo_lfr": (OURS, root / f"{seconds}.lfr")}
            if seconds in args.stock_seconds:
                kinds["stock NeMo"] = (STOCK, root / f"{seconds}.npy")
            for name, (script, tokens) in kinds.items():
                for side in ("encode", "decode"):
                    out = root / f"{name}.wav"
                    grown, peak, took = map(float, alone(START + script + END, model, wave, tokens, out, side))
                    print(
                        f"| {name}, {side} | {seconds} | {grown:.0f} MiB | {peak:.0f} MiB | {took:.1f} s |", flush=True
                    )
                    if side == "decode":
                        out.unlink()
            if len(kinds) == 2:
                with TokenReader(root / f"{seconds}.lfr") as reader:
                    own = reader.read()
                expected = np.load(root / f"{seconds}.npy")
                differ = int((own != expected).sum())
                assert differ <= expected.size // 10000, differ
                print(f"| tokens that differ | {seconds} | {differ} of {expected.size} | | |")


if __name__ == "__main__":
    main()
