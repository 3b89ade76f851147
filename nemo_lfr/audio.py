"""Alias of `nemo_lfr.io.audio`, kept for backward compatibility."""

from nemo_lfr.io.audio import AudioReader, AudioWriter

__all__ = ["AudioReader", "AudioWriter"]
