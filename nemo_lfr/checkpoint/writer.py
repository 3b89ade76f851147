"""Modules -> a `.nemo` that stock NeMo opens."""

import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from nemo_lfr.checkpoint.config import NEMO_MODEL, PARTS, nemo_config
from nemo_lfr.checkpoint.names import DIRECTION, GAIN, gain_of
from nemo_lfr.errors import CheckpointError
from nemo_lfr.io.atomic import writing_folder
from nemo_lfr.io.locate import CONFIG_MEMBER, WEIGHTS_MEMBER
from nemo_lfr.io.tensor_file import save_to_file


def split_weight_norm(part: nn.Module) -> dict[str, torch.Tensor]:
    """State dict of a part built with plain weights, spelled as NeMo's weight-normed convolutions."""
    state = {}
    for key, value in part.state_dict().items():
        if key.endswith(".conv.weight"):
            stem = key.removesuffix(".weight")
            state[stem + GAIN], state[stem + DIRECTION] = gain_of(value), value
        else:
            state[key] = value
    return state


def write_checkpoint(
    path: str | os.PathLike[str], config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]
) -> None:
    """Write a `.nemo` aside and rename it into place, so that `path` is never half a file.

    Args:
        path: where to write.
        config: the model config; its parts are named by NeMo's classes, so that any NeMo 3.0 opens the file.
        state_dict: tensors by NeMo's keys.

    Raises:
        CheckpointError: if it cannot be written, as on a full disk; what was there is still there.
    """
    path = Path(path)
    config = dict(config) | {"target": NEMO_MODEL}
    config |= {name: nemo_config(config[name]) for name in PARTS}
    try:
        _write_aside(path, config, state_dict)
    except (OSError, RuntimeError) as error:  # torch's writer has RuntimeErrors for a full disk
        reason = error.strerror if isinstance(error, OSError) else "the disk may be full"
        raise CheckpointError(f"{path}: cannot be written ({reason}).") from error


def _write_aside(path: Path, config: dict[str, Any], state_dict: Mapping[str, torch.Tensor]) -> None:
    with writing_folder(path.parent) as folder:
        members = {name: Path(folder, name) for name in (CONFIG_MEMBER, WEIGHTS_MEMBER)}
        OmegaConf.save(OmegaConf.create(config), members[CONFIG_MEMBER])
        with open(members[WEIGHTS_MEMBER], "wb") as weights:
            save_to_file(dict(state_dict), weights)
        aside = Path(folder, "model.nemo")
        with open(aside, "wb") as file:
            with tarfile.open(fileobj=file, mode="w") as archive:
                for name, member in members.items():
                    archive.add(member, arcname=name, filter=_anonymous)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same weights give the same bytes, whoever wrote them."""
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info
