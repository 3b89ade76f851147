"""Find out why Lightning cannot load a training checkpoint, and read one without hyperparameters."""

import os
from pathlib import Path
from typing import Any

import torch

from nemo_lfr.checkpoint import load_parts, read_config
from nemo_lfr.checkpoint.archive import read_members
from nemo_lfr.checkpoint.lightning import has_dict_config
from nemo_lfr.checkpoint.tensors import Tensors
from nemo_lfr.errors import CheckpointError, ConfigError
from nemo_lfr.nemo.config import checked_values


def problem_of_training_checkpoint(checkpoint: Any) -> CheckpointError | None:
    """Return the error for a file that cannot be loaded as a training checkpoint of the codec.

    The result is None if the file can be loaded, or is not local.
    """
    if not isinstance(checkpoint, str | os.PathLike) or "://" in str(checkpoint):
        return None
    path = Path(os.path.expanduser(checkpoint))
    if path.is_dir():
        return CheckpointError(f"{path}: this is a folder; pass a .ckpt file in it, or use restore_from.")
    try:
        members = read_members(path)
        if members.config is not None:
            return CheckpointError(f"{path}: this is a .nemo file, not a training checkpoint; use restore_from.")
        checked_values(read_config(path))
        load_parts(path)
        assert not isinstance(members.weights, dict)  # which only a folder has
        if not has_dict_config(Tensors(path, members.weights, training=True).contents):
            return CheckpointError(
                f"{path}: the hyper_parameters have no DictConfig named cfg, which NeMo needs; use restore_from."
            )
    except CheckpointError as error:
        return error
    except ConfigError as error:
        return CheckpointError(f"{path}: {error}")
    except FileNotFoundError:
        return CheckpointError(f"{path}: no such file; pass the path of a .ckpt file.")
    except OSError as error:
        return CheckpointError(f"{path}: the file cannot be read ({error.strerror}); check its permissions.")
    return None


def weights_without_config(path: Path) -> dict[str, torch.Tensor] | None:
    """Return the weights in a training checkpoint that has no hyperparameters, so that no model can be built from it.

    The result is None for any other file.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    if path.is_dir():
        return None
    members = read_members(path)
    if members.config is not None or isinstance(members.weights, dict):
        return None
    tensors = Tensors(path, members.weights, training=True)
    if "state_dict" not in tensors.contents or "hyper_parameters" in tensors.contents:
        return None
    return {name: tensors[name] for name in tensors.entries}
