"""Write codec modules to a `.nemo` file that NeMo can open."""

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
from nemo_lfr.io.atomic import sync, writing_folder
from nemo_lfr.io.locate import CONFIG_MEMBER, WEIGHTS_MEMBER
from nemo_lfr.io.regular import check_replaceable
from nemo_lfr.io.tensor_file import save_to_file


def split_weight_norm(part: nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's state dict with the weight-norm tensors that NeMo expects.

    Args:
        part: module with plain weights (without weight norm).

    Returns:
        The state dict. The gain and the direction of weight norm replace the weight of each convolution.
    """
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
    """Write a `.nemo` file atomically.

    Args:
        path: output file; an existing file is replaced.
        config: model config. Class names of this package are replaced by NeMo's, so that NeMo 3.0 can open the file.
        state_dict: tensors under the names that NeMo uses.

    Raises:
        CheckpointError: if the file cannot be written, for instance on a full disk. An existing file is then kept.
        ConfigError: if NeMo has no class for one of the modules.
    """
    path = Path(path)
    check_replaceable(path, CheckpointError)
    config = dict(config) | {"target": NEMO_MODEL}
    config |= {name: nemo_config(config[name]) for name in PARTS}
    try:
        _write_archive(path, config, state_dict)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
        reason = error.strerror if isinstance(error, OSError) else "the disk may be full"
        raise CheckpointError(f"{path}: the file cannot be written ({reason}); write it to another folder.") from error


def _write_archive(path: Path, config: dict[str, Any], state_dict: Mapping[str, torch.Tensor]) -> None:
    with writing_folder(path.parent) as folder:
        members = {name: Path(folder, name) for name in (CONFIG_MEMBER, WEIGHTS_MEMBER)}
        OmegaConf.save(OmegaConf.create(config), members[CONFIG_MEMBER])
        with open(members[WEIGHTS_MEMBER], "wb") as weights:
            save_to_file(dict(state_dict), weights)
        temporary = Path(folder, "model.nemo")
        with open(temporary, "wb") as file:
            with tarfile.open(fileobj=file, mode="w") as archive:
                for name, member in members.items():
                    archive.add(member, arcname=name, filter=_anonymous)
            file.flush()
            sync(file.fileno())
        os.replace(temporary, path)


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Remove owner and time from a tar member, so that equal weights give equal bytes."""
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info
