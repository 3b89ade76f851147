"""The codec DAC, as transformers implements it."""

from typing import Any

from nemo_lfr.evaluation.codecs import register_codec
from nemo_lfr.evaluation.codecs.transformers import TransformersCodec


@register_codec
class Dac(TransformersCodec):
    """DAC. `--codec dac:N` uses N codebooks."""

    kind = "dac"
    usage = "dac:CODEBOOKS"
    class_name = "DacModel"
    hub_id = "descript/dac_24khz"

    def _encode(self, audio: Any) -> tuple[Any, dict[str, Any]]:
        codes = self.model.encode(audio, n_quantizers=round(self.setting)).audio_codes
        return codes, {"audio_codes": codes}
