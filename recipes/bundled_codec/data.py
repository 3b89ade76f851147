"""Keep training speech in memory, and draw batches of random segments from it."""

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nemo_lfr.io.audio import AudioReader
from nemo_lfr.io.manifests import Recording, read_manifest
from recipes.bundled_codec.model import SAMPLE_RATE

FULL_SCALE = 32768  # amplitude of 16-bit samples
GAIN_RANGE_DB = (-12.0, 6.0)
MAX_PEAK = 0.98
MARGIN = 512  # samples on each side of an augmented segment, which are cut off because a transform wraps around
SIZE_STEP = 128  # sizes of FFTs are multiples of this number, because such FFTs are fast
# Number of bands, and the center of the lowest band in Hz. On a log scale, the centers are equally spaced.
EQUALIZER_BANDS, EQUALIZER_START = 8, 60.0


@dataclass
class AugmentConfig:
    """Random changes of training segments, to imitate voices and microphones that are not in the recordings."""

    speed: float = (
        1.2  # segments play faster or slower by up to this factor, which shifts pitch and formants; 1 for none
    )
    equalizer_db: float = 5.0  # largest gain or loss of each band of a random equalizer; 0 for none
    invert: bool = True  # invert the polarity of half of the segments


@dataclass
class Draw:
    """Random choices for the segments of a batch, as arrays with one row per segment."""

    utterances: np.ndarray  # [B]
    sizes: np.ndarray  # number of recorded samples from which a segment and its margins are made, [B]
    starts: np.ndarray  # first sample of the segment in its utterance, without margin, [B]
    gains: np.ndarray  # factors of the amplitude, negative to invert the polarity, [B]
    equalizer_db: np.ndarray  # gain of each band, [B, EQUALIZER_BANDS]


def read_speech(manifest: Path, audio_dir: Path | None = None) -> list[np.ndarray]:
    """Read all utterances in a NeMo manifest.

    Args:
        manifest: JSON-lines file with `audio_filepath` and `duration`.
        audio_dir: folder that relative paths are resolved against; by default the manifest's folder.

    Returns:
        For each utterance, an array [T_audio] of int16 samples at 22.05 kHz.
    """

    def read(recording: Recording) -> np.ndarray:
        with AudioReader(recording.path, SAMPLE_RATE) as reader:
            audio = np.concatenate(list(reader.blocks()))
        return (audio.clip(-1, 1) * (FULL_SCALE - 1)).round().astype(np.int16)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(read, read_manifest(manifest, audio_dir or manifest.parent, manifest.name)))


class SpeechSegments:
    """Utterances in one tensor on a device, from which random segments are cut.

    A batch depends only on its seed, so that a resumed run sees the same data as a run without interruption.

    Args:
        utterances: one array of int16 samples [T_audio] per utterance. Utterances that are shorter than a segment are
            padded with zeros.
        length: number of samples per segment.
        device: device for the samples.
        augment: random changes of the segments; if None, only the gain is changed.
    """

    def __init__(
        self,
        utterances: Sequence[np.ndarray],
        length: int,
        device: torch.device,
        augment: AugmentConfig | None = None,
    ) -> None:
        self.augment = augment or AugmentConfig(speed=1.0, equalizer_db=0.0, invert=False)
        self.length, self.device = length, device
        self.full_length = -(-(length + 2 * MARGIN) // SIZE_STEP) * SIZE_STEP  # with margins
        longest = math.ceil(self.full_length * self.augment.speed) + SIZE_STEP
        self.durations = np.array([len(utterance) for utterance in utterances])
        padded = [np.pad(utterance, (0, max(0, longest - len(utterance)))) for utterance in utterances]
        self.offsets = longest + np.cumsum([0] + [len(utterance) for utterance in padded[:-1]])
        self.probabilities = self.durations / self.durations.sum()
        edge = np.zeros(longest, np.int16)  # the margins of the first and the last segment
        self.samples = torch.from_numpy(np.concatenate([edge, *padded, edge])).to(device)
        self.bands = _equalizer_bands(self.full_length).to(device)

    @property
    def hours(self) -> float:
        """Return the total duration of the utterances in hours."""
        return self.durations.sum() / SAMPLE_RATE / 3600

    def batch(self, size: int, seed: Sequence[int]) -> torch.Tensor:
        """Return a batch of random segments.

        Args:
            size: number of segments, B.
            seed: seed of the random choices.

        Returns:
            Audio in [-1, 1], shape [B, T_audio], on the device.
        """
        return self.cut(self.draw(size, seed))

    def draw(self, size: int, seed: Sequence[int]) -> Draw:
        """Make the random choices for a batch.

        The probability of an utterance is proportional to its duration. Starts are drawn uniformly, and gains and
        speeds uniformly on a log scale.
        """
        rng, augment = np.random.default_rng(list(seed)), self.augment
        utterances = rng.choice(len(self.offsets), size, p=self.probabilities)
        gains = 10 ** (rng.uniform(*GAIN_RANGE_DB, size) / 20)
        speeds = augment.speed ** rng.uniform(-1, 1, size)
        sizes = (self.full_length * speeds / SIZE_STEP).round().astype(int) * SIZE_STEP
        spans = sizes * self.length // self.full_length
        starts = rng.integers(np.maximum(1, self.durations[utterances] - spans + 1))
        if augment.invert:
            gains *= rng.choice([-1, 1], size)
        equalizer_db = rng.uniform(-augment.equalizer_db, augment.equalizer_db, (size, EQUALIZER_BANDS))
        return Draw(utterances, sizes, starts, gains, equalizer_db)

    def cut(self, draw: Draw) -> torch.Tensor:
        """Cut the segments of a batch, and change their speed, loudness and spectrum.

        Args:
            draw: random choices, from the method `draw`.

        Returns:
            Audio in [-1, 1], shape [B, T_audio], on the device.
        """
        response = 10 ** (torch.from_numpy(draw.equalizer_db).float().to(self.device) @ self.bands / 20)
        # Before resampling, a segment and its margins have `sizes` samples instead of `full_length`, so the margin is
        # scaled by the same ratio.
        firsts = self.offsets[draw.utterances] + draw.starts - MARGIN * draw.sizes // self.full_length
        segments = torch.stack(
            [
                self._change(self.samples[first : first + size].float() / FULL_SCALE, curve)
                for first, size, curve in zip(firsts, draw.sizes, response, strict=True)
            ]
        )
        gains = torch.from_numpy(draw.gains).float().to(self.device)
        limits = MAX_PEAK / segments.abs().amax(dim=1).clamp_min(1e-4)
        return segments * torch.minimum(gains.abs(), limits).copysign(gains)[:, None]

    def _change(self, audio: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
        """Change the speed and the spectrum of a segment with margins, and cut off the margins.

        Args:
            audio: samples. They are resampled to the length of a segment with margins, which changes the speed.
            response: factor for each frequency of the spectrum.
        """
        if len(audio) != self.full_length or self.augment.equalizer_db:
            spectrum = torch.fft.rfft(audio, norm="forward")[: len(response)]
            spectrum = spectrum * response[: len(spectrum)]
            audio = torch.fft.irfft(spectrum, self.full_length, norm="forward")
        return audio[MARGIN : MARGIN + self.length]


def _equalizer_bands(size: int) -> torch.Tensor:
    """Return the weight of each band at each frequency of a transform, shape [EQUALIZER_BANDS, size // 2 + 1].

    A band has weight 1 at its center. On a log scale, the weight falls linearly to 0 at the centers of the two
    neighboring bands.
    """
    frequencies = np.fft.rfftfreq(size, 1 / SAMPLE_RATE).clip(EQUALIZER_START)
    place = np.log(frequencies / EQUALIZER_START) / np.log(SAMPLE_RATE / 2 / EQUALIZER_START) * (EQUALIZER_BANDS - 1)
    weights = np.maximum(0, 1 - np.abs(place - np.arange(EQUALIZER_BANDS)[:, None]))
    return torch.from_numpy(weights.astype(np.float32))
