"""Find a checkpoint by its local path, its model name, or its repository on the Hugging Face Hub."""

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
    main_snapshot,
    only_snapshot,
)

logger = logging.getLogger(__name__)

# Model names in NVIDIA's model cards and tutorials, and the Hub repositories that they refer to.
ALIASES = {"audio_codec_low_frame_rate_22khz": LFR}
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)
LICENSES = {LFR: "NVIDIA's NSCLv1 (research and other non-commercial use only)"}


def find_checkpoint(source: str | os.PathLike[str] | None, refresh: bool = False) -> Path:
    """Return the local path of a checkpoint, and download the checkpoint if necessary.

    A Hub id stands for the main branch of the repository. If the Hub cannot be reached, and the cache contains only
    one snapshot of the repository, this snapshot is used even if its branch is unknown. A warning is then logged.

    Args:
        source: path (see `locate_checkpoint`), Hub id such as "OWNER/NAME", or NeMo's name of a model (see `ALIASES`);
            None for the bundled codec.
        refresh: whether to download the checkpoint again, even if it is in the Hub's cache.

    Returns:
        Path of a `.nemo` or `.ckpt` file, or of a folder with config and weights.

    Raises:
        CheckpointError: if there is no checkpoint, if the choice among several is ambiguous, or if the download fails.
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
    """Return the checkpoint in the cached snapshot of a repository's main branch.

    The result is None if the cache has no such snapshot, or if `checkpoint_in` raises an error for the snapshot.
    The Hub client's own functions would refuse an incomplete snapshot, even if we do not need the missing files.
    """
    snapshot = main_snapshot(_cache_folder(repository))
    try:
        return None if snapshot is None else checkpoint_in(snapshot, repository)
    except CheckpointError:
        return None


def _cache_folder(repository: str) -> Path:
    """Return the folder of a repository in the Hub's cache. The folder need not exist."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE, "models--" + repository.replace("/", "--"))


def checkpoint_in(snapshot: Path, repository: str) -> Path:
    """Return the checkpoint in the folder of a downloaded repository.

    Args:
        snapshot: folder of the repository's files.
        repository: Hub id of the repository.

    Returns:
        Path of a `.nemo` file, which may be in a subfolder, or `snapshot` if it contains config and weights.

    Raises:
        CheckpointError: if there is no checkpoint, or if there are several `.nemo` files and none of them is named
            after the repository.
    """
    # `is_file`, since a link in the cache may lead to a deleted file.
    found = sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.nemo") if path.is_file())
    if not found and is_unpacked(snapshot):
        return snapshot
    return snapshot / _choose(found, repository, f" in {snapshot}")


def _choose(found: list[str], repository: str, place: str = "") -> str:
    """Choose one of the `.nemo` files `found` in a repository.

    `place` is a text for messages that says where the files are, such as " in FOLDER".

    Raises:
        CheckpointError: if there is no file, or if there are several and none of them is named after the repository.
    """
    # NeMo's `from_pretrained` expects this name.
    usual = repository.partition("/")[2] + ".nemo"
    if not found:
        raise CheckpointError(
            f"{repository}: the repository contains no checkpoint{place}, since it has neither a .nemo file, nor "
            f"{SAFETENSORS_CONFIG} and {SAFETENSORS}; check the name."
        )
    if usual not in found and len(found) != 1:
        raise CheckpointError(
            f"{repository}: the repository contains {len(found)} .nemo files{place} "
            f"({shorten(', '.join(found), 200)}), but one is expected; download one of them and pass its path."
        )
    return usual if usual in found else found[0]


def files_on_hub(repository: str, revision: str | None = None, token: bool | str | None = None) -> list[str]:
    """List the files of a repository on the Hub.

    Call this function before the first download. Without a network, this function fails at once, but the download
    functions of `huggingface_hub` retry for half a minute.

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
    """Return a repository's checkpoint from the Hub's cache, or download it.

    If the Hub cannot be reached, the snapshot in the cache is used even if it may not be from the main branch; see
    `only_snapshot`. With `refresh`, an unreachable Hub is an error.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    if not refresh and (cached := _cached(repository)) is not None:
        return cached
    try:
        names = files_on_hub(repository)
    except Exception as error:  # the Hub client's transport (requests, httpx, ...) depends on its version
        folder = _cache_folder(repository)
        if refresh or _has_answered(error) or not (folder / "snapshots").is_dir():
            raise _not_downloaded(repository, refresh, error) from error
        try:
            return checkpoint_in(main_snapshot(folder) or only_snapshot(folder), repository)
        except CheckpointError as cache_error:
            raise CheckpointError(
                f"{repository}: the Hub cannot be reached ({first_line(error)}), and its local cache cannot be used: "
                f"{cache_error}"
            ) from error
    if repository in LICENSES:
        logger.warning("%s: the license of these weights is %s.", repository, LICENSES[repository])
    found = [file for file in names if file.endswith(".nemo")]
    files = folder_files(names)
    try:
        if not found and files:
            patterns = [*files, SHARDS] if SAFETENSORS_INDEX in files else list(files)
            return Path(snapshot_download(repository, allow_patterns=patterns, force_download=refresh))
        return Path(hf_hub_download(repository, _choose(found, repository), force_download=refresh))
    except CheckpointError:
        raise
    except Exception as error:
        raise _not_downloaded(repository, refresh, error) from error


def _has_answered(error: Exception) -> bool:
    """Return whether an error is an answer of the Hub, such as "no such repository", and not a failure to reach it."""
    from huggingface_hub.errors import HfHubHTTPError

    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(error, HfHubHTTPError) and (status is None or status < 500)


def _not_downloaded(repository: str, refresh: bool, error: Exception) -> CheckpointError:
    missing = "" if refresh else ", and its main branch is not in the local cache"  # a refresh does not use the cache
    return CheckpointError(
        f"{repository}: the repository could not be downloaded from the Hub ({first_line(error)}){missing}; check the "
        "name and the network, or pass the path of a downloaded .nemo file."
    )
