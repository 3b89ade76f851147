"""The codec as a model for Hugging Face's `transformers`.

    import nemo_lfr.transformers  # registers the classes with AutoModel, AutoConfig and AutoFeatureExtractor

    model = AutoModel.from_pretrained(folder)  # written by `nemo-lfr export safetensors`
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    inputs = extractor([first, second], sampling_rate=extractor.sampling_rate, return_tensors="pt")
    audio_codes = model.encode(**inputs).audio_codes  # [B, C, frames]
    audio_values = model.decode(audio_codes, inputs["padding_mask"]).audio_values  # [B, 1, T_audio]

The model gives the same tokens as `nemo_lfr.load`. With the extractor's `padding_mask`, as above, a clip gets the same
tokens in a batch as alone.
"""

from nemo_lfr.transformers.check import AVAILABLE  # isort: skip  first: raises a clear error without transformers
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
