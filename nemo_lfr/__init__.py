"""NVIDIA's Low Frame-rate Speech Codec: speech tokens at 21.5 frames per second.

    codec = nemo_lfr.load()
    tokens, tokens_len = codec.encode(audio, sample_rate=16000)
    audio, audio_len = codec.decode(tokens, tokens_len)

Public names are imported on first use, so `import nemo_lfr` imports neither torch nor NeMo.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nemo_lfr import telemetry
from nemo_lfr._version import __version__

telemetry.disable()

if TYPE_CHECKING:
    from nemo_lfr.codec.codec import Codec
    from nemo_lfr.errors import (
        AudioError,
        CheckpointError,
        ConfigError,
        MissingExtraError,
        NemoLfrError,
        TokenFileError,
        TokensError,
    )
    from nemo_lfr.nemo.acceleration import accelerate
    from nemo_lfr.nemo.model import AudioCodecModel, LFRCodecModel
    from nemo_lfr.pretrained import load

_PLACES = {
    "Codec": "codec.codec",
    "load": "pretrained",
    "AudioCodecModel": "nemo.model",
    "LFRCodecModel": "nemo.model",
    "accelerate": "nemo.acceleration",
    "NemoLfrError": "errors",
    "AudioError": "errors",
    "TokensError": "errors",
    "TokenFileError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "MissingExtraError": "errors",
}
__all__ = [
    "AudioCodecModel",
    "AudioError",
    "CheckpointError",
    "Codec",
    "ConfigError",
    "LFRCodecModel",
    "MissingExtraError",
    "NemoLfrError",
    "TokenFileError",
    "TokensError",
    "__version__",
    "accelerate",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'nemo_lfr' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nemo_lfr.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
