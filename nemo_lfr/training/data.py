"""Segments of speech from NeMo manifests, of any format, rate and channels; broken files are named and passed by.

NeMo's `VocoderDataset` reads float files as silence, makes a batch of a thousand channels from stereo, and stops at
the first file that it cannot read.
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


class CodecDataset(Dataset):
    """Recordings, or random segments of them, as float32 at one rate.

    Args:
        dataset_meta: name -> manifest_path, audio_dir (the manifest's folder if not given) and sample_weight. A line
            that cannot be used is logged once and left out.
        sample_rate: Hz.
        n_samples: length of a segment; whole recordings if not given.
        weighted_sampling_steps_per_epoch: draw so many batches by the datasets' weights; else one shuffled pass.
        min_duration, max_duration: seconds; recordings outside are left out.
        trunc_duration: seconds of a recording that are read at most.
        volume_norm: scale to a peak of 0.95, as NeMo does.

    Raises:
        ConfigError: for a manifest that cannot be read, or no recording at all.
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
            raise ConfigError(f"the manifests of {sorted(dataset_meta)} hold no recording of the wanted duration.")

    def get_sampler(self, batch_size: int, world_size: int, rank: int = 0) -> "SegmentSampler | None":
        """How an epoch of segments is drawn, and this process's share of it; whole recordings come in order."""
        if not self.n_samples:
            return None
        weights = torch.tensor(self.weights, dtype=torch.float64) if self.steps_per_epoch else None
        count = self.steps_per_epoch * batch_size * world_size if self.steps_per_epoch else len(self)
        return SegmentSampler(self, count, weights, world_size, rank)

    def __len__(self) -> int:
        return len(self.recordings)

    def __getitem__(self, draw: "int | tuple[int, float]") -> dict[str, Any]:
        """A recording, or of `(index, place)` the segment that starts at this share of what can be skipped."""
        index, place = draw if isinstance(draw, tuple) else (draw, None)
        if not 0 <= index < len(self):
            raise IndexError(index)
        for step in range(len(self.recordings)):
            recording = self.recordings[(index + step) % len(self.recordings)]
            try:
                audio = self._read(recording, place)
            except (NemoLfrError, OSError) as error:  # of a format that needs an extra, too
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
            # Resampling needs a little more than it gives.
            duration = min(duration, self.n_samples / self.sample_rate + 0.01)
        with AudioReader(recording.path, self.sample_rate) as reader:
            audio = reader.segment(start, duration)[: self.n_samples]
        if not len(audio):
            raise AudioError(f"{recording.path}: holds no samples at {start:.3f} s.")
        if self.volume_norm:
            audio = audio * np.float32(0.95 / max(float(np.abs(audio).max()), 1e-5))
        return audio

    @staticmethod
    def collate_fn(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Examples as a batch with NeMo's keys; audio [B, T_audio] is padded with zeros."""
        audio = torch.nn.utils.rnn.pad_sequence([example["audio"] for example in examples], batch_first=True)
        return {
            "dataset_names": [example["dataset_name"] for example in examples],
            "audio_filepaths": [example["audio_filepath"] for example in examples],
            "audio": audio,
            "audio_lens": torch.tensor([example["audio_len"] for example in examples], dtype=torch.int32),
        }


class SegmentSampler(DistributedSampler):
    """Draws recordings and where their segments start, from the epoch's number alone.

    A run that was killed and started again at an epoch draws what it would have drawn, whatever the number of worker
    processes. It is a `DistributedSampler`, so that Lightning leaves it as it is and tells it the epoch.

    Args:
        dataset: how many recordings there are.
        count: draws in an epoch, of all processes together.
        weights: of each recording, drawn with replacement; else one shuffled pass.
        world_size, rank: processes, and which one this is.
        seed: of all draws.
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
        # Strategies that fork or spawn build the sampler before there are ranks.
        group = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if group else self.rank
        own = slice(rank, len(self) * self.num_replicas, self.num_replicas)
        return iter(list(zip(indices[own].tolist(), places[own].tolist(), strict=True)))

    def __len__(self) -> int:
        """This process's draws: the same number for each."""
        return self.count // self.num_replicas


def manifest_loader(config: DictConfig, world_size: int, rank: int) -> DataLoader | None:
    """The loader of a data section whose dataset is NeMo's `VocoderDataset`, or ours by name.

    Args:
        config: the section, with `dataset` and `dataloader_params`.
        world_size, rank: processes, and which one this is.

    Returns:
        None for another dataset, or one that does more than read audio: NeMo's own loader is for these.

    Raises:
        ConfigError: for an argument that the dataset does not know.
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
    if sampler is not None:  # which shuffles
        loader.pop("shuffle", None)
    return DataLoader(dataset, collate_fn=dataset.collate_fn, sampler=sampler, **loader)
