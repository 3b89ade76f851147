"""The codec Mimi, as transformers implements it."""

from typing import Any

from nemo_lfr.evaluation.codecs import register_codec
from nemo_lfr.evaluation.codecs.transformers import TransformersCodec


@register_codec
class Mimi(TransformersCodec):
    """Mimi. `--codec mimi:N` uses N codebooks."""

    kind = "mimi"
    usage = "mimi:CODEBOOKS"
    class_name = "MimiModel"
    hub_id = "kyutai/mimi"

    def _encode(self, audio: Any) -> tuple[Any, dict[str, Any]]:
        codes = self.model.encode(audio, num_quantizers=round(self.setting)).audio_codes
        return codes, {"audio_codes": codes}
