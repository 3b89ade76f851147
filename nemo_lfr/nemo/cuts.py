"""Data loaders for Lhotse cuts and Shar, for training and validation.

NeMo itself supports Lhotse for training only.
"""

import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from nemo.collections.common.data.lhotse import get_lhotse_dataloader_from_config
from nemo.collections.common.data.lhotse.dataloader import (
    LhotseDataLoadingConfig,
    make_structured_with_schema_warnings,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.utils.data import DataLoader, Dataset

from nemo_lfr.errors import AudioError, ConfigError, first_line, shorten
from nemo_lfr.io.cut_audio import forbid_programs, read_cut
from nemo_lfr.nemo.careful import careful_iterators
from nemo_lfr.training.settings import CUTS, LOADER, check_settings

logger = logging.getLogger(__name__)

# Maximum number of consecutive batches without a readable cut. Without this limit, training could wait forever.
MAX_UNREADABLE = 1000


class CutDataset(Dataset[dict[str, Any] | None]):
    """Dataset that reads the audio of Lhotse cuts, and returns batches as dictionaries with NeMo's keys.

    Like NeMo's `AudioCodecLhotseDataset`, it uses the audio in a cut's `target_audio` field if there is one, and the
    cut's own audio otherwise. Unreadable cuts are skipped and logged once.

    Audio is only read from regular files, from memory and, with `allow_url`, over HTTP. Lhotse's audio backends that
    start a shell (sph2pipe, and ffmpeg for legacy Opus) are disabled in the whole process, so that a manifest cannot
    execute commands.

    Args:
        sample_rate: sample rate of the batches, Hz.
        segment_duration: maximum duration of an example in seconds. From a longer cut, a random segment is used.
            None for entire cuts.
        sanity_check_audio: accepted for compatibility with NeMo; audio is always checked.
        allow_url: whether to read cuts whose audio is at an http(s) URL.
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
        forbid_programs()  # spawned workers do not inherit the parent's setting
        self.__dict__.update(state)

    def __getitem__(self, cuts: Iterable[Any]) -> dict[str, torch.Tensor] | None:
        """Return a batch of audio.

        Args:
            cuts: Lhotse cuts of the batch.

        Returns:
            `audio`, float32, shape [B, T_audio], padded with zeros, and `audio_lens`, int32, shape [B]. None if no
            cut can be read; `CutLoader` handles this case.
        """
        examples = [audio for audio in map(self._read, cuts) if audio is not None]
        if not examples:
            return None
        return {
            "audio": torch.nn.utils.rnn.pad_sequence(examples, batch_first=True),
            "audio_lens": torch.tensor([len(audio) for audio in examples], dtype=torch.int32),
        }

    def _read(self, cut: Any) -> torch.Tensor | None:
        try:
            source = cut.target_audio if cut.has_custom("target_audio") else cut
            audio = read_cut(source, self.sample_rate, allow_url=self.allow_url)
            if not len(audio):
                raise AudioError("the cut contains no samples.")
        except Exception as error:  # Lhotse raises many exception classes
            if cut.id not in self._bad:
                self._bad.add(cut.id)
                logger.warning("cut %s skipped: %s", cut.id, shorten(error, 400))
            return None
        if self.segment is not None and len(audio) > self.segment:
            start = random.randint(0, len(audio) - self.segment)  # Lhotse seeds `random` in each worker
            audio = audio[start : start + self.segment]
        return torch.from_numpy(np.ascontiguousarray(audio))


class CutLoader(DataLoader[dict[str, Any]]):
    """Data loader that handles batches in which no cut can be read.

    Attributes:
        keep_count: whether each unreadable batch is replaced by a copy of the last readable batch, so that all
            processes have the same number of batches. Unreadable batches before the first readable one are replaced by
            copies of that one. If False, unreadable batches are dropped.
    """

    keep_count = False

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]  # torch's iterators are not generic
        last, missing = None, 0
        for batch in super().__iter__():
            if batch is None:
                missing += 1
                if missing == MAX_UNREADABLE:
                    break
                if last is None or not self.keep_count:
                    continue
                batch = last
            else:
                if last is None and self.keep_count:
                    yield from [batch] * missing
                last, missing = batch, 0
            yield batch
        if missing == MAX_UNREADABLE or (last is None and missing):
            raise AudioError(
                f"no cut in {missing} consecutive batches can be read; the warnings above give the reasons."
            )


def data_section(section: Any, name: str) -> DictConfig:
    """Convert the config section of a data loader to a `DictConfig`, if it is a dict.

    Args:
        section: the section, a dict or a `DictConfig`.
        name: name of the section, such as "train_ds", for messages.

    Raises:
        ConfigError: if the section is neither a config nor a dict, or contains values that a config cannot contain.
    """
    if isinstance(section, DictConfig):
        return section
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"{name} is {shorten(repr(section))}; pass a dict or an OmegaConf config with the keys of {name}."
        )
    try:
        return cast(DictConfig, OmegaConf.create({name: dict(section)})[name])
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {shorten(error, 200)}.") from error


def uses_lhotse(config: DictConfig) -> bool:
    """Return whether a data section sets `use_lhotse`.

    The key may be in the section or in its `dataloader_params`; NeMo reads both.
    """
    return bool(config.get("use_lhotse") or (config.get("dataloader_params") or {}).get("use_lhotse"))


def cut_loader(
    config: DictConfig, sample_rate: int, global_rank: int, world_size: int, *, validation: bool = False
) -> DataLoader[dict[str, Any]]:
    """Build the data loader of a config section that uses Lhotse.

    Args:
        config: data section with `dataset_args` and `dataloader_params`, as in NeMo's training configs.
        sample_rate: sample rate of the batches, Hz.
        global_rank: rank of this process.
        world_size: number of processes.
        validation: whether the loader makes one pass over the cuts in a fixed order. Otherwise the loader is for
            training: it yields shuffled cuts without end, and the config must set `segment_duration`.

    Returns:
        A data loader that yields the batches of `CutDataset`.

    Raises:
        ConfigError: for an unknown, missing or conflicting key, or an invalid number.
    """
    arguments: Any = OmegaConf.to_container(config.get("dataset_args") or OmegaConf.create(), resolve=True)
    given = config.get("dataloader_params") or OmegaConf.create()
    settings, where = config._get_full_key("dataloader_params"), config._get_full_key("dataset_args")
    check_settings(cast(dict[str, Any], OmegaConf.to_container(given, resolve=True)), LOADER, settings)
    check_settings(arguments, CUTS, where)
    unknown = set(given) - set(OmegaConf.structured(LhotseDataLoadingConfig)) - {"use_lhotse"}
    if unknown:
        raise ConfigError(
            f"{settings}: {sorted(unknown)} are not keys of NeMo's LhotseDataLoadingConfig; remove them."
        )
    if given.get("batch_size") is None:
        raise ConfigError(f"{settings}: batch_size must be set.")
    for key in ("truncate_duration", "min_duration") if not validation else ():
        if given.get(key) not in (None, -1):
            raise ConfigError(f"{settings}: remove {key}, because dataset_args.segment_duration determines it.")
    try:
        dataset = CutDataset(sample_rate, **arguments)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}; correct the arguments in the config.") from error
    if dataset.segment is None and not validation:
        raise ConfigError(f"{where}: segment_duration must be set for training.")
    try:
        loader = make_structured_with_schema_warnings(given)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{settings}.{error.full_key}: {first_line(error)}; correct the value.") from error
    loader.sample_rate = sample_rate
    if validation:
        loader.force_finite = True
        loader.shuffle = False
        loader.shard_seed = 0  # NeMo shuffles the shards of a Shar folder even with shuffle=False
    else:
        loader.min_duration = arguments["segment_duration"]
    with careful_iterators():
        batches: DataLoader[dict[str, Any]] = get_lhotse_dataloader_from_config(
            config=loader, global_rank=global_rank, world_size=world_size, dataset=dataset
        )
    batches.__class__ = CutLoader  # NeMo has no option for the loader's class
    batches.keep_count = world_size > 1
    return batches
