"""The codec Opus, run with the programs of opus-tools."""

import tempfile
from pathlib import Path

import numpy as np
import soundfile

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.evaluation.codecs import register_codec
from nemo_lfr.evaluation.codecs.base import ComparedCodec, RoundTrip, fit, parse_number
from nemo_lfr.evaluation.codecs.programs import program_version, run_timed


@register_codec
class Opus(ComparedCodec):
    """Opus with a variable bit rate. `--codec opus:N` has a target of N kbit/s.

    The programs opusenc and opusdec (Debian package opus-tools) encode and decode with default settings.
    """

    kind = "opus"
    usage = "opus:KBIT"

    def __init__(self, options: str = "", device: str | None = None) -> None:
        self.kilobits = parse_number(options, self.kind, 6, 256, "kbit/s")
        self.name = f"Opus {options} kbit/s"
        self.identity = program_version("opusenc", "opus-tools", "--version")

    def round_trip(self, audio: np.ndarray, rate: int) -> RoundTrip:
        """Encode and decode audio [T] with opusenc and opusdec."""
        with tempfile.TemporaryDirectory() as name:
            source, coded, decoded = (Path(name, file) for file in ("in.wav", "coded.opus", "out.wav"))
            soundfile.write(source, audio, rate, subtype="PCM_16")
            encode = run_timed("opusenc", "--quiet", "--bitrate", str(self.kilobits), str(source), str(coded))
            decode = run_timed("opusdec", "--quiet", "--float", "--rate", str(rate), str(coded), str(decoded))
            output, _ = soundfile.read(decoded, dtype="float32")
            return RoundTrip(
                fit(output, len(audio)), ogg_payload(coded.read_bytes()), coded.stat().st_size, encode, decode
            )


def ogg_payload(data: bytes) -> int:
    """Count the bytes of the audio packets in an Ogg Opus file.

    The page headers (RFC 3533) and the first two packets, which contain a header and tags, are not counted.

    Raises:
        NemoLfrError: if the data is not an Ogg file.
    """
    position, packets, size = 0, 0, 0
    while position < len(data):
        if data[position : position + 4] != b"OggS":
            raise NemoLfrError("the output of opusenc is not an Ogg file; install opus-tools again.")
        count = data[position + 26]
        for lacing in data[position + 27 : position + 27 + count]:
            if packets >= 2:
                size += lacing
            packets += lacing < 255
            position += lacing
        position += 27 + count
    return size
