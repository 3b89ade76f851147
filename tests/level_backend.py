"""The smallest backend: a toy codec in numpy, as another package would write it."""

from pathlib import Path

import numpy as np

from nemo_lfr.codec.backend import ModuleLimits, NumpyBackend
from nemo_lfr.codec.backends import Opener, OpenOptions
from nemo_lfr.frames import Context
from nemo_lfr.spec import CodecSpec


class LevelBackend(NumpyBackend):
    """Tokens are the levels of the two halves of each frame; audio is smoothed over the neighboring frames."""

    spec = CodecSpec(sample_rate=8000, samples_per_frame=80, levels=(5, 5), num_codebooks=2, fingerprint="0" * 16)
    encoder = ModuleLimits(Context(past=0, future=0), min_frames=1)
    decoder = ModuleLimits(Context(past=1, future=1), min_frames=1)

    def __init__(self, name: str) -> None:
        self.name = name

    def fingerprints(self) -> tuple[str, ...]:
        return (self.spec.fingerprint,)

    def encode_frames(self, audio: np.ndarray, num_frames: list[int]) -> np.ndarray:
        halves = audio.reshape(len(audio), -1, 2, self.spec.samples_per_frame // 2).mean(axis=3)  # [B, T, C]
        top = self.spec.codebook_size - 1
        return np.rint((halves.clip(-1, 1) + 1) / 2 * top).astype(np.int32).transpose(0, 2, 1)

    def decode_frames(self, tokens: np.ndarray, num_frames: list[int]) -> np.ndarray:
        levels = tokens.astype(np.float32) / (self.spec.codebook_size - 1) * 2 - 1
        for example, count in zip(levels, num_frames, strict=True):
            example[:, count:] = 0  # as if the example were alone
        padded = np.pad(levels, ((0, 0), (0, 0), (1, 1)))
        smooth = (padded[:, :, :-2] + 2 * levels + padded[:, :, 2:]) / 4
        return np.repeat(smooth.transpose(0, 2, 1).reshape(len(tokens), -1), self.spec.samples_per_frame // 2, axis=1)


def open_levels(path: Path, options: OpenOptions) -> LevelBackend:
    """Open a model, which holds nothing but is a file of its own kind."""
    return LevelBackend(options.name)


OPENER = Opener(
    open_levels,
    accepts=lambda path: path.suffix == ".levels" and path.is_file(),
    model="a .levels file",
    advice="touch one",
)
