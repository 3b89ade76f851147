"""The codec Codec2, run with its command-line programs."""

import tempfile
from pathlib import Path

import numpy as np

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.evaluation.codecs import register_codec
from nemo_lfr.evaluation.codecs.base import ComparedCodec, RoundTrip, fit, resample_to
from nemo_lfr.evaluation.codecs.programs import program_version, run_timed

# Delay of the output in seconds, by bit rate. Codec2's programs do not compensate for this delay. The delays with the
# best ESTOI and mel distance were searched for in steps of 1 ms.
DELAYS = {mode: 0.02 for mode in ("3200", "2400", "1600", "1400", "1300", "1200")} | {"700C": 0.03}


@register_codec
class Codec2(ComparedCodec):
    """Codec2 at a sample rate of 8 kHz. `--codec codec2:N` encodes at N bit/s.

    It needs the programs c2enc and c2dec, for example from the Debian package codec2.
    """

    kind = "codec2"
    usage = "codec2:BIT"

    def __init__(self, options: str = "", device: str | None = None) -> None:
        if options not in DELAYS:
            modes = ", ".join(f"codec2:{mode}" for mode in DELAYS)
            raise NemoLfrError(f"--codec codec2{options and f':{options}'}: unknown bit rate; use one of {modes}.")
        self.mode, self.delay = options, DELAYS[options]
        self.name = f"Codec2 {options} bit/s"
        self.identity = f"{program_version('c2enc', 'codec2')} {options}"

    def round_trip(self, audio: np.ndarray, rate: int) -> RoundTrip:
        """Encode and decode audio [T] with c2enc and c2dec."""
        with tempfile.TemporaryDirectory() as name:
            source, coded, decoded = (Path(name, file) for file in ("in.raw", "coded.bit", "out.raw"))
            # Pad the audio, since the encoder drops an incomplete last frame.
            padded = np.pad(resample_to(audio, rate, 8000), (0, 1000))
            (padded * 32767).clip(-32768, 32767).astype("<i2").tofile(source)
            encode = run_timed("c2enc", self.mode, str(source), str(coded))
            decode = run_timed("c2dec", self.mode, str(coded), str(decoded))
            output = np.fromfile(decoded, "<i2").astype(np.float32)[round(self.delay * 8000) :] / 32768
            # c2enc pads each frame to whole bytes. Count only the used bits.
            bits = {"700C": 28 / 32, "1300": 52 / 56}.get(self.mode, 1.0)
            file_bytes = coded.stat().st_size * len(audio) / rate * 8000 / len(padded)
            size = file_bytes * bits
            return RoundTrip(fit(resample_to(output, 8000, rate), len(audio)), size, file_bytes, encode, decode)
