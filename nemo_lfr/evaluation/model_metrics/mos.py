"""Mean opinion scores that a model estimates."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from nemo_lfr.evaluation.metrics import Metric, Signal, Value
from nemo_lfr.evaluation.model_metrics import register_model_metric
from nemo_lfr.evaluation.model_metrics.base import ModelMetric

SQUIM_MOS = "Squim MOS"
WEIGHTS = "squim_subjective_bvcc_daps.pth"


@register_model_metric
class Squim(ModelMetric):
    """Mean opinion score that torchaudio's SQUIM_SUBJECTIVE estimates.

    Args:
        source: not used, since there is only one model.
        device: PyTorch device.

    Raises:
        FileNotFoundError: if the weights were not downloaded before.
    """

    kind = "squim"
    automatic = True
    metrics: ClassVar[dict[str, Metric]] = {
        SQUIM_MOS: Metric(
            "MOS",
            "higher",
            "torchaudio's SQUIM_SUBJECTIVE at 16 kHz, with the original as reference (as in NVIDIA's evaluation).",
            digits=2,
        )
    }
    name = "torchaudio SQUIM_SUBJECTIVE"

    def __init__(self, source: str, device: str) -> None:
        import torch
        from torchaudio.pipelines import SQUIM_SUBJECTIVE

        path = Path(torch.hub.get_dir(), "torchaudio", "models", WEIGHTS)  # where `get_model` downloads it to
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; download it with torchaudio.pipelines.SQUIM_SUBJECTIVE.get_model()"
            )
        self.model, self.device = SQUIM_SUBJECTIVE.get_model().eval().to(device), device

    def measure(self, original: Signal, output: Signal, labels: Mapping[str, Any]) -> dict[str, Value]:
        """Estimate the mean opinion score of the output, with the original as reference."""
        import torch

        pair = (torch.from_numpy(signal.at_16k)[None].to(self.device) for signal in (output, original))
        with torch.no_grad():
            return {SQUIM_MOS: float(self.model(*pair))}
