"""Register the codec's classes with the auto classes of `transformers`, such as `AutoModel`."""

import transformers

from nemo_lfr.transformers.configuration import NemoLfrConfig
from nemo_lfr.transformers.feature_extraction import NemoLfrFeatureExtractor
from nemo_lfr.transformers.modeling import NemoLfrModel


def register() -> None:
    """Register the classes. Calling this function again has no effect."""
    transformers.AutoConfig.register(NemoLfrConfig.model_type, NemoLfrConfig, exist_ok=True)
    transformers.AutoFeatureExtractor.register(
        NemoLfrConfig, feature_extractor_class=NemoLfrFeatureExtractor, exist_ok=True
    )
    for name in ("AutoModel", "AutoModelForAudioTokenization"):
        if (auto := getattr(transformers, name, None)) is not None:
            auto.register(NemoLfrConfig, NemoLfrModel, exist_ok=True)
