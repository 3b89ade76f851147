"""The codec EnCodec, as transformers implements it."""

from typing import Any

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.evaluation.codecs import register_codec
from nemo_lfr.evaluation.codecs.transformers import TransformersCodec


@register_codec
class Encodec(TransformersCodec):
    """EnCodec. `--codec encodec:N` encodes at N kbit/s."""

    kind = "encodec"
    usage = "encodec:KBIT"
    class_name = "EncodecModel"
    hub_id = "facebook/encodec_24khz"
    unit = "kbit/s"

    def _check_setting(self, setting: str) -> None:
        bandwidths = self.model.config.target_bandwidths
        if self.setting not in bandwidths:
            raise NemoLfrError(
                f"--codec {self.kind}:{setting}: not a bit rate of this model; use one of "
                f"{', '.join(map(str, bandwidths))}."
            )

    def _encode(self, audio: Any) -> tuple[Any, dict[str, Any]]:
        coded = self.model.encode(audio, bandwidth=self.setting)
        return coded.audio_codes, {"audio_codes": coded.audio_codes, "audio_scales": coded.audio_scales}
