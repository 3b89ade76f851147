"""Base class for metrics that trained models compute."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from nemo_lfr.evaluation.metrics import Metric, Signal, Value


class ModelMetric(ABC):
    """Base class for metrics that a trained model computes.

    Attributes:
        kind: name of this class in `--model-metric`, such as "asr".
        metrics: descriptions of the metrics that the model computes, by name.
        automatic: whether the model is loaded even if it is not requested.
        option: command-line option that requests the model, such as "--asr"; an empty string if there is only
            `--model-metric`.
        name: name of the loaded model. The report shows it, and results are stored under this name.

    Args:
        source: model to load, in a form that the subclass defines; an empty string for its default model.
        device: PyTorch device.

    Raises:
        Exception: if the model is not available. Any class of exception is allowed.
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
        """Compute the metrics for one pair of recordings.

        Args:
            original: original recording.
            output: reconstruction, with the rate and length of `original`.
            labels: labels of the recording in the manifest. Stored results are computed again only if "text" or "lang"
                has changed, so `measure` should not depend on other labels.

        Returns:
            The value of each metric in `metrics`, or a `NotMeasured` with the reason.
        """
