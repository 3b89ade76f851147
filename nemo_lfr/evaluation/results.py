"""Results of an evaluation, from which tables and plots are made."""

from dataclasses import dataclass, field
from pathlib import Path

from nemo_lfr.evaluation.metrics import NotMeasured, Value
from nemo_lfr.io.manifests import Recording


@dataclass
class Result:
    """Results of one codec.

    Attributes:
        name: name of the codec in tables.
        delay: delay of the codec's output in seconds; the stored audio is already shifted by this delay.
        levels: number of FSQ levels of each dimension; see `ComparedCodec`.
        folder: folder that contains the codec's outputs and journals.
        round_trips: for each recording key, a dictionary with the duration in seconds ("seconds"), the sizes in bytes
            ("num_bytes", "file_bytes") and the times in seconds ("encode_seconds", "decode_seconds"). If an entropy
            model is available, the dictionary also contains the number of frames ("frames") and the sizes in bytes
            after compression ("compressed_bytes", "compressed_file_bytes").
        values: for each recording key, the values of the metrics by name.
        failures: error message of each recording that failed, by key.
    """

    name: str
    delay: float
    levels: tuple[int, ...]
    folder: Path
    round_trips: dict[str, dict[str, float]] = field(default_factory=dict)
    values: dict[str, dict[str, Value]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def audio(self, key: str) -> Path:
        """Return the path of the audio that the codec produced from a recording."""
        return self.folder / f"{key}.wav"

    def tokens(self, key: str) -> Path:
        """Return the path of the tokens that the codec produced from a recording."""
        return self.folder / f"{key}.npy"


@dataclass
class Evaluation:
    """Results of all codecs on one selection of recordings.

    Attributes:
        recordings: recordings by key.
        rate: sample rate of the comparison in Hz.
        results: results of each codec.
        absent: reason for each metric that is not available, by metric name.
        models: name of the model for each metric that a model computes, by metric name.
        failed_models: reason for each requested model that could not be loaded, by kind of model, such as "asr".
    """

    recordings: dict[str, Recording]
    rate: int
    results: list[Result]
    absent: dict[str, NotMeasured] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    failed_models: dict[str, str] = field(default_factory=dict)
