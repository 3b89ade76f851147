"""Metrics computed by third-party trained models.

These are naturalness, ASR error rates and speaker similarity. A model that is not available never stops an evaluation.
Its metrics are reported as `NotMeasured` with the reason.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nemo_lfr.evaluation.metrics import METRICS, Metric, NotMeasured, Signal, Undefined, Value

SQUIM_MOS = "Squim MOS"
SIMILARITY = "speaker similarity"
JUDGED: dict[str, Metric] = {
    SQUIM_MOS: Metric(
        "MOS",
        "higher",
        "torchaudio's SQUIM_SUBJECTIVE at 16 kHz, the original as its reference (as NVIDIA's evaluation does).",
        digits=2,
    ),
    "CER": Metric(
        "%",
        "lower",
        "Characters of the manifest's text that the ASR model gets wrong, mean over recordings.",
        digits=2,
    ),
    "WER": Metric("%", "lower", "Words of it, mean over recordings.", digits=2),
    SIMILARITY: Metric("", "higher", "Cosine of the speaker model's embeddings of original and output."),
}
ALL_METRICS = METRICS | JUDGED


class Judge(ABC):
    """Base class of metrics that are computed by a trained model.

    Attributes:
        name: name of the model, for the report.
        metrics: names in `JUDGED` of the metrics that the model computes.
    """

    name: str
    metrics: tuple[str, ...]

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


class Squim(Judge):
    """Mean opinion score estimated by torchaudio's SQUIM_SUBJECTIVE."""

    metrics = (SQUIM_MOS,)
    name = "torchaudio SQUIM_SUBJECTIVE"
    weights = "squim_subjective_bvcc_daps.pth"

    def __init__(self, device: str) -> None:
        import torch
        from torchaudio.pipelines import SQUIM_SUBJECTIVE

        if not Path(torch.hub.get_dir(), "checkpoints", self.weights).is_file():
            raise FileNotFoundError(f"{self.weights} is not in torch.hub's folder of checkpoints")
        self.model, self.device = SQUIM_SUBJECTIVE.get_model().eval().to(device), device

    def measure(self, original: Signal, output: Signal, labels: Mapping[str, Any]) -> dict[str, Value]:
        """Estimate the mean opinion score of the output, with the original as reference."""
        import torch

        pair = (torch.from_numpy(signal.at_16k)[None].to(self.device) for signal in (output, original))
        with torch.no_grad():
            return {SQUIM_MOS: float(self.model(*pair))}


class Recognizer(Judge):
    """Character and word error rates of an ASR model.

    Args:
        source: `.nemo` file or nemo:HUB_ID for a NeMo model; otherwise a folder or Hub id for transformers.
        device: PyTorch device.
    """

    metrics = ("CER", "WER")

    def __init__(self, source: str, device: str) -> None:
        import jiwer
        from transformers.models.whisper.english_normalizer import BasicTextNormalizer

        self.name, self._normalize, self._jiwer = source, BasicTextNormalizer(), jiwer
        self._transcribe = _nemo_asr(source, device) if _is_nemo(source) else _transformers_asr(source, device)

    def measure(self, original: Signal, output: Signal, labels: Mapping[str, Any]) -> dict[str, Value]:
        """Compute CER and WER in percent, with the manifest's text as reference."""
        said = self._normalize(str(labels.get("text") or "")).strip()
        if not said:
            return dict.fromkeys(self.metrics, Undefined("the manifest has no text"))
        heard = self._normalize(self._transcribe(output.at_16k, labels.get("lang"))).strip()
        return {"CER": 100 * self._jiwer.cer(said, heard), "WER": 100 * self._jiwer.wer(said, heard)}


class Verifier(Judge):
    """Speaker similarity of a speaker verification model.

    Args:
        source: `.nemo` file or nemo:HUB_ID for a NeMo model; otherwise an x-vector model for transformers.
        device: PyTorch device.
    """

    metrics = (SIMILARITY,)

    def __init__(self, source: str, device: str) -> None:
        self.name = source
        self._embed = _nemo_speaker(source, device) if _is_nemo(source) else _transformers_speaker(source, device)

    def measure(self, original: Signal, output: Signal, labels: Mapping[str, Any]) -> dict[str, Value]:
        """Compute the cosine similarity of the speaker embeddings of original and output."""
        first, second = (self._embed(signal.at_16k).astype(np.float64) for signal in (original, output))
        norms = float(np.linalg.norm(first)) * float(np.linalg.norm(second))
        return {SIMILARITY: float(first @ second) / max(norms, 1e-300)}


def open_judges(
    device: str, asr: str | None = None, speaker_model: str | None = None
) -> tuple[list[Judge], dict[str, NotMeasured]]:
    """Load the models of the model-based metrics.

    Args:
        device: PyTorch device.
        asr: ASR model for `Recognizer`, or None to skip its metrics.
        speaker_model: speaker model for `Verifier`, or None to skip its metrics.

    Returns:
        The models that could be loaded, and the reason for each metric that is not available.
    """
    wanted: list[tuple[tuple[str, ...], Callable[[], Judge] | None, str]] = [
        (Squim.metrics, lambda: Squim(device), ""),
        (Recognizer.metrics, (lambda: Recognizer(asr, device)) if asr else None, "no --asr given"),
        (
            Verifier.metrics,
            (lambda: Verifier(speaker_model, device)) if speaker_model else None,
            "no --speaker-model given",
        ),
    ]
    judges: list[Judge] = []
    absent: dict[str, NotMeasured] = {}
    for metrics, make, why in wanted:
        reason = NotMeasured(f"not measured: {why}")
        if make is not None:
            try:
                judges.append(make())
                continue
            except ModuleNotFoundError as error:
                reason = NotMeasured(f"not measured: {error.name} is not installed")
            except Exception as error:  # third-party model loaders can raise anything
                reason = NotMeasured(f"not measured: {' '.join(str(error).split())[:200]}")
        absent.update(dict.fromkeys(metrics, reason))
    return judges, absent


def _is_nemo(source: str) -> bool:
    return source.startswith("nemo:") or source.endswith(".nemo")


def _nemo_model(kind: Any, source: str, device: str) -> Any:
    name = source.removeprefix("nemo:")
    model = kind.restore_from(name, map_location=device) if name.endswith(".nemo") else kind.from_pretrained(name)
    return model.eval().to(device)


def _nemo_asr(source: str, device: str) -> Callable[[np.ndarray, str | None], str]:
    from nemo.collections.asr.models import ASRModel

    model = _nemo_model(ASRModel, source, device)

    def transcribe(wave: np.ndarray, language: str | None) -> str:
        found = model.transcribe([wave], verbose=False)
        found = found[0] if isinstance(found, tuple) else found
        return str(getattr(found[0], "text", found[0]))

    return transcribe


def _transformers_asr(source: str, device: str) -> Callable[[np.ndarray, str | None], str]:
    from transformers import pipeline

    run = pipeline("automatic-speech-recognition", model=source, device=device)
    languages = getattr(getattr(run.model, "generation_config", None), "lang_to_id", None) or {}
    codes = {token.strip("<|>") for token in languages}

    def transcribe(wave: np.ndarray, language: str | None) -> str:
        options: dict[str, Any] = {}
        if codes and language:
            from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

            code = TO_LANGUAGE_CODE.get(language.lower(), language.lower().partition("-")[0])
            options = {"language": code, "task": "transcribe"} if code in codes else {}
        if run.type == "seq2seq_whisper" and len(wave) > 30 * 16000:
            options["return_timestamps"] = True
        found: Any = run({"raw": wave, "sampling_rate": 16000}, generate_kwargs=options)
        return str(found["text"])

    return transcribe


def _nemo_speaker(source: str, device: str) -> Callable[[np.ndarray], np.ndarray]:
    from nemo.collections.asr.models import EncDecSpeakerLabelModel

    model = _nemo_model(EncDecSpeakerLabelModel, source, device)
    return lambda wave: model.infer_segment(wave)[0].squeeze().float().cpu().numpy()


def _transformers_speaker(source: str, device: str) -> Callable[[np.ndarray], np.ndarray]:
    import torch
    from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

    extract = AutoFeatureExtractor.from_pretrained(source)
    model = AutoModelForAudioXVector.from_pretrained(source).eval().to(device)

    def embed(wave: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return (
                model(**extract(wave, sampling_rate=16000, return_tensors="pt").to(device)).embeddings[0].cpu().numpy()
            )

    return embed
