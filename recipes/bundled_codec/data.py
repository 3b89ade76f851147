"""Training speech in memory, and batches of random segments."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.manifests import Recording, read_manifest
from recipes.bundled_codec.model import SAMPLE_RATE

FULL_SCALE = 32768  # amplitude of 16-bit samples
GAIN_RANGE_DB = (-12.0, 6.0)
MAX_PEAK = 0.98


def read_speech(manifest: Path, audio_dir: Path | None = None) -> list[np.ndarray]:
    """Read every utterance of a NeMo manifest.

    Args:
        manifest: JSON-lines file with `audio_filepath` and `duration`.
        audio_dir: base of relative paths; the manifest's folder by default.

    Returns:
        int16 samples at 22.05 kHz, one array [T_audio] per utterance.
    """

    def read(recording: Recording) -> np.ndarray:
        with AudioReader(recording.path, SAMPLE_RATE) as reader:
            audio = np.concatenate(list(reader.blocks()))
        return (audio.clip(-1, 1) * (FULL_SCALE - 1)).round().astype(np.int16)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(read, read_manifest(manifest, audio_dir or manifest.parent, manifest.name)))


class SpeechSegments:
    """Utterances in one tensor on a device, from which segments are cut.

    A batch depends only on its seed, so a resumed run sees the same data as an uninterrupted one.

    Args:
        utterances: int16 samples, one array [T_audio] per utterance. Utterances shorter than a segment are padded with
            zeros.
        length: samples per segment.
        device: device of the samples.
    """

    def __init__(self, utterances: Sequence[np.ndarray], length: int, device: torch.device) -> None:
        durations = np.array([len(utterance) for utterance in utterances])
        padded = [np.pad(utterance, (0, max(0, length - len(utterance)))) for utterance in utterances]
        self.offsets = np.cumsum([0] + [len(utterance) for utterance in padded[:-1]])
        self.num_starts = np.maximum(1, durations - length + 1)
        self.probabilities = durations / durations.sum()
        self.samples = torch.from_numpy(np.concatenate(padded)).to(device)
        self.window = torch.arange(length, device=device)

    @property
    def hours(self) -> float:
        """Return the duration of all utterances in hours."""
        return len(self.samples) / SAMPLE_RATE / 3600

    def draw(self, size: int, seed: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw random segments and gains.

        Utterances are drawn in proportion to their duration, starts and gains uniformly.

        Args:
            size: number of segments.
            seed: seed of the draw.

        Returns:
            Index in `samples` of each segment's first sample, and its gain, [B] each, on the CPU.
        """
        rng = np.random.default_rng(list(seed))
        utterances = rng.choice(len(self.offsets), size, p=self.probabilities)
        gains = 10 ** (rng.uniform(*GAIN_RANGE_DB, size) / 20)
        starts = self.offsets[utterances] + rng.integers(self.num_starts[utterances])
        return torch.from_numpy(starts), torch.from_numpy(gains.astype(np.float32))

    def cut(self, starts: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
        """Cut segments and apply their gains, lowered where a segment would clip.

        Args:
            starts: index in `samples` of each segment's first sample, shape [B].
            gains: gain of each segment, shape [B].

        Returns:
            Audio in [-1, 1], shape [B, T_audio].
        """
        audio = self.samples[starts[:, None] + self.window].float() / FULL_SCALE
        peaks = audio.abs().amax(dim=1).clamp_min(1e-4)
        return audio * torch.minimum(gains, MAX_PEAK / peaks)[:, None]
