"""Results of an evaluation, as its tables and plots read them."""

from dataclasses import dataclass, field
from pathlib import Path

from nemo_lfr.evaluation.metrics import NotMeasured, Value
from nemo_lfr.io.manifests import Recording


@dataclass
class Result:
    """Results of one codec.

    Attributes:
        name: name of the codec in tables.
        delay: delay of the codec in seconds, which is compensated.
        levels: FSQ levels of the codebooks; see `ComparedCodec`.
        folder: folder of the codec's outputs and journals.
        round_trips: sizes and times by recording key: seconds, num_bytes, file_bytes, encode_seconds, decode_seconds.
            If an entropy model is available also frames, compressed_bytes, compressed_file_bytes.
        values: metrics by recording key.
        failures: error messages by recording key.
    """

    name: str
    delay: float
    levels: tuple[int, ...]
    folder: Path
    round_trips: dict[str, dict[str, float]] = field(default_factory=dict)
    values: dict[str, dict[str, Value]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def audio(self, key: str) -> Path:
        """Return the path of the codec's output for a recording."""
        return self.folder / f"{key}.wav"

    def tokens(self, key: str) -> Path:
        """Return the path of the tokens of a recording."""
        return self.folder / f"{key}.npy"


@dataclass
class Evaluation:
    """Results of all codecs on one selection of recordings.

    Attributes:
        recordings: recordings by key.
        rate: sample rate of the comparison in Hz.
        results: results of each codec.
        absent: reason for each metric that is not available.
        models: name of the model for each model-based metric.
        failed_models: kind of each requested model that could not be loaded, with the reason.
    """

    recordings: dict[str, Recording]
    rate: int
    results: list[Result]
    absent: dict[str, NotMeasured] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    failed_models: dict[str, str] = field(default_factory=dict)
