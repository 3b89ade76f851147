"""Comparison of ONNX Runtime and PyTorch: agreement, speed and memory.

    python benchmarks/onnx_runtime.py [MANIFEST] [--model FILE.nemo] [--threads 1] [--rounds 5]

MANIFEST lists speech recordings (default: the clip inside the package), which both backends encode and decode. Tokens
must be equal except for rounding ties, and audio must agree within 1e-4. Speed is measured on recordings of 1, 10 and
60 s in alternating rounds. The table shows medians and their ratio. Memory is the peak of a new process that encodes
and decodes 60 s.
"""

import argparse
import os
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SECONDS = (1, 10, 60)
ALONE = """
import sys
import numpy as np
import nemo_lfr
codec = nemo_lfr.load(sys.argv[1] or None, "cpu")
wave = np.random.default_rng(0).standard_normal(60 * codec.sample_rate).astype(np.float32) / 10
codec.decode(codec.encode(wave[: 3 * codec.sample_rate])[0])
codec.decode(codec.encode(wave)[0])
print(round(peak()))
"""


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", nargs="?", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)

    import numpy as np
    import onnxruntime
    import torch

    from benchmarks.measure import alone, in_turns, machine, ratios, spread
    from benchmarks.streaming import read
    from nemo_lfr.cli.demo import demo_clip
    from nemo_lfr.codec.cpu.malloc import configure_malloc
    from nemo_lfr.codec.onnx.export import export_onnx
    from nemo_lfr.io.manifests import read_manifest
    from nemo_lfr.pretrained import load
    from tests.reference import assert_same_tokens

    torch.set_num_threads(arguments.threads)
    configure_malloc()
    codec = load(arguments.model, "cpu")
    paths = [demo_clip()]
    if arguments.manifest is not None:
        paths = [line.path for line in read_manifest(arguments.manifest, arguments.manifest.parent)]
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(codec, folder)
        exported = load(folder, "cpu", backend="onnx")
        ties, worst, total, last = 0, 0.0, 0, np.zeros(0, np.float32)
        for path in paths:
            wave = read(path, codec.sample_rate)
            tokens, found = codec.encode(wave)[0], exported.encode(wave)[0]
            ties += assert_same_tokens(codec, wave, torch.from_numpy(found[0]), tokens[0])
            audio, heard = codec.decode(tokens)[0].numpy(), exported.decode(tokens.numpy())[0]
            worst = max(worst, float(np.abs(audio - heard).max()))
            total += found.size
            last = np.concatenate([last, wave])
        assert worst < 1e-4, worst
        print(f"{len(paths)} recordings, {total} tokens: {ties} ties; audio within {worst:.1e}")
        print(f"\n| {arguments.threads} threads | PyTorch | ONNX Runtime | ratio |\n| --- | --- | --- | --- |")
        for seconds in SECONDS:
            wave = np.resize(last, seconds * codec.sample_rate)
            tokens = codec.encode(wave)[0].numpy()
            for name, ways in (
                ("encode", (partial(codec.encode, wave), partial(exported.encode, wave))),
                ("decode", (partial(codec.decode, tokens), partial(exported.decode, tokens))),
            ):
                ours, theirs = in_turns(dict(zip(("ours", "theirs"), ways, strict=True)), arguments.rounds).values()
                times = f"{statistics.median(ours):.3f} s | {statistics.median(theirs):.3f} s"
                print(f"| {name} {seconds} s | {times} | {spread(ratios(ours, theirs))} |", flush=True)
        peaks = [alone(ALONE, source)[-1] for source in (arguments.model or "", folder)]
        print(f"| peak memory, 60 s | {peaks[0]} MiB | {peaks[1]} MiB | |")
    print(f"\n{machine()}, onnxruntime {onnxruntime.__version__}")


if __name__ == "__main__":
    main()
