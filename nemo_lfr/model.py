"""Alias of `nemo_lfr.nemo.model` and `nemo_lfr.nemo.acceleration`, kept for backward compatibility."""

from nemo_lfr.nemo.acceleration import accelerate
from nemo_lfr.nemo.model import AudioCodecModel, LFRCodecModel

__all__ = ["AudioCodecModel", "LFRCodecModel", "accelerate"]
