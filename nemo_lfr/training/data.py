"""Training segments from NeMo manifests, in any audio format and sample rate.

Unreadable files are skipped and logged once. NeMo's `VocoderDataset` reads float files as silence, builds a batch of a
thousand channels from stereo files, and stops at the first unreadable file.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from nemo_lfr.errors import AudioError, ConfigError, NemoLfrError
from nemo_lfr.io.audio import AudioReader, check_rate
from nemo_lfr.io.manifests import Recording, read_manifest

logger = logging.getLogger(__name__)

NEMO_DATASET = "nemo.collections.tts.data.vocoder_dataset.VocoderDataset"


class CodecDataset(Dataset[dict[str, Any]]):
    """Dataset of recordings, or of random segments of them.

    Audio is float32, mono, at one sample rate.

    Args:
        dataset_meta: settings of each dataset by its name: `manifest_path`, `audio_dir` (the manifest's folder by
            default) and `sample_weight`. Unusable manifest lines are skipped and logged once.
        sample_rate: sample rate of the audio, Hz.
        n_samples: length of a segment in samples; None for entire recordings.
        weighted_sampling_steps_per_epoch: number of batches per epoch, drawn by the datasets' weights; None for one
            shuffled pass over all recordings.
        min_duration: minimum duration of a recording, seconds; shorter ones are skipped.
        max_duration: maximum duration of a recording, seconds; longer ones are skipped.
        trunc_duration: maximum duration that is read from a recording, seconds.
        volume_norm: whether to scale the audio to a peak of 0.95, as NeMo does.

    Raises:
        ConfigError: for an unreadable manifest, or if no recording remains.
    """

    def __init__(
        self,
        dataset_meta: Mapping[str, Mapping[str, Any]],
        sample_rate: int,
        n_samples: int | None = None,
        weighted_sampling_steps_per_epoch: int | None = None,
        min_duration: float | None = None,
        max_duration: float | None = None,
        trunc_duration: float | None = None,
        volume_norm: bool = False,
    ) -> None:
        check_rate(sample_rate)
        self.sample_rate, self.n_samples, self.trunc_duration = sample_rate, n_samples, trunc_duration
        self.volume_norm = volume_norm
        self.steps_per_epoch = weighted_sampling_steps_per_epoch
        self.recordings: list[Recording] = []
        self.weights: list[float] = []
        self._bad: set[Path] = set()
        for name, meta in dataset_meta.items():
            found = read_manifest(meta["manifest_path"], meta.get("audio_dir"), name)
            kept = [
                recording
                for recording in found
                if (min_duration or 0) <= recording.duration <= (max_duration or float("inf"))
            ]
            hours = sum(recording.duration for recording in kept) / 3600
            logger.info("%s: %d of %d recordings, %.2f hours", name, len(kept), len(found), hours)
            self.recordings += kept
            self.weights += [float(meta.get("sample_weight", 1.0))] * len(kept)
        if not self.recordings:
            raise ConfigError(
                f"the manifests of {sorted(dataset_meta)} contain no recording of the required duration."
            )

    def get_sampler(self, batch_size: int, world_size: int, rank: int = 0) -> "SegmentSampler | None":
        """Build the sampler of segments for one process.

        Args:
            batch_size: segments of a batch in one process.
            world_size: number of processes.
            rank: index of this process.

        Returns:
            A sampler, or None for entire recordings, which are read in order.
        """
        if not self.n_samples:
            return None
        weights = torch.tensor(self.weights, dtype=torch.float64) if self.steps_per_epoch else None
        count = self.steps_per_epoch * batch_size * world_size if self.steps_per_epoch else len(self)
        return SegmentSampler(self, count, weights, world_size, rank)

    def __len__(self) -> int:
        return len(self.recordings)

    def __getitem__(self, draw: "int | tuple[int, float]") -> dict[str, Any]:
        """Return a recording or a segment of one.

        An unreadable recording is replaced by the next readable one.

        Args:
            draw: index of a recording, or a tuple (index, place). `place`, in [0, 1], selects where the segment starts
                within the range of possible starts; without it the start is random.

        Returns:
            `dataset_name`, `audio_filepath`, `audio` (float32, shape [T_audio]) and `audio_len` in samples.

        Raises:
            IndexError: if the index is out of range.
            AudioError: if no recording can be read.
        """
        index, place = draw if isinstance(draw, tuple) else (draw, None)
        if not 0 <= index < len(self):
            raise IndexError(index)
        for step in range(len(self.recordings)):
            recording = self.recordings[(index + step) % len(self.recordings)]
            try:
                audio = self._read(recording, place)
            except (NemoLfrError, OSError) as error:  # including a missing extra for the file's format
                if recording.path not in self._bad:
                    self._bad.add(recording.path)
                    logger.warning("skipped, the next recording is used instead: %s", error)
                continue
            return {
                "dataset_name": recording.dataset,
                "audio_filepath": recording.name,
                "audio": torch.from_numpy(audio),
                "audio_len": len(audio),
            }
        raise AudioError("no recording of the manifests can be read; the warnings above say why.")

    def _read(self, recording: Recording, place: float | None) -> np.ndarray:
        duration = min(recording.duration, self.trunc_duration or float("inf"))
        start = recording.offset
        if self.n_samples is not None:
            spare = duration - self.n_samples / self.sample_rate
            if spare > 0:
                start += (float(torch.rand(())) if place is None else place) * spare
            # Read slightly more than a segment, because resampling may return fewer samples than expected.
            duration = min(duration, self.n_samples / self.sample_rate + 0.01)
        with AudioReader(recording.path, self.sample_rate) as reader:
            audio = reader.segment(start, duration)[: self.n_samples]
        if not len(audio):
            raise AudioError(f"{recording.path}: contains no samples at {start:.3f} s.")
        if self.volume_norm:
            audio = audio * np.float32(0.95 / max(float(np.abs(audio).max()), 1e-5))
        return audio

    @staticmethod
    def collate_fn(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples to a batch with NeMo's keys.

        Args:
            examples: items of the dataset.

        Returns:
            `dataset_names`, `audio_filepaths`, `audio` (float32, shape [B, T_audio], padded with zeros) and
            `audio_lens` (int32, shape [B]).
        """
        audio = torch.nn.utils.rnn.pad_sequence([example["audio"] for example in examples], batch_first=True)
        return {
            "dataset_names": [example["dataset_name"] for example in examples],
            "audio_filepaths": [example["audio_filepath"] for example in examples],
            "audio": audio,
            "audio_lens": torch.tensor([example["audio_len"] for example in examples], dtype=torch.int32),
        }


class SegmentSampler(DistributedSampler[tuple[int, float]]):
    """Sampler of recordings and segment starts that depends on the epoch alone.

    A run that is killed and resumed at an epoch draws the same segments, with any number of worker processes. The
    sampler is a `DistributedSampler`, so Lightning keeps it and sets its epoch.

    Args:
        dataset: dataset to sample from.
        count: number of draws per epoch, in all processes together.
        weights: weight of each recording, float64, shape [len(dataset)], for draws with replacement; None for one
            shuffled pass.
        world_size: number of processes.
        rank: index of this process.
        seed: seed of all draws.
    """

    def __init__(
        self,
        dataset: CodecDataset,
        count: int,
        weights: torch.Tensor | None,
        world_size: int,
        rank: int,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self.count, self.weights = count, weights

    def __iter__(self) -> Iterator[tuple[int, float]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.weights is not None:
            indices = torch.multinomial(self.weights, self.count, replacement=True, generator=generator)
        else:
            indices = torch.randperm(self.count, generator=generator)
        places = torch.rand(self.count, generator=generator)
        # Strategies that fork or spawn build the sampler before ranks are assigned.
        group = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if group else self.rank
        own = slice(rank, len(self) * self.num_replicas, self.num_replicas)
        return iter(list(zip(indices[own].tolist(), places[own].tolist(), strict=True)))

    def __len__(self) -> int:
        """Return the number of draws per process, which is equal in all processes."""
        return self.count // self.num_replicas


def manifest_loader(config: DictConfig, world_size: int, rank: int) -> DataLoader[dict[str, Any]] | None:
    """Build the data loader of a config section that uses `CodecDataset`.

    A section that names NeMo's `VocoderDataset` gets `CodecDataset` too.

    Args:
        config: data section with `dataset` and `dataloader_params`.
        world_size: number of processes.
        rank: index of this process.

    Returns:
        The loader, or None for another dataset or for options beyond reading audio, which need NeMo's own loader.

    Raises:
        ConfigError: for an unknown argument of the dataset.
    """
    arguments = cast(dict[str, Any], OmegaConf.to_container(config.dataset, resolve=True))
    ours = f"{CodecDataset.__module__}.{CodecDataset.__name__}"
    if arguments.pop("_target_", None) not in (NEMO_DATASET, ours):
        return None
    if arguments.get("feature_processors") or arguments.get("resample_rate"):
        return None
    try:
        dataset = CodecDataset(**{key: value for key, value in arguments.items() if value is not None})
    except TypeError as error:
        raise ConfigError(f"dataset: {error}") from error
    loader = dict(config.dataloader_params)
    sampler = dataset.get_sampler(loader["batch_size"], world_size, rank)
    if sampler is not None:  # the sampler shuffles
        loader.pop("shuffle", None)
    return DataLoader(dataset, collate_fn=dataset.collate_fn, sampler=sampler, **loader)
