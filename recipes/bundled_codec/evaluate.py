"""Evaluate codecs on held-out speech: quality, intelligibility, pitch and voicing.

    python -m recipes.bundled_codec.evaluate bundled.nemo runs/bundled/state.pt --valid speech/valid.json

The command prints the mean of each metric over the recordings, with a 95 % bootstrap confidence interval. The same
metrics are computed during training. Use `nemo-lfr evaluate` to compare with other codecs, to measure word error
rates, or to listen to examples.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from nemo_lfr.evaluation import metrics
from nemo_lfr.evaluation.metrics import NotMeasured, Signal
from nemo_lfr.evaluation.tables import Mean
from nemo_lfr.io.locate import expand_home
from nemo_lfr.training.components import AudioTerms
from recipes.bundled_codec.data import FULL_SCALE, read_speech
from recipes.bundled_codec.losses import LogMelDistance, LossConfig
from recipes.bundled_codec.model import SAMPLE_RATE, Generator
from recipes.bundled_codec.states import read_generator

CLOSE_CENTS = 50
# Number of decimal places of each metric in the table
METRICS = {"pesq": 2, "estoi": 3, "log_mel": 3, "f0_error": 0, "within_50_cents": 1, "voicing_error": 1}

# Keys in a line of `curve.jsonl` that are not metrics
CURVE_KEYS = ("step", "minutes", "seconds_per_update", "parts", "training")


class Evaluator:
    """Evaluator that measures generators on a fixed set of recordings.

    Args:
        clips: for each recording, an array [T_audio] of int16 samples at 22.05 kHz.
        custom: dict from the name of each additional metric to its config section; see `nemo_lfr.training.components`.

    Raises:
        ConfigError: if a metric in `custom` cannot be built.
    """

    def __init__(self, clips: Sequence[np.ndarray], custom: Mapping[str, Any] | None = None) -> None:
        self.custom = AudioTerms(custom, "metrics", reserved=(*METRICS, *CURVE_KEYS))
        self.originals = [Signal(clip.astype(np.float32) / FULL_SCALE, SAMPLE_RATE) for clip in clips]
        config = LossConfig()
        self.log_mel = LogMelDistance(config.windows, config.num_mels)

    @torch.no_grad()
    def measure(self, generator: Generator) -> list[dict[str, float]]:
        """Compute the metrics of each recording.

        Args:
            generator: generator to evaluate.

        Returns:
            One dict per recording, from names of metrics to values. A metric that is not defined for the recording is
            NaN.
        """
        return [self._compare(original, _reconstruct(generator, original)) for original in self.originals]

    def _compare(self, original: Signal, output: Signal) -> dict[str, float]:
        values = {
            "pesq": metrics.pesq_wb(original, output),
            "estoi": metrics.estoi(original, output),
            "log_mel": self.log_mel(original.spectra, output.spectra).item(),
            "f0_error": metrics.f0_error(original, output),
            "within_50_cents": within_cents(original, output),
            "voicing_error": metrics.voicing_error(original, output),
        }
        measured = {name: float("nan") if isinstance(value, NotMeasured) else value for name, value in values.items()}
        return measured | {
            name: value.item() for name, value in self.custom(original.spectra, output.spectra, None).items()
        }


def within_cents(original: Signal, output: Signal, cents: float = CLOSE_CENTS) -> float:
    """Return the percentage of voiced frames in which the F0 of the output is close to that of the original.

    Args:
        original: recording.
        output: reconstruction.
        cents: maximum difference in F0, in cents.

    Returns:
        Percentage of the voiced frames in the original that are voiced in the output and whose F0 differs by less than
        `cents`; NaN if no frame in the original is voiced.
    """
    (f0, voiced), (f0_output, voiced_output) = original.pitch, output.pitch
    both = voiced & voiced_output
    close = np.abs(1200 * np.log2(f0_output[both] / f0[both])) < cents
    return 100 * float(close.sum() / voiced.sum()) if voiced.any() else float("nan")


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the recordings for which the metric is defined.

    The mean is NaN if there is no such recording.
    """
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {
        name: float(np.nanmean(column)) if np.isfinite(column).any() else float("nan")
        for name, column in columns.items()
    }


def _reconstruct(generator: Generator, original: Signal) -> Signal:
    """Reconstruct an entire recording in fp32."""
    device = next(generator.parameters()).device
    samples = len(original.wave)
    num_frames = -(-samples // generator.samples_per_frame)
    audio = torch.zeros(1, num_frames * generator.samples_per_frame)
    audio[0, :samples] = torch.from_numpy(original.wave)
    # With benchmark=True, cuDNN would run a benchmark for the length of each recording.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False):
        output, _, _ = generator(audio.to(device))
    return Signal(output[0, :samples].cpu().numpy(), SAMPLE_RATE)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models",
        type=expand_home,
        nargs="+",
        help=".nemo files, or state.pt files of runs (their averaged weights are evaluated)",
    )
    parser.add_argument("--valid", type=expand_home, required=True, help="NeMo manifest of held-out speech")
    parser.add_argument("--clips", type=int, help="maximum number of recordings, evenly spaced (default all)")
    parser.add_argument("--threads", type=int, help="number of PyTorch threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        clips = spread_evenly(read_speech(args.valid), args.clips)
        if not clips:
            raise ValueError(f"{args.valid}: no usable recordings; write a manifest with `nemo-lfr prepare`.")
        generators = [read_generator(path)[0] for path in args.models]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    evaluator = Evaluator(clips)
    print("| model | " + " | ".join(METRICS) + " |")
    print("| --- " * (1 + len(METRICS)) + "|")
    for path, generator in zip(args.models, generators, strict=True):
        rows = evaluator.measure(generator)
        cells = []
        for name, digits in METRICS.items():
            values = [row[name] for row in rows if np.isfinite(row[name])]
            cells.append(Mean.of(values).text(digits) if values else "-")
        print(f"| {path} | " + " | ".join(cells) + " |", flush=True)


def spread_evenly(clips: Sequence[np.ndarray], count: int | None) -> list[np.ndarray]:
    """Return at most `count` clips, evenly spaced in the list; all clips if `count` is None."""
    step = 1 if count is None else max(1, len(clips) // count)
    return list(clips[::step][:count])


if __name__ == "__main__":
    main()
