"""Error rates of a speech recognition model on the output of a codec."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from nemo_lfr.errors import ConfigError
from nemo_lfr.evaluation.metrics import Metric, Signal, Undefined, Value
from nemo_lfr.evaluation.model_metrics import register_model_metric
from nemo_lfr.evaluation.model_metrics.base import ModelMetric
from nemo_lfr.evaluation.model_metrics.nemo_models import is_nemo, open_nemo_model


@register_model_metric
class ASRErrorRate(ModelMetric):
    """Character and word error rates of a speech recognition (ASR) model.

    Args:
        source: `.nemo` file or nemo:HUB_ID of a NeMo model, or folder or Hub id of a transformers model.
        device: PyTorch device.
    """

    kind = "asr"
    option = "--asr"
    metrics: ClassVar[dict[str, Metric]] = {
        "CER": Metric(
            "%",
            "lower",
            "Character error rate of the ASR model, with the manifest's text as reference; mean over recordings.",
            digits=2,
        ),
        "WER": Metric(
            "%",
            "lower",
            "Word error rate of the ASR model, with the manifest's text as reference; mean over recordings.",
            digits=2,
        ),
    }

    def __init__(self, source: str, device: str) -> None:
        if not source:
            raise ConfigError("no ASR model was passed; pass one, for example --asr openai/whisper-small")
        import jiwer
        from transformers.models.whisper.english_normalizer import BasicTextNormalizer

        self.name, self._normalize, self._jiwer = source, BasicTextNormalizer(), jiwer
        self._transcribe = _nemo_asr(source, device) if is_nemo(source) else _transformers_asr(source, device)

    def measure(self, original: Signal, output: Signal, labels: Mapping[str, Any]) -> dict[str, Value]:
        """Compute CER and WER in percent, with the manifest's text as reference."""
        reference = self._normalize(str(labels.get("text") or "")).strip()
        if not reference:
            return dict.fromkeys(self.metrics, Undefined("the manifest has no text"))
        transcript = self._normalize(self._transcribe(output.at_16k, labels.get("lang"))).strip()
        return {
            "CER": 100 * self._jiwer.cer(reference, transcript),
            "WER": 100 * self._jiwer.wer(reference, transcript),
        }


def _nemo_asr(source: str, device: str) -> Callable[[np.ndarray, str | None], str]:
    from nemo.collections.asr.models import ASRModel

    model = open_nemo_model(ASRModel, source, device)

    def transcribe(wave: np.ndarray, language: str | None) -> str:
        transcripts = model.transcribe([wave], verbose=False)
        transcripts = transcripts[0] if isinstance(transcripts, tuple) else transcripts
        return str(getattr(transcripts[0], "text", transcripts[0]))

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
        result: Any = run({"raw": wave, "sampling_rate": 16000}, generate_kwargs=options)
        return str(result["text"])

    return transcribe
