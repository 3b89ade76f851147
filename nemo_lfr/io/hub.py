"""Find a checkpoint by its local path, its model name, or its repository on the Hugging Face Hub."""

import contextlib
import logging
import os
import re
from pathlib import Path

from nemo_lfr.bundled import LFR, bundled_checkpoint
from nemo_lfr.errors import CheckpointError, first_line, shorten
from nemo_lfr.io.locate import (
    MODEL_SUFFIXES,
    SAFETENSORS,
    SAFETENSORS_CONFIG,
    SAFETENSORS_INDEX,
    SHARDS,
    check_path,
    folder_files,
    is_unpacked,
    locate_checkpoint,
    looks_local,
)

logger = logging.getLogger(__name__)

# Model names in NVIDIA's model cards and tutorials, and the Hub repositories that they refer to.
ALIASES = {"audio_codec_low_frame_rate_22khz": LFR}
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)
LICENSES = {LFR: "NVIDIA's NSCLv1 (research and other non-commercial use only)"}


def find_checkpoint(source: str | os.PathLike[str] | None, refresh: bool = False) -> Path:
    """Return the local path of a checkpoint, and download the checkpoint if necessary.

    Args:
        source: path (see `locate_checkpoint`), Hub id such as "OWNER/NAME", or NeMo's name of a model (see `ALIASES`);
            None for the bundled codec.
        refresh: whether to download the checkpoint again, even if it is in the Hub's cache.

    Returns:
        Path of a `.nemo` or `.ckpt` file, or of a folder with config and weights.

    Raises:
        CheckpointError: if the path does not exist or is not a checkpoint, or if the repository has no checkpoint,
            or is not cached and cannot be downloaded.
    """
    if source is None:
        return bundled_checkpoint()
    check_path(source, CheckpointError)
    text = os.fspath(source)
    repository = ALIASES.get(text, text)
    path = os.path.expanduser(text)
    if os.path.lexists(path):
        return locate_checkpoint(path)
    if os.path.splitext(path)[1].lower() in MODEL_SUFFIXES or not HUB_ID.fullmatch(repository):
        raise CheckpointError(f"{shorten(text, 300) or repr(text)}: no such file, and not a Hub id such as {LFR}.")
    if repository not in LICENSES and looks_local(text):
        # A local folder has the same name as the owner of the repository, so the user may mean a path. The repository
        # is therefore used only if it is in the cache.
        if (cached := _cached(repository)) is not None and not refresh:
            return cached
        first = text.partition("/")[0]
        raise CheckpointError(
            f"{text}: no such file in the folder {first!r}; if you mean a Hub repository, run from another folder, or "
            f"download it first: hf download {text}"
        )
    return _download(repository, refresh)


def _cached(repository: str) -> Path | None:
    """Return the checkpoint of a repository from the Hub's cache; None if the cache has none or several."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    # Errors of a damaged cache are ignored, so that the file is downloaded again.
    with contextlib.suppress(LocalEntryNotFoundError, OSError, ValueError):
        return Path(hf_hub_download(repository, _usual_name(repository), local_files_only=True))
    with contextlib.suppress(LocalEntryNotFoundError, OSError, ValueError):
        snapshot = Path(snapshot_download(repository, local_files_only=True))
        found = sorted(snapshot.rglob("*.nemo"))
        if len(found) == 1:
            return found[0]
        if not found and is_unpacked(snapshot):
            return snapshot
    found = _in_snapshot(repository)
    usual = [path for path in found if path.name == _usual_name(repository)]
    for candidates in (usual, found):
        if len(candidates) == 1:
            return candidates[0]
    return None


def _in_snapshot(repository: str) -> list[Path]:
    """List the checkpoints in a repository's snapshot in the Hub's cache, without the Hub's client.

    The client finds a snapshot only if the cache stores a branch name for it. There is no branch name if the snapshot
    was downloaded by its commit, or if the cache was copied without links and references.

    Returns:
        The `.nemo` files, or the folder of the snapshot if it contains config and weights. The list is empty if the
        cache has no snapshot of the repository, or several.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE, "models--" + repository.replace("/", "--"), "snapshots")
    try:
        snapshots = [path for path in folder.iterdir() if path.is_dir()]
        if len(snapshots) != 1:
            return []
        return sorted(snapshots[0].rglob("*.nemo")) or [path for path in snapshots if is_unpacked(path)]
    except OSError:
        return []


def _usual_name(repository: str) -> str:
    """Return the usual name of the `.nemo` file in a repository. NeMo's `from_pretrained` expects this name."""
    return repository.partition("/")[2] + ".nemo"


def files_on_hub(repository: str, revision: str | None = None, token: bool | str | None = None) -> list[str]:
    """List the files of a repository on the Hub.

    Call this function before the first download. Without a network, it fails at once, whereas the client's download
    functions retry for half a minute.

    Args:
        repository: Hub id, such as "OWNER/NAME".
        revision: branch, tag or commit; None for the main branch.
        token: as in `huggingface_hub`.

    Raises:
        Exception: of any class, from the client or its transport, if the Hub cannot be reached or has no such
            repository.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

    info = HfApi().model_info(repository, revision=revision, token=token, timeout=HF_HUB_ETAG_TIMEOUT)
    return [file.rfilename for file in info.siblings or ()]


def _download(repository: str, refresh: bool) -> Path:
    """Return a repository's checkpoint from the Hub's cache, or download it."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if not refresh and (cached := _cached(repository)) is not None:
            return cached
        names = files_on_hub(repository)
        if repository in LICENSES:
            logger.warning("%s: the license of these weights is %s.", repository, LICENSES[repository])
        found = [file for file in names if file.endswith(".nemo")]
        if not found and (files := folder_files(names)):
            patterns = [*files, SHARDS] if SAFETENSORS_INDEX in files else list(files)
            return Path(snapshot_download(repository, allow_patterns=patterns, force_download=refresh))
        usual = _usual_name(repository)
        if not found:
            raise CheckpointError(
                f"{repository}: the repository contains no checkpoint, since it has neither a .nemo file, nor "
                f"{SAFETENSORS_CONFIG} and {SAFETENSORS}; check the name."
            )
        if usual not in found and len(found) != 1:
            raise CheckpointError(
                f"{repository}: the repository contains {len(found)} .nemo files {found}, but one is expected; "
                "download one of them and pass its path."
            )
        return Path(hf_hub_download(repository, usual if usual in found else found[0], force_download=refresh))
    except CheckpointError:
        raise
    except Exception as error:  # the Hub client's transport (requests, httpx, ...) depends on its version
        if len(cached_files := _in_snapshot(repository)) > 1:
            listing = shorten(", ".join(path.name for path in cached_files), 200)
            raise CheckpointError(
                f"{repository}: the Hub cannot be reached, and the local cache contains {len(cached_files)} .nemo "
                f"files in {cached_files[0].parent} ({listing}); pass the path of one of these files."
            ) from error
        raise CheckpointError(
            f"{repository}: the repository could not be downloaded from the Hub and is not in the local cache "
            f"({first_line(error)}); check the name and the network, or pass the path of a downloaded .nemo file."
        ) from error
