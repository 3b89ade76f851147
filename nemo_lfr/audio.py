"""Audio files under their earlier path; see `nemo_lfr.io.audio`."""

from nemo_lfr.io.audio import AudioReader, AudioWriter

__all__ = ["AudioReader", "AudioWriter"]
