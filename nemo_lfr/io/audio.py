"""Read audio files that libsndfile or FFmpeg decodes, write WAV and FLAC files, and resample audio."""

from nemo_lfr.io.audio_reader import BLOCK_SECONDS, MAX_BLOCK, AudioReader
from nemo_lfr.io.audio_writer import AudioWriter, pcm16
from nemo_lfr.io.resampling import Resampler, check_peak, check_rate, resample

__all__ = [
    "BLOCK_SECONDS",
    "MAX_BLOCK",
    "AudioReader",
    "AudioWriter",
    "Resampler",
    "check_peak",
    "check_rate",
    "pcm16",
    "resample",
]
