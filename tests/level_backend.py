"""Minimal backend: a toy codec in NumPy, as another package would write it."""

from pathlib import Path

import numpy as np

from nemo_lfr.codec.backend import ModuleLimits, NumpyBackend
from nemo_lfr.codec.backends import Opener, OpenOptions
from nemo_lfr.frames import Context
from nemo_lfr.spec import CodecSpec


class LevelBackend(NumpyBackend):
    """Backend whose tokens are the mean levels of the two halves of each frame.

    Decoded audio is smoothed over neighboring frames.
    """

    spec = CodecSpec(sample_rate=8000, samples_per_frame=80, levels=(5, 5), num_codebooks=2, fingerprint="0" * 16)
    encoder = ModuleLimits(Context(past=0, future=0), min_frames=1)
    decoder = ModuleLimits(Context(past=1, future=1), min_frames=1)

    def __init__(self, name: str) -> None:
        self.name = name

    def fingerprints(self) -> tuple[str, ...]:
        """Return the fingerprints of tokens that this backend decodes."""
        return (self.spec.fingerprint,)

    def encode_frames(self, audio: np.ndarray, num_frames: list[int]) -> np.ndarray:
        """Encode audio [B, T_audio] to tokens [B, C, T]."""
        halves = audio.reshape(len(audio), -1, 2, self.spec.samples_per_frame // 2).mean(axis=3)  # [B, T, C]
        top = self.spec.codebook_size - 1
        return np.rint((halves.clip(-1, 1) + 1) / 2 * top).astype(np.int32).transpose(0, 2, 1)

    def decode_frames(self, tokens: np.ndarray, num_frames: list[int]) -> np.ndarray:
        """Decode tokens [B, C, T] to audio [B, T_audio]."""
        levels = tokens.astype(np.float32) / (self.spec.codebook_size - 1) * 2 - 1
        for example, count in zip(levels, num_frames, strict=True):
            example[:, count:] = 0  # the same zeros that a single example gets from np.pad
        padded = np.pad(levels, ((0, 0), (0, 0), (1, 1)))
        smooth = (padded[:, :, :-2] + 2 * levels + padded[:, :, 2:]) / 4
        return np.repeat(smooth.transpose(0, 2, 1).reshape(len(tokens), -1), self.spec.samples_per_frame // 2, axis=1)


def open_levels(path: Path, options: OpenOptions) -> LevelBackend:
    """Open a `.levels` file, whose contents are not read."""
    return LevelBackend(options.name)


OPENER = Opener(
    open_levels,
    accepts=lambda path: path.suffix == ".levels" and path.is_file(),
    model="a .levels file",
    advice="touch one",
)
