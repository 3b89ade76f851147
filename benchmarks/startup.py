"""Startup time until the first tokens, for the standalone API and stock NeMo.

    python benchmarks/startup.py [--checkpoint FILE.nemo] [--runs 5]

Each run is a new process that imports the package, loads a checkpoint and encodes one second of audio. The two
implementations alternate, and their tokens must be equal. Without --checkpoint, two full-size checkpoints with random
weights are written first: one with the discriminators of the released checkpoint, and one without them.
`nemo-lfr --help` is timed as well.
"""

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.measure import alone, in_turns, machine, ratios, spread
from tests.models import FULL_SIZE, codec_config, speech_like, write_nemo

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
import zlib
print(zlib.crc32(tokens.int().numpy().tobytes()), round(peak()))
"""
HELP = """
import sys
from nemo_lfr.cli.main import main
sys.argv = ["nemo-lfr", "--help"]
main()
"""


def write_released(folder: Path) -> Path:
    """Write a full-size NeMo checkpoint with discriminators and random weights."""
    from nemo.collections.tts.models.audio_codec import AudioCodecModel
    from omegaconf import OmegaConf
    from transformers import WavLMConfig, WavLMModel

    from benchmarks.training import released_config

    torch.manual_seed(0)
    WavLMModel(WavLMConfig()).save_pretrained(folder / "wavlm")
    model = AudioCodecModel(OmegaConf.create(released_config(str(folder / "wavlm"))))
    model.save_to(str(folder / "released.nemo"))
    return folder / "released.nemo"


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder, "clip.npy")
        np.save(clip, speech_like(22050).numpy())
        checkpoints = {"as given": args.checkpoint}
        if args.checkpoint is None:
            checkpoints = {
                "without discriminators": write_nemo(Path(folder, "full.nemo"), codec_config(**FULL_SIZE)),
                "with all discriminators": write_released(Path(folder)),
            }
        print(f"{machine()}\n\n| | seconds | peak memory |\n| --- | --- | --- |")
        for title, checkpoint in checkpoints.items():
            reports: dict[str, list[list[str]]] = {"stock NeMo": [], "nemo_lfr": []}
            scripts = {"stock NeMo": STOCK, "nemo_lfr": LIGHT}

            def run(
                name: str,
                checkpoint: Path = checkpoint,
                scripts: dict[str, str] = scripts,
                reports: dict[str, list[list[str]]] = reports,
            ) -> None:
                reports[name].append(alone(scripts[name] + REPORT, checkpoint, clip))

            took = in_turns({name: partial(run, name) for name in scripts}, args.runs)
            if len({checksum for lines in reports.values() for checksum, _ in lines}) != 1:
                raise SystemExit("the tokens differ")
            for name, values in took.items():
                memory = max(int(mib) for _, mib in reports[name])
                print(f"| {name}, a checkpoint {title} | {spread(values)} | {memory} MiB |")
            print(f"| ratio | {spread(ratios(*took.values()), 1)} | |", flush=True)
        took = in_turns({"help": partial(alone, HELP)}, args.runs)
        print(f"| `nemo-lfr --help` | {spread(took['help'])} | |")


if __name__ == "__main__":
    main()
