"""Common interface of the metrics that trained models compute."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from nemo_lfr.evaluation.metrics import Metric, Signal, Value


class ModelMetric(ABC):
    """Base class of metrics that are computed by a trained model.

    Attributes:
        kind: name of the model metric in `--model-metric`.
        metrics: description of each metric that the model computes, by name.
        automatic: whether the model is loaded without being requested.
        option: option of the command line that requests it, if it has one besides `--model-metric`.
        name: name of the loaded model, for the report. Results are stored under it.

    Args:
        source: model to load, as text whose form the subclass defines; an empty string for its default.
        device: PyTorch device.

    Raises:
        Exception: if the model is not available; the exception may be of any class.
    """

    kind: ClassVar[str]
    metrics: ClassVar[dict[str, Metric]]
    automatic: ClassVar[bool] = False
    option: ClassVar[str] = ""
    name: str

    def __init__(self, source: str, device: str) -> None:
        self.name = source or self.kind

    @abstractmethod
    def measure(self, original: Signal, output: Signal, labels: Mapping[str, Any]) -> dict[str, Value]:
        """Compute the metrics of one pair of recordings.

        Args:
            original: original recording.
            output: reconstruction, of the same rate and length.
            labels: manifest entry of the recording.

        Returns:
            The value of each of `metrics`, or a `NotMeasured` with the reason.
        """
