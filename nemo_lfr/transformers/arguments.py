"""Check the arguments of `NemoLfrModel`, and the files of a model before `transformers` reads them."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

from nemo_lfr.checkpoint.archive import read_index
from nemo_lfr.errors import CheckpointError, NemoLfrError, first_line, shorten
from nemo_lfr.io.hub import HUB_ID, files_on_hub
from nemo_lfr.io.locate import SAFETENSORS_INDEX, VARIANT_SHARDS


@contextmanager
def checked_files(name: Any, **kwargs: Any) -> Iterator[None]:
    """Check the files of a model that transformers loads inside a `with` block.

    Args:
        name: local path or Hub id.
        kwargs: keyword arguments of `PreTrainedModel.from_pretrained`.

    Raises:
        CheckpointError: if the Hub cannot be reached, or if the index or a safetensors file is damaged.
    """
    check_hub(name, **kwargs)
    check_index(name, **kwargs)
    try:
        yield
    except SafetensorError as error:  # from the library, which reads headers before `_load_pretrained_model`
        raise CheckpointError(
            f"{name}: its safetensors file is damaged ({error}); copy or export it again."
        ) from error
    except NemoLfrError:
        raise
    except Exception:
        check_index(name, **kwargs, is_downloaded=True)
        raise


def check_hub(
    name: Any,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: bool | str | None = None,
    revision: str = "main",
    **_: Any,
) -> None:
    """Raise CheckpointError if a model must be downloaded and the Hub cannot be reached.

    Without this check, transformers would retry for half a minute. The arguments are those of
    `PreTrainedModel.from_pretrained`.
    """
    if not isinstance(name, str) or not HUB_ID.fullmatch(name) or os.path.exists(name) or local_files_only:
        return
    if not force_download and isinstance(try_to_load_from_cache(name, "config.json", cache_dir, revision), str):
        return
    try:
        files_on_hub(name, revision, token)
    except HfHubHTTPError:  # the Hub has answered, so transformers gets the same answer and explains it
        return
    except Exception as error:  # the Hub client's transport (requests, httpx, ...) depends on its version
        reason = shorten(first_line(error), 200)
        raise CheckpointError(
            f"{name}: could not be downloaded from the Hub and is not in the local cache ({reason}); check the name "
            "and the network, or pass the path of a folder."
        ) from error


def check_index(
    name: Any,
    subfolder: str = "",
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    is_downloaded: bool = False,
    **_: Any,
) -> None:
    """Check the index of a model whose weights are in several files.

    Args:
        name: local path or Hub id. If it is neither a local folder nor downloaded, nothing is checked.
        subfolder: as in `PreTrainedModel.from_pretrained`.
        variant: as in `PreTrainedModel.from_pretrained`.
        cache_dir: as in `PreTrainedModel.from_pretrained`.
        revision: as in `PreTrainedModel.from_pretrained`.
        is_downloaded: whether the Hub's cache has the current index of the repository.

    Raises:
        CheckpointError: if the index is damaged, has no "metadata", or lists a file in another folder.
    """
    suffix = "" if variant is None else f".{variant}"
    index_name = SAFETENSORS_INDEX.removesuffix(".json") + f"{suffix}.json"
    if isinstance(name, str | os.PathLike) and os.path.isdir(name):
        index = Path(name, subfolder, index_name)
    elif is_downloaded and isinstance(name, str) and HUB_ID.fullmatch(name):
        index = Path(str(try_to_load_from_cache(name, str(PurePosixPath(subfolder, index_name)), cache_dir, revision)))
    else:
        return
    if not index.exists() or index.with_name(f"model{suffix}.safetensors").exists():
        return
    read_index(index, VARIANT_SHARDS)
    if not isinstance(json.loads(index.read_bytes()).get("metadata"), dict):
        raise CheckpointError(
            f'{index}: the file has no "metadata", which transformers requires; save the model again.'
        )


def check_tensor(value: Any, name: str, error: type[Exception]) -> None:
    """Raise an error of class `error` if an argument is not a tensor."""
    if not isinstance(value, torch.Tensor):
        kind = type(value).__name__
        raise error(f'{name} is a {kind}; pass a tensor. The extractor returns tensors if return_tensors is "pt".')


def mask_lengths(mask: torch.Tensor | None, shape: Any, name: str, error: type[Exception]) -> torch.Tensor | None:
    """Check a mask and return the number of ones in each row, [B]; None if there is no mask.

    Args:
        mask: mask [B, T] or [B, 1, T], in which each row consists of ones followed by zeros; or None.
        shape: expected shape, (B, T).
        name: name of `mask` in messages.
        error: class of the error to raise.

    Raises:
        Exception: of the class `error`, if the mask has another form or shape, or contains no ones.
    """
    if mask is None:
        return None
    check_tensor(mask, name, error)
    if mask.dim() == 3 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if tuple(mask.shape) != tuple(shape):
        raise error(f"{name} has shape {list(mask.shape)}; expected {list(shape)}.")
    is_valid = mask != 0
    if bool((is_valid & (mask != 1)).any()):  # also for NaN
        value = mask[is_valid & (mask != 1)][0].item()
        raise error(f"{name} has the value {value}; pass 1 or True for valid positions, and 0 or False for padding.")
    lengths = is_valid.sum(1)
    if mask.numel() and not lengths.any():
        raise error(f"{name} has no ones, so every clip is empty; pass 1 for valid positions, and 0 for padding.")
    if not torch.equal(is_valid, torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]):
        raise error(f"{name} has ones after a zero; use masks of clips that are padded on the right.")
    return lengths
