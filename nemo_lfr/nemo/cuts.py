"""Batches from Lhotse cuts and Shar, to train on and, which stock cannot, to validate on."""

import logging
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from nemo.collections.common.data.lhotse import get_lhotse_dataloader_from_config
from nemo.collections.common.data.lhotse.dataloader import (
    LhotseDataLoadingConfig,
    make_structured_with_schema_warnings,
)
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, Dataset

from nemo_lfr.errors import AudioError, ConfigError, shorten
from nemo_lfr.io.cut_audio import forbid_programs, read_cut
from nemo_lfr.nemo.careful import careful_iterators

logger = logging.getLogger(__name__)


class CutDataset(Dataset):
    """Lhotse cuts as batches with NeMo's keys.

    A cut's `target_audio` is taken if it has one, as NeMo's `AudioCodecLhotseDataset` does, else the cut itself. A cut
    that cannot be read is named once and left out.

    No file of a dataset runs anything: audio comes from plain files and from memory. Lhotse's audio backends that
    start a shell (sph2pipe, ffmpeg for legacy Opus) are switched off in this process: NeMo's loaders open files too.

    Args:
        sample_rate: Hz.
        segment_duration: seconds of the random segments; whole cuts if not given.
        sanity_check_audio: NeMo's key; audio is always checked here.
        allow_url: read cuts whose audio is at an http(s) URL.
    """

    def __init__(
        self,
        sample_rate: int,
        segment_duration: float | None = None,
        sanity_check_audio: bool = True,
        allow_url: bool = False,
    ) -> None:
        forbid_programs()
        self.sample_rate, self.allow_url = sample_rate, allow_url
        self.segment = int(segment_duration * sample_rate) if segment_duration else None
        self._bad: set[str] = set()

    def __setstate__(self, state: dict[str, Any]) -> None:
        forbid_programs()  # in a worker that was not forked
        self.__dict__.update(state)

    def __getitem__(self, cuts: Iterable[Any]) -> dict[str, torch.Tensor]:
        """Cuts to audio [B, T_audio], padded with zeros, and audio_lens [B].

        Raises:
            AudioError: if none of them can be read.
        """
        examples = [audio for audio in map(self._read, cuts) if audio is not None]
        if not examples:
            raise AudioError("no cut of a batch can be read; the warnings above say why.")
        return {
            "audio": torch.nn.utils.rnn.pad_sequence(examples, batch_first=True),
            "audio_lens": torch.tensor([len(audio) for audio in examples], dtype=torch.int32),
        }

    def _read(self, cut: Any) -> torch.Tensor | None:
        try:
            source = cut.target_audio if cut.has_custom("target_audio") else cut
            audio = read_cut(source, self.sample_rate, allow_url=self.allow_url)
            if not len(audio):
                raise AudioError("it holds no samples.")
        except Exception as error:  # of whichever of Lhotse's many classes
            if cut.id not in self._bad:
                self._bad.add(cut.id)
                logger.warning("cut %s left out: %s", cut.id, shorten(error, 400))
            return None
        if self.segment is not None and len(audio) > self.segment:
            start = random.randint(0, len(audio) - self.segment)  # seeded by Lhotse in each worker, as in NeMo
            audio = audio[start : start + self.segment]
        return torch.from_numpy(np.ascontiguousarray(audio))


def uses_lhotse(config: DictConfig) -> bool:
    """Whether a data section asks for Lhotse, at either place where NeMo looks."""
    return bool(config.get("use_lhotse") or (config.get("dataloader_params") or {}).get("use_lhotse"))


def cut_loader(
    config: DictConfig, sample_rate: int, global_rank: int, world_size: int, *, validation: bool = False
) -> DataLoader:
    """The loader of a data section with `dataset_args` and Lhotse's `dataloader_params`, as NeMo's training has it.

    Args:
        config: the section.
        sample_rate: Hz.
        global_rank, world_size: which process this is, and how many there are.
        validation: one pass over whole cuts in an order that stays, instead of shuffled segments without end.

    Raises:
        ConfigError: for a key that is not known or lacks.
    """
    arguments: Any = OmegaConf.to_container(config.get("dataset_args") or OmegaConf.create(), resolve=True)
    given = config.get("dataloader_params") or OmegaConf.create()
    unknown = set(given) - set(OmegaConf.structured(LhotseDataLoadingConfig)) - {"use_lhotse"}
    if unknown:
        raise ConfigError(f"dataloader_params: {sorted(unknown)} are not keys of NeMo's LhotseDataLoadingConfig.")
    if given.get("batch_size") is None:
        raise ConfigError("dataloader_params: batch_size must be set.")
    for key in ("truncate_duration", "min_duration") if not validation else ():
        if given.get(key) not in (None, -1):
            raise ConfigError(f"dataloader_params: {key} follows from dataset_args.segment_duration; leave it out.")
    try:
        dataset = CutDataset(sample_rate, **arguments)
    except TypeError as error:
        raise ConfigError(f"dataset_args: {error}") from error
    if dataset.segment is None and not validation:
        raise ConfigError("dataset_args: segment_duration must be set to train.")
    loader = make_structured_with_schema_warnings(given)
    loader.sample_rate = sample_rate
    if validation:
        loader.force_finite = True
        loader.shuffle = False
        loader.shard_seed = 0  # NeMo shuffles the shards of a Shar folder even so
    else:
        loader.min_duration = arguments["segment_duration"]
    with careful_iterators():
        return get_lhotse_dataloader_from_config(
            config=loader, global_rank=global_rank, world_size=world_size, dataset=dataset
        )
