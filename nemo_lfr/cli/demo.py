"""Command `nemo-lfr demo`: encode and decode a speech clip, and print sizes, times and quality."""

import io
import time
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemo_lfr.cli.command import Command
from nemo_lfr.cli.options import UserPath, model_options, open_codec
from nemo_lfr.cli.results import DemoResult
from nemo_lfr.cli.session import begin_work, note
from nemo_lfr.cli.table import print_table
from nemo_lfr.errors import NemoLfrError, install_command
from nemo_lfr.io.atomic import sweep, write_bytes

if TYPE_CHECKING:
    import numpy as np

    from nemo_lfr.codec.codec import Codec


@click.command(cls=Command, result=DemoResult, short_help="Encode and decode an example recording.")
@click.option(
    "--out",
    type=UserPath(file_okay=False),
    default=Path("demo_output"),
    show_default=True,
    help="Folder for the files.",
)
@model_options
def demo(out: Path, model: str | None, device: str | None, precision: str) -> dict[str, Any]:
    """Encode and decode a speech clip, and measure the result.

    The command writes the clip, its tokens, the decoded audio, and a picture with the spectrograms of the clip and of
    the decoded audio. Existing files are replaced.
    """
    codec = open_codec(model, device, precision, ["encode", "decode"])
    begin_work()
    values = run(out, codec)
    print_table(values)
    if find_spec("starlette") and find_spec("uvicorn"):
        note("nemo-lfr: to record and hear your own voice in a browser, run: nemo-lfr serve")
    else:
        packages = install_command("starlette", "uvicorn[standard]", "prometheus_client")
        note(f"nemo-lfr: to record and hear your own voice in a browser, run: {packages} && nemo-lfr serve")
    return values


# For each key in the JSON output, the name of the metric in `measure`.
QUALITY = {"pesq_wb": "PESQ-WB", "estoi": "ESTOI", "si_sdr_db": "SI-SDR"}


def _rounded(value: Any) -> float | None:
    """Round the value of a metric; return None if it was not measured."""
    return round(value, 4) if isinstance(value, float) else None


def demo_clip() -> Path:
    """Return the path of the bundled recording. weights/README.md gives the source and license of this recording."""
    return Path(str(files("nemo_lfr") / "weights" / "speech.flac"))


def run(out: Path, codec: "Codec[Any]") -> dict[str, Any]:
    """Encode and decode the demo clip, and write the results into a folder.

    The files are original.wav, speech.lfr, decoded.wav and spectrograms.png. Existing files are replaced.

    Args:
        out: folder for the files; created if it does not exist.
        codec: codec to use; it must have the same sample rate as the clip.

    Returns:
        The measurements as a dict with the keys of `DemoResult`.

    Raises:
        NemoLfrError: if the sample rate of the codec differs from that of the clip.
    """
    import soundfile

    from nemo_lfr.evaluation.metrics import QUICK, Signal, measure
    from nemo_lfr.io.audio import AudioWriter

    out.mkdir(parents=True, exist_ok=True)
    original, tokens, decoded, picture = (
        out / name for name in ("original.wav", "speech.lfr", "decoded.wav", "spectrograms.png")
    )
    sweep(out, [path.name for path in (original, tokens, decoded, picture)])
    audio, rate = soundfile.read(demo_clip(), dtype="float32")
    if rate != codec.sample_rate:
        raise NemoLfrError(
            f"the demo clip has a sample rate of {rate} Hz, but this codec runs at {codec.sample_rate} Hz; use "
            "nemo-lfr encode and decode instead."
        )
    with AudioWriter(original, rate, overwrite=True) as writer:
        writer.write(audio)
    codec.decode(codec.encode(audio[:rate], sample_rate=rate)[0])  # not timed: the first call is slower
    started = time.perf_counter()
    codec.encode_file(original, tokens, overwrite=True)
    encoded = time.perf_counter()
    codec.decode_file(tokens, decoded, overwrite=True)
    finished = time.perf_counter()
    output, _ = soundfile.read(decoded, dtype="float32")
    duration, size = len(audio) / rate, tokens.stat().st_size
    metrics = measure(Signal(audio, rate), Signal(output, rate), QUICK)
    for name, value in metrics.items():
        if not isinstance(value, float):
            note(f"nemo-lfr: {name} {value}")
    is_drawn = draw(audio, output, rate, 8 * size / duration, picture)
    return {
        "codec": codec.name,
        "original": str(original),
        "tokens": str(tokens),
        "decoded": str(decoded),
        "spectrograms": str(picture) if is_drawn else None,
        "duration_s": round(duration, 4),
        "original_bytes": 2 * len(audio),
        "token_file_bytes": size,
        "bit_rate_bps": round(8 * size / duration, 1),
        "codec_bit_rate_bps": round(codec.bit_rate, 1),
        "encode_s": round(encoded - started, 4),
        "decode_s": round(finished - encoded, 4),
        "encode_times_real_time": round(duration / (encoded - started), 2),
        "decode_times_real_time": round(duration / (finished - encoded), 2),
        "quality": {key: _rounded(metrics[name]) for key, name in QUALITY.items()},
    }


def draw(audio: "np.ndarray", output: "np.ndarray", rate: int, bit_rate: float, path: Path) -> bool:
    """Draw the spectrograms of both waveforms, one above the other.

    Args:
        audio: original waveform, float32 [T_audio].
        output: decoded waveform, float32 [T_audio].
        rate: sample rate, Hz.
        bit_rate: bit rate of the token file in bits per second, for the title.
        path: PNG file to write.

    Returns:
        Whether the picture was drawn; False if matplotlib is not installed.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError:
        note(f"nemo-lfr: no picture was drawn, because matplotlib is not installed: {install_command('matplotlib')}")
        return False
    picture = io.BytesIO()
    with style.context("default", after_reset=True):  # the user's settings may need LaTeX
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
        figure.savefig(picture, format="png", dpi=110)
    write_bytes(path, picture.getvalue())
    return True
