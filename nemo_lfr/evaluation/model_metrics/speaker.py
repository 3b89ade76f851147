"""Similarity between the speaker's voice in the original and in the output of a codec."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from nemo_lfr.errors import ConfigError
from nemo_lfr.evaluation.metrics import Metric, Signal, Value
from nemo_lfr.evaluation.model_metrics import register_model_metric
from nemo_lfr.evaluation.model_metrics.base import ModelMetric
from nemo_lfr.evaluation.model_metrics.nemo_models import is_nemo, open_nemo_model

SIMILARITY = "speaker similarity"


@register_model_metric
class SpeakerSimilarity(ModelMetric):
    """Speaker similarity that a speaker verification model computes.

    Args:
        source: for a NeMo model, a `.nemo` file or nemo:HUB_ID. For an x-vector model of transformers, a folder or Hub
            id.
        device: PyTorch device.
    """

    kind = "speaker"
    option = "--speaker-model"
    metrics: ClassVar[dict[str, Metric]] = {
        SIMILARITY: Metric("", "higher", "Cosine similarity between the speaker embeddings of original and output."),
    }

    def __init__(self, source: str, device: str) -> None:
        if not source:
            raise ConfigError(
                "no speaker model was passed; pass one, for example --speaker-model microsoft/wavlm-base-plus-sv"
            )
        self.name = source
        self._embed = _nemo_speaker(source, device) if is_nemo(source) else _transformers_speaker(source, device)

    def measure(self, original: Signal, output: Signal, labels: Mapping[str, Any]) -> dict[str, Value]:
        """Compute the cosine similarity between the speaker embeddings of original and output."""
        first, second = (self._embed(signal.at_16k).astype(np.float64) for signal in (original, output))
        norms = float(np.linalg.norm(first)) * float(np.linalg.norm(second))
        return {SIMILARITY: float(first @ second) / max(norms, 1e-300)}


def _nemo_speaker(source: str, device: str) -> Callable[[np.ndarray], np.ndarray]:
    from nemo.collections.asr.models import EncDecSpeakerLabelModel

    model = open_nemo_model(EncDecSpeakerLabelModel, source, device)
    return lambda wave: model.infer_segment(wave)[0].squeeze().float().cpu().numpy()


def _transformers_speaker(source: str, device: str) -> Callable[[np.ndarray], np.ndarray]:
    import torch
    from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

    # transformers has no type annotations for this method
    extract: Callable[..., Any] = AutoFeatureExtractor.from_pretrained(source)  # type: ignore[no-untyped-call]
    model = AutoModelForAudioXVector.from_pretrained(source).eval().to(device)

    def embed(wave: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            inputs = extract(wave, sampling_rate=16000, return_tensors="pt").to(device)
            embedding: np.ndarray = model(**inputs).embeddings[0].cpu().numpy()
        return embedding

    return embed
