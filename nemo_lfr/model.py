"""Public names of the NeMo integration; see `nemo_lfr.nemo.model`."""

from nemo_lfr.nemo.acceleration import accelerate
from nemo_lfr.nemo.model import AudioCodecModel, LFRCodecModel

__all__ = ["AudioCodecModel", "LFRCodecModel", "accelerate"]
