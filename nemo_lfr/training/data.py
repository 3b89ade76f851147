"""Read training segments from the recordings in NeMo manifests, in any audio format and sample rate.

Files that cannot be read are skipped, and logged once. `CodecDataset` replaces NeMo's `VocoderDataset`.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from nemo_lfr.errors import AudioError, ConfigError, NemoLfrError, counted, quoted, shorten
from nemo_lfr.frames import duration_text
from nemo_lfr.io.audio import AudioReader, check_rate
from nemo_lfr.io.manifests import Recording, read_manifest
from nemo_lfr.training.settings import DATASET, LOADER, POSITIVE_OR_ZERO, check_settings

logger = logging.getLogger(__name__)

# Keys of an entry of `dataset_meta`. As in NeMo, `audio_tar_filepaths` has no effect on a dataset of separate files.
DATASET_KEYS = {"manifest_path", "audio_dir", "sample_weight", "audio_tar_filepaths"}
NEMO_DATASET = "nemo.collections.tts.data.vocoder_dataset.VocoderDataset"


class CodecDataset(Dataset[dict[str, Any]]):
    """Dataset of recordings, or of random segments of recordings.

    The audio is float32 and mono.

    Args:
        dataset_meta: settings of each dataset, by name: `manifest_path`, `audio_dir` (by default the manifest's
            folder) and `sample_weight` (by default 1). Invalid lines of a manifest are skipped, and logged once.
        sample_rate: sample rate of the audio in Hz.
        n_samples: length of a segment in samples; None for entire recordings.
        weighted_sampling_steps_per_epoch: number of batches per epoch. Recordings are then drawn at random, with
            probabilities proportional to the `sample_weight` of their dataset. If None, an epoch is one shuffled pass
            over all recordings. Without `n_samples`, this argument has no effect, and recordings are read in order.
        min_duration: minimum duration of a recording in seconds. Shorter recordings are skipped.
        max_duration: maximum duration of a recording in seconds. Longer recordings are skipped.
        trunc_duration: duration in seconds; a longer recording is cut to its first `trunc_duration` seconds.
        volume_norm: whether to scale the audio to a peak of 0.95, as NeMo does.

    Raises:
        ConfigError: if a manifest cannot be read, no recording has the required duration, or an argument is invalid.
        AudioError: if `sample_rate` is not a valid sample rate.
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
        check_settings(
            {
                "n_samples": n_samples,
                "weighted_sampling_steps_per_epoch": weighted_sampling_steps_per_epoch,
                "min_duration": min_duration,
                "max_duration": max_duration,
                "trunc_duration": trunc_duration,
            },
            DATASET,
        )
        if min_duration is not None and max_duration is not None and min_duration > max_duration:
            raise ConfigError(
                f"min_duration is {min_duration}, but max_duration is {max_duration}; pass a smaller min_duration, "
                "or a larger max_duration."
            )
        self.sample_rate, self.n_samples, self.trunc_duration = sample_rate, n_samples, trunc_duration
        self.volume_norm = volume_norm
        self.steps_per_epoch = weighted_sampling_steps_per_epoch
        self.recordings: list[Recording] = []
        self.weights: list[float] = []
        self._bad: set[Path] = set()
        for name, meta in _checked_meta(dataset_meta):
            found = read_manifest(meta["manifest_path"], meta.get("audio_dir"), name)
            kept = [
                recording
                for recording in found
                if (min_duration or 0) <= recording.duration <= (max_duration or float("inf"))
            ]
            duration = duration_text(sum(recording.duration for recording in kept))
            logger.info("%s: using %d of %d recordings (%s of audio)", name, len(kept), len(found), duration)
            self.recordings += kept
            weight = meta.get("sample_weight")
            self.weights += [1.0 if weight is None else float(weight)] * len(kept)
        if not self.recordings:
            raise ConfigError(
                f"the manifests of {sorted(dataset_meta)} contain no recording of the required duration; change "
                "min_duration or max_duration, or add recordings."
            )
        if self.steps_per_epoch and not any(self.weights):
            names = sorted({recording.dataset for recording in self.recordings})
            raise ConfigError(
                "dataset_meta: sample_weight is 0 for every dataset with recordings of the required duration "
                f"({', '.join(names)}); set it to more than 0 for at least one of these datasets."
            )

    def get_sampler(self, batch_size: int, world_size: int, rank: int = 0) -> "SegmentSampler | None":
        """Build the sampler of segments for one process.

        Args:
            batch_size: number of segments per batch in one process.
            world_size: number of processes.
            rank: index of this process.

        Returns:
            A sampler, or None for a dataset of entire recordings, which are read in order.
        """
        if not self.n_samples:
            return None
        weights = torch.tensor(self.weights, dtype=torch.float64) if self.steps_per_epoch else None
        count = self.steps_per_epoch * batch_size * world_size if self.steps_per_epoch else len(self)
        return SegmentSampler(self, count, weights, world_size, rank)

    def __len__(self) -> int:
        return len(self.recordings)

    def __getitem__(self, draw: "int | tuple[int, float]") -> dict[str, Any]:
        """Return a recording, or a segment of a recording.

        If the recording cannot be read, the next recording that can be read is used instead.

        Args:
            draw: index of a recording, or a tuple (index, position). `position` is a number from 0 to 1 that selects
                the start of the segment: 0 for the first possible start, 1 for the last one. Without `position`, the
                start is random.

        Returns:
            A dict with `dataset_name`, `audio_filepath`, `audio` (float32, [T_audio]) and `audio_len` in samples.

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
            except (NemoLfrError, OSError) as error:  # MissingExtraError, if the format needs another package
                if recording.path not in self._bad:
                    self._bad.add(recording.path)
                    logger.warning("recording is skipped, and the next one is used instead: %s", error)
                continue
            return {
                "dataset_name": recording.dataset,
                "audio_filepath": recording.name,
                "audio": torch.from_numpy(audio),
                "audio_len": len(audio),
            }
        raise AudioError("no recording in the manifests can be read; see the warnings above for the reasons.")

    def _read(self, recording: Recording, place: float | None) -> np.ndarray:
        duration = min(recording.duration, self.trunc_duration or float("inf"))
        start = recording.offset
        if self.n_samples is not None:
            spare = duration - self.n_samples / self.sample_rate
            if spare > 0:
                start += (float(torch.rand(())) if place is None else place) * spare
            # Read slightly more than a segment, because resampling may return a few samples less than expected.
            duration = min(duration, self.n_samples / self.sample_rate + 0.01)
        with AudioReader(recording.path, self.sample_rate) as reader:
            audio = reader.segment(start, duration)[: self.n_samples]
        if not len(audio):
            raise AudioError(
                f"{recording.path}: no samples at {start:.3f} s; correct the offset or duration in the manifest."
            )
        if self.volume_norm:
            audio = audio * np.float32(0.95 / max(float(np.abs(audio).max()), 1e-5))
        return audio

    @staticmethod
    def collate_fn(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples into a batch with the keys that NeMo uses.

        Args:
            examples: examples from the dataset.

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
    """Sampler that draws recordings and the starts of segments. The draws depend only on the seed and the epoch.

    The base class is `DistributedSampler` because Lightning sets the epoch of such a sampler and does not replace it.

    Args:
        dataset: dataset to sample from.
        count: number of draws per epoch, summed over all processes; must be `len(dataset)` if `weights` is None.
        weights: weight of each recording for draws with replacement, float64, shape [len(dataset)]; None for one
            shuffled pass over all recordings.
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
        # With strategies that fork or spawn processes, the sampler is built before the ranks are assigned.
        group = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if group else self.rank
        own = slice(rank, len(self) * self.num_replicas, self.num_replicas)
        return iter(list(zip(indices[own].tolist(), places[own].tolist(), strict=True)))

    def __len__(self) -> int:
        """Return the number of examples that each process draws per epoch."""
        return self.count // self.num_replicas


def manifest_loader(config: DictConfig, world_size: int, rank: int) -> DataLoader[dict[str, Any]] | None:
    """Build the data loader for a config section that names `CodecDataset` or NeMo's `VocoderDataset`.

    In both cases, the loader reads from a `CodecDataset`.

    Args:
        config: section of the training config with the keys `dataset` and `dataloader_params`.
        world_size: number of processes.
        rank: index of this process.

    Returns:
        The data loader; None if the section names another dataset, or sets `feature_processors` or `resample_rate`.
        NeMo's own data loader is then needed.

    Raises:
        ConfigError: if the section is invalid, if the dataset cannot be created, or if it has too few recordings for a
            batch.
        AudioError: if `sample_rate` is not a valid sample rate.
    """
    where = {key: config._get_full_key(key) for key in ("dataset", "dataloader_params")}
    loader = dict(config.get("dataloader_params") or {})
    check_settings(loader, LOADER, where["dataloader_params"])
    arguments = cast(dict[str, Any], OmegaConf.to_container(config.dataset, resolve=True))
    check_settings(arguments, DATASET, where["dataset"])
    ours = f"{CodecDataset.__module__}.{CodecDataset.__name__}"
    if arguments.pop("_target_", None) not in (NEMO_DATASET, ours):
        return None
    if any([arguments.pop(key, None) for key in ("feature_processors", "resample_rate")]):
        return None
    try:
        dataset = CodecDataset(**{key: value for key, value in arguments.items() if value is not None})
    except TypeError as error:
        raise ConfigError(f"{where['dataset']}: {error}; correct the arguments in the config.") from error
    except NemoLfrError as error:
        raise type(error)(f"{where['dataset']}: {error}") from error
    if loader.get("batch_size") is None:
        raise ConfigError(f"{where['dataloader_params']}: batch_size must be set.")
    sampler = dataset.get_sampler(loader["batch_size"], world_size, rank)
    if sampler is not None:  # the sampler already shuffles
        loader.pop("shuffle", None)
    try:
        batches = DataLoader(dataset, collate_fn=dataset.collate_fn, sampler=sampler, **loader)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where['dataloader_params']}: {error}; correct the values in the config.") from error
    if not len(batches):
        shares = f", divided among {world_size} processes," if world_size > 1 else ""
        drawn = len(dataset) if sampler is None else len(sampler)
        advice = f"set batch_size to {drawn} or less, set drop_last to false" if drawn else "use fewer processes"
        raise ConfigError(
            f"{where['dataloader_params']}: {counted(len(dataset), 'recording')}{shares} cannot fill a batch of "
            f"{loader['batch_size']}; {advice}, or add recordings."
        )
    return batches


def _checked_meta(dataset_meta: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the name and the settings of each dataset.

    Raises:
        ConfigError: if the settings of a dataset are not a mapping, lack `manifest_path`, or contain an unknown key or
            an invalid weight.
    """
    if not isinstance(dataset_meta, Mapping) or not dataset_meta:
        raise ConfigError(f"dataset_meta is {quoted(dataset_meta)}; pass a mapping from names to datasets.")
    for name, meta in dataset_meta.items():
        what = f"dataset_meta.{shorten(name)}"
        if not isinstance(meta, Mapping) or not isinstance(meta.get("manifest_path"), str | os.PathLike):
            raise ConfigError(f"{what} is {quoted(meta)}; pass a mapping whose manifest_path is a path.")
        if unknown := sorted(set(map(str, meta)) - DATASET_KEYS):
            raise ConfigError(f"{what} has unknown keys: {shorten(unknown)}; use {', '.join(sorted(DATASET_KEYS))}.")
        check_settings(meta, {"sample_weight": POSITIVE_OR_ZERO}, what)
    return list(dataset_meta.items())
