"""The original recording, as a reference for the metrics."""

import numpy as np

from nemo_lfr.evaluation.codecs import register_codec
from nemo_lfr.evaluation.codecs.base import ComparedCodec, RoundTrip


@register_codec
class Original(ComparedCodec):
    """Identity codec, which shows the best value of each metric. Its file size is that of a 16-bit WAV file."""

    kind, usage = "original", "original (the recording itself)"
    name, identity = "original", "original"

    def round_trip(self, audio: np.ndarray, rate: int) -> RoundTrip:
        """Return the audio unchanged."""
        return RoundTrip(audio, 2 * len(audio), 2 * len(audio) + 44, 0.0, 0.0)
