"""The codec as a model of Hugging Face's `transformers`.

    import nemo_lfr.transformers  # registers the classes with AutoModel, AutoConfig and AutoFeatureExtractor

    model = AutoModel.from_pretrained(folder)  # of `nemo-lfr export safetensors`
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    inputs = extractor([first, second], sampling_rate=extractor.sampling_rate, return_tensors="pt")
    audio_codes = model.encode(**inputs).audio_codes  # [B, C, frames]
    audio_values = model.decode(audio_codes, inputs["padding_mask"]).audio_values  # [B, 1, T_audio]

Tokens equal those of `nemo_lfr.load`, and those of a clip in a batch equal those of the clip alone.
"""

from nemo_lfr.transformers.check import AVAILABLE  # isort: skip  first, for its error where transformers is missing
from nemo_lfr.transformers.configuration import NemoLfrConfig
from nemo_lfr.transformers.feature_extraction import NemoLfrFeatureExtractor
from nemo_lfr.transformers.modeling import (
    NemoLfrDecoderOutput,
    NemoLfrEncoderOutput,
    NemoLfrModel,
    NemoLfrOutput,
)
from nemo_lfr.transformers.registration import register

__all__ = [
    "NemoLfrConfig",
    "NemoLfrDecoderOutput",
    "NemoLfrEncoderOutput",
    "NemoLfrFeatureExtractor",
    "NemoLfrModel",
    "NemoLfrOutput",
]

if AVAILABLE:
    register()
