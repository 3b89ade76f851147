"""Keep training speech in memory, and draw batches of random segments from it."""

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
    """Read all utterances in a NeMo manifest.

    Args:
        manifest: JSON-lines file with `audio_filepath` and `duration`.
        audio_dir: folder that relative paths are resolved against; by default the manifest's folder.

    Returns:
        One array of int16 samples [T_audio] at 22.05 kHz per utterance.
    """

    def read(recording: Recording) -> np.ndarray:
        with AudioReader(recording.path, SAMPLE_RATE) as reader:
            audio = np.concatenate(list(reader.blocks()))
        return (audio.clip(-1, 1) * (FULL_SCALE - 1)).round().astype(np.int16)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(read, read_manifest(manifest, audio_dir or manifest.parent, manifest.name)))


class SpeechSegments:
    """Utterances in one tensor on a device, from which random segments are cut.

    A batch depends only on its seed. A resumed run therefore sees the same data as a run without interruption.

    Args:
        utterances: one array of int16 samples [T_audio] per utterance. Utterances that are shorter than a segment are
            padded with zeros.
        length: number of samples per segment.
        device: device for the samples.
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
        """Return the total duration of the utterances in hours."""
        return len(self.samples) / SAMPLE_RATE / 3600

    def draw(self, size: int, seed: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw random segments and gains.

        The probability of an utterance is proportional to its duration. The start in the utterance is uniformly
        distributed, and so is the gain in dB.

        Args:
            size: number of segments, B.
            seed: seed of the draw.

        Returns:
            The start of each segment, as an index into `samples`, and the gain of each segment. Both have shape [B]
            and are on the CPU.
        """
        rng = np.random.default_rng(list(seed))
        utterances = rng.choice(len(self.offsets), size, p=self.probabilities)
        gains = 10 ** (rng.uniform(*GAIN_RANGE_DB, size) / 20)
        starts = self.offsets[utterances] + rng.integers(self.num_starts[utterances])
        return torch.from_numpy(starts), torch.from_numpy(gains.astype(np.float32))

    def cut(self, starts: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
        """Cut segments and apply their gains. A gain is reduced if the segment would clip.

        Args:
            starts: start of each segment, as an index into `samples`, shape [B].
            gains: gain of each segment, shape [B].

        Returns:
            Audio in [-1, 1], shape [B, T_audio].
        """
        audio = self.samples[starts[:, None] + self.window].float() / FULL_SCALE
        peaks = audio.abs().amax(dim=1).clamp_min(1e-4)
        return audio * torch.minimum(gains, MAX_PEAK / peaks)[:, None]
