"""Command `nemo-lfr demo`: encode and decode a speech clip, and print sizes, times and quality."""

import io
import json
import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemo_lfr.cli.options import UserPath, model_options, open_codec
from nemo_lfr.cli.terminal import print_table
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.atomic import sweep, write_bytes

if TYPE_CHECKING:
    import numpy as np

    from nemo_lfr.codec.codec import Codec


@click.command(short_help="Encode and decode an example recording.")
@click.option("--out", type=UserPath(file_okay=False), default=Path("demo_output"), show_default=True)
@model_options
def demo(out: Path, **options: Any) -> None:
    """Encode and decode a speech clip; write both, the tokens, and a picture of the spectrograms."""
    values = run(out, open_codec(options["model"], options["device"], options["precision"]))
    if options["as_json"]:
        click.echo(json.dumps(values, indent=2))
    else:
        print_table(values)


def demo_clip() -> Path:
    """Return the path of the bundled recording; weights/README.md names its source and license."""
    return Path(str(files("nemo_lfr") / "weights" / "speech.flac"))


def run(out: Path, codec: "Codec[Any]") -> dict[str, Any]:
    """Encode and decode the demo clip, and write the results into a folder.

    The files are original.wav, speech.lfr, decoded.wav and spectrograms.png. Existing files are replaced.

    Args:
        out: folder for the files; it is created.
        codec: codec to use; its sample rate must be that of the clip.

    Returns:
        Paths, sizes, times and quality by name, formatted for printing.

    Raises:
        NemoLfrError: if the codec has another sample rate than the clip.
    """
    import soundfile

    from nemo_lfr.evaluation.metrics import METRICS, QUICK, NotMeasured, Signal, measure
    from nemo_lfr.io.audio import AudioWriter

    out.mkdir(parents=True, exist_ok=True)
    original, tokens, decoded, picture = (
        out / name for name in ("original.wav", "speech.lfr", "decoded.wav", "spectrograms.png")
    )
    sweep(out, [path.name for path in (original, tokens, decoded, picture)])
    audio, rate = soundfile.read(demo_clip(), dtype="float32")
    if rate != codec.sample_rate:
        raise NemoLfrError(
            f"the demo clip is at {rate} Hz and this codec at {codec.sample_rate}; use nemo-lfr encode."
        )
    with AudioWriter(original, rate, overwrite=True) as writer:
        writer.write(audio)
    codec.decode(codec.encode(audio[:rate])[0])  # the first call sets up threads and kernels
    started = time.perf_counter()
    codec.encode_file(original, tokens, overwrite=True)
    encoded = time.perf_counter()
    codec.decode_file(tokens, decoded, overwrite=True)
    finished = time.perf_counter()
    output, _ = soundfile.read(decoded, dtype="float32")
    duration, size = len(audio) / rate, tokens.stat().st_size
    return {
        "codec": repr(codec),
        "original": f"{original}  ({duration:.2f} s, {2 * len(audio)} bytes of 16-bit samples)",
        "tokens": f"{tokens}  ({size} bytes, {2 * len(audio) / size:.0f} times smaller)",
        "decoded": str(decoded),
        "picture": draw(audio, output, rate, 8 * size / duration, picture),
        "bit rate": f"{8 * size / duration:.0f} bit/s in the file, of which {codec.bit_rate:.0f} are tokens",
        "encoding": f"{encoded - started:.2f} s, {duration / (encoded - started):.1f} times real time",
        "decoding": f"{finished - encoded:.2f} s, {duration / (finished - encoded):.1f} times real time",
    } | {
        name: value if isinstance(value, NotMeasured) else f"{value:.3f} {METRICS[name].unit}".rstrip()
        for name, value in measure(Signal(audio, rate), Signal(output, rate), QUICK).items()
    }


def draw(audio: "np.ndarray", output: "np.ndarray", rate: int, bit_rate: float, path: Path) -> str:
    """Draw the spectrograms of both waveforms, one above the other.

    Args:
        audio: original waveform, float32 [T_audio].
        output: decoded waveform, float32 [T_audio].
        rate: sample rate in Hz.
        bit_rate: bits per second of the token file, for the title.
        path: PNG file to write.

    Returns:
        The path, or the reason why no picture was drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        from nemo_lfr.evaluation.metrics import missing

        return missing("matplotlib").replace("measured", "drawn")
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for axis, wave, title in zip(
        axes, (audio, output), ("original", f"decoded from {bit_rate / 1000:.2f} kbit/s"), strict=True
    ):
        *_, image = axis.specgram(
            wave + 1e-6, NFFT=1024, Fs=rate, noverlap=768, mode="magnitude", scale="dB", vmin=-110, vmax=-30
        )
        axis.set_title(title, loc="left")
        axis.set_ylabel("frequency (kHz)")
        ticks = range(0, rate // 2, 2000)
        axis.set_yticks(ticks, [str(tick // 1000) for tick in ticks])
    axes[1].set_xlabel("time (s)")
    figure.colorbar(image, ax=axes, label="magnitude (dB)")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return str(write_bytes(path, picture.getvalue()))
