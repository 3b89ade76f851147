"""Mean quality of a codec over the recordings of a NeMo manifest, with 95 % bootstrap intervals over recordings.

python benchmarks/quality.py MANIFEST [--model FILE.nemo] [--limit N]
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nemo_lfr
from nemo_lfr.audio import AudioReader
from nemo_lfr.evaluation.metrics import QUICK, Signal, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--model", help="a .nemo file or a Hub id; the embedded codec if not given")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    codec = nemo_lfr.load(args.model, "cpu")
    columns: dict[str, list[float]] = {}
    entries = [json.loads(line) for line in args.manifest.read_text().splitlines()][: args.limit]
    for entry in entries:
        with AudioReader(args.manifest.parent / entry["audio_filepath"], codec.sample_rate) as reader:
            audio = np.concatenate(list(reader.blocks()))
        tokens, tokens_len = codec.encode(audio)
        output, _ = codec.decode(tokens, tokens_len, audio_len=[len(audio)])
        pair = (Signal(wave, codec.sample_rate) for wave in (audio, output[0].numpy()))
        for name, value in measure(*pair, QUICK).items():
            if isinstance(value, float):
                columns.setdefault(name, []).append(value)
    print(f"{codec!r}, {len(entries)} recordings of {args.manifest}")
    rng = np.random.default_rng(0)
    for name, values in columns.items():
        means = rng.choice(values, (10_000, len(values))).mean(axis=1)
        low, high = np.quantile(means, (0.025, 0.975))
        print(f"{name:12} {np.mean(values):6.3f}  ({low:.3f} to {high:.3f})  of {len(values)}")


if __name__ == "__main__":
    main()
