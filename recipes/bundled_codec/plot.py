"""Plot the evaluation curves of one or more runs.

python -m recipes.bundled_codec.plot runs/bundled runs/other --out curves.png
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_lfr.io.locate import expand_home

PANELS = {
    "pesq": "PESQ-WB (MOS)",
    "estoi": "ESTOI",
    "log_mel": "log-mel distance",
    "f0_error": "F0 error (cents)",
    "within_50_cents": "voiced frames within 50 cents (%)",
    "voicing_error": "voicing error (%)",
}


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Read the evaluations in a run's `curve.jsonl`.

    Args:
        path: the file, or the folder of the run.

    Returns:
        A list with one dictionary per evaluation.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is empty, or is not in JSON lines.
    """
    file = path / "curve.jsonl" if path.is_dir() else path
    try:
        points = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(
            f"{file}: not in JSON lines ({error}); pass the folder of a run, or its curve.jsonl."
        ) from error
    if not points:
        raise ValueError(f"{file}: no evaluations yet; train until the first evaluation.")
    return points


def draw(curves: Mapping[str, Sequence[Mapping[str, Any]]], out: Path, against: str = "step") -> None:
    """Plot every metric of every run.

    Args:
        curves: dict from the name of each run to its evaluations.
        out: image file to write.
        against: quantity on the x axis, "step" or "minutes".
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for axis, (metric, title) in zip(axes.flat, PANELS.items(), strict=True):
        for name, points in curves.items():
            seen = [(point[against], point[metric]) for point in points if point.get(metric) is not None]
            if seen:
                axis.plot(*zip(*seen, strict=True), marker=".", label=name)
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("updates" if against == "step" else "minutes of training")
    if len(curves) > 1:
        axes.flat[0].legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=expand_home, nargs="+", help="folders of runs, or their curve.jsonl files")
    parser.add_argument("--out", type=expand_home, required=True, help="output PNG file")
    parser.add_argument("--against", choices=("step", "minutes"), default="step", help="x axis (default %(default)s)")
    args = parser.parse_args()
    try:
        draw({str(path): read_curve(path) for path in args.runs}, args.out, args.against)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(args.out)


if __name__ == "__main__":
    main()
