"""Resolve paths that users pass: expand `~`, and find the checkpoint that a path refers to."""

import errno
import logging
import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from nemo_lfr.errors import CheckpointError, NemoLfrError, shorten

logger = logging.getLogger(__name__)

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # such as "s3://"; as a path, it would be a folder with the name "s3:"

# Members of a `.nemo` archive, and files in the folder of an unpacked one.
CONFIG_MEMBER = "model_config.yaml"
WEIGHTS_MEMBER = "model_weights.ckpt"
# Files in a folder that `nemo-lfr export safetensors` wrote.
SAFETENSORS_CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
VARIANT = r"model\.(?!safetensors)[^.]+(-\d+-of-\d+)?\.safetensors"
# If transformers writes the weights to several files (shards), this file lists the shard of each tensor.
SAFETENSORS_INDEX = "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"
VARIANT_SHARDS = "model*-*-of-*.safetensors"  # also matches the shards of a variant, such as "model.fp16-1-of-2..."
PREPROCESSOR = "preprocessor_config.json"  # only transformers reads this file
# Files in a folder that `nemo-lfr export onnx` wrote; the last one describes the others.
ONNX_ENCODER, ONNX_DECODER = "encoder.onnx", "decoder.onnx"
ONNX_MANIFEST = "codec.json"
# Files that are of no use without the other files in their codec's folder.
PART_NAMES = frozenset(
    {
        *(CONFIG_MEMBER, WEIGHTS_MEMBER, SAFETENSORS_CONFIG, SAFETENSORS, SAFETENSORS_INDEX, PREPROCESSOR),
        *(ONNX_ENCODER, ONNX_DECODER, ONNX_MANIFEST),
    }
)
# A folder is a checkpoint if it contains both files of a pair. The first pair takes precedence.
FOLDERS = (
    (CONFIG_MEMBER, WEIGHTS_MEMBER),
    (SAFETENSORS_CONFIG, SAFETENSORS),
    (SAFETENSORS_CONFIG, SAFETENSORS_INDEX),
)
# Suffixes of files that are not a checkpoint by themselves, but part of a checkpoint folder.
FOLDER_SUFFIXES = frozenset([".onnx", ".safetensors", ".yaml", ".json"])
# Suffixes of model files. A name with such a suffix is taken for a path, not for a repository on the Hub.
MODEL_SUFFIXES = frozenset(
    [".nemo", ".ckpt", ".onnx", ".pt", ".pth", ".bin", ".safetensors", ".tar", ".gz", ".tgz", ".zip", ".yaml", ".json"]
)


def check_path(path: object, error: type[NemoLfrError] = NemoLfrError) -> None:
    """Raise an error if an argument is not a path.

    Args:
        path: argument to check.
        error: class of the exception.

    Raises:
        NemoLfrError: of class `error`, if `path` is neither a str nor a path-like object, or if it contains a NUL
            character. Paths as bytes are refused, too.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise error(f"{shorten(repr(path))} is not a path; pass a str or a pathlib.Path.")
    if "\0" in text:
        raise error(f"{shorten(text, 300)!r} is not a path, since it contains a NUL character.")


def expand_home(path: str | os.PathLike[str], error: type[NemoLfrError] = NemoLfrError) -> Path:
    """Expand `~` and `~user` in a path.

    A name that begins with `~` but is not a home folder is returned unchanged.

    Args:
        path: path to expand.
        error: class of the exception.

    Raises:
        NemoLfrError: of class `error`, if `path` is empty or a URL, or is not a path (see `check_path`).
    """
    check_path(path, error)
    text = os.fspath(path)
    if not text:
        raise error("the path '' is empty; pass . for the current folder.")
    if URL.match(text):
        raise error(f"{shorten(text, 300)}: only local files and folders are read and written; pass a local path.")
    return Path(os.path.expanduser(path))


def resolve(path: str | os.PathLike[str]) -> Path:
    """Return an absolute path without symbolic links. The path need not exist.

    This function raises the same error for a loop of links in all versions of Python, unlike `Path.resolve`.

    Raises:
        OSError: if the links form a loop; the error names `path`.
    """
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path)) from error
    return Path(os.path.realpath(path))


def resolve_folder(path: str | os.PathLike[str]) -> Path:
    """Return an absolute path in which only links to folders are resolved.

    A link to a file is not resolved, because its target may have another suffix, and because relative paths in the
    file refer to the folder of the link.

    Raises:
        OSError: if the links form a loop; the error names `path`.
    """
    resolved = resolve(path)
    return resolved if resolved.is_dir() else resolve(Path(path).parent) / Path(path).name


def looks_local(name: str) -> bool:
    """Return whether a name is a local path rather than a Hub repository.

    The path need not exist. A name is a local path if it has the suffix of a model file, if it begins like a path (for
    instance with `.`, `/` or `~`), if it contains a backslash, or if its first folder exists.
    """
    path = os.path.expanduser(name)
    if path.startswith((".", "~", "/", "\\")) or os.path.isabs(path) or "\\" in path:
        return True
    if os.path.splitext(path)[1].lower() in MODEL_SUFFIXES:
        return True
    first, slash, _ = path.partition("/")
    return bool(slash) and os.path.isdir(first)


def check_model_name(name: str, error: type[NemoLfrError] = NemoLfrError) -> None:
    """Raise an error if the name of a model is a local path that does not exist.

    Args:
        name: name of a Hub repository, or local path.
        error: class of the exception.

    Raises:
        NemoLfrError: of class `error`, if the name is empty, or is a local path that does not exist.
    """
    if not name or (looks_local(name) and not os.path.exists(os.path.expanduser(name))):
        raise error(f"{shorten(name, 300) or repr(name)}: no such file or folder.")


def locate_checkpoint(source: str | os.PathLike[str]) -> Path:
    """Return the checkpoint that a local path refers to, and expand `~`.

    Args:
        source: one of: a `.nemo` or `.ckpt` file; the folder of an unpacked `.nemo`; a folder with `config.json` and
            `model.safetensors`, or with the shards and the index that transformers writes; a folder with one `.nemo`
            file, as `huggingface_hub.snapshot_download` returns; the folder of a repository in the Hub's cache.

    Returns:
        Path of the checkpoint file, or of the folder that contains config and weights.

    Raises:
        CheckpointError: if there is no checkpoint or more than one, or if the path is a pipe, device or socket.
    """
    path = expand_home(source, CheckpointError)
    if os.path.isdir(path):
        return _in_folder(path)
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: no such file.")
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: the path is a link to a missing file; download the file again.")
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: not a regular file; pass a .nemo or .ckpt file.")
    if path.suffix.lower() in FOLDER_SUFFIXES or (
        path.name == WEIGHTS_MEMBER and os.path.exists(path.with_name(CONFIG_MEMBER))
    ):
        raise CheckpointError(f"{path}: this file is only a part of a checkpoint; pass the folder {path.parent}.")
    return path


def folder_files(names: Collection[str]) -> tuple[str, str] | None:
    """Return the names of the config and of the weights in a checkpoint folder; None if one is missing.

    If the weights are in several files, the second name is that of their index.

    Args:
        names: names of the files in the folder.
    """
    return next((pair for pair in FOLDERS if all(name in names for name in pair)), None)


def index_of(shard: Path) -> Path:
    """Return the path of the index for a set of weights files, from the path of one of them.

    For `model.fp16-00001-of-00002.safetensors`, a file of the variant "fp16", the index is
    `model.safetensors.index.fp16.json`.
    """
    variant = shard.name.rpartition("-of-")[0].rpartition("-")[0].removeprefix("model")
    return shard.with_name(SAFETENSORS_INDEX.removesuffix(".json") + variant + ".json")


def is_unpacked(folder: Path) -> bool:
    """Return whether a folder contains a config and weights, such as `config.json` and `model.safetensors`."""
    return any(all(os.path.exists(folder / name) for name in pair) for pair in FOLDERS)


def main_snapshot(folder: Path) -> Path | None:
    """Return the snapshot of the main branch in a folder of the Hub's cache.

    Args:
        folder: folder of a repository, named `models--OWNER--NAME`.

    Returns:
        Folder of the snapshot whose commit is in `refs/main`; None if there is no such snapshot.
    """
    with suppress(OSError, ValueError):
        commit = (folder / "refs" / "main").read_text(encoding="ascii").strip()
        # The text is compared with the names of folders, so that it cannot lead out of the cache.
        return next((path for path in (folder / "snapshots").iterdir() if path.name == commit and path.is_dir()), None)
    return None


def only_snapshot(folder: Path) -> Path:
    """Return the only snapshot in a folder of the Hub's cache, and warn that its branch is unknown.

    Args:
        folder: folder of a repository, named `models--OWNER--NAME`, without a snapshot of the main branch.

    Raises:
        CheckpointError: if there is no snapshot, if there are several, or if the cache has references to other
            branches or tags.
    """
    try:
        snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
        references = [path for path in (folder / "refs").rglob("*") if path.is_file()]
    except OSError as error:
        path = folder / "snapshots"
        raise CheckpointError(f"{path}: the folder cannot be read ({error.strerror}).") from error
    if not snapshots:
        raise CheckpointError(
            f"{folder}: the folder in the Hub's cache has no snapshots; download the repository again."
        )
    if len(snapshots) > 1:
        raise CheckpointError(
            f"{folder}: the folder in the Hub's cache has {len(snapshots)} snapshots, and does not say which one is "
            "current; pass the path of a snapshot, or download the repository again."
        )
    names = sorted(path.relative_to(folder / "refs").as_posix() for path in references)
    if others := [name for name in names if name != "main"]:
        raise CheckpointError(
            f"{folder}: the folder in the Hub's cache has a snapshot, but no reference to the main branch (found: "
            f"{shorten(', '.join(others), 200)}); pass the path {snapshots[0]} to use this snapshot, or download the "
            "repository."
        )
    logger.warning(
        "%s: the Hub's cache does not say which snapshot is the main branch; using the only snapshot, %s.",
        folder,
        snapshots[0],
    )
    return snapshots[0]


def _in_folder(folder: Path) -> Path:
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{folder}: the folder cannot be read ({error.strerror}).") from error
    members = [name for name in (CONFIG_MEMBER, WEIGHTS_MEMBER) if name in names]
    if len(members) == 2:
        return folder
    if (
        "snapshots" in names
        and not members
        and SAFETENSORS not in names
        and not any(name.endswith(".nemo") for name in names)
    ):
        return _in_folder(main_snapshot(folder) or only_snapshot(folder))
    archives = [name for name in names if name.endswith(".nemo") and not os.path.isdir(folder / name)]
    if len(archives) == 1:
        return locate_checkpoint(folder / archives[0])
    if not archives and folder_files(names):
        return folder
    if archives:
        listing = shorten(", ".join(archives), 200)
        raise CheckpointError(
            f"{folder}: the folder contains {len(archives)} .nemo files ({listing}); pass the path of one of them."
        )
    if members:
        missing = WEIGHTS_MEMBER if members[0] == CONFIG_MEMBER else CONFIG_MEMBER
        raise CheckpointError(
            f"{folder}: the folder has {members[0]}, but no {missing}; unpack or download the checkpoint again."
        )
    if weights := next((name for name in (SAFETENSORS, SAFETENSORS_INDEX) if name in names), None):
        raise CheckpointError(
            f"{folder}: the folder has {weights}, but no {SAFETENSORS_CONFIG}; download the checkpoint again."
        )
    if variant := next((name for name in names if re.fullmatch(VARIANT, name)), None):
        raise CheckpointError(
            f"{folder}: the folder has {shorten(variant)}, a variant that only transformers reads; save the model "
            f"without variant=, so that the file is {SAFETENSORS}."
        )
    if any(name.endswith(".onnx") for name in names):
        raise CheckpointError(
            f"{folder}: the folder has ONNX files, but no checkpoint; pass the checkpoint from which they were "
            "exported."
        )
    pairs = ", nor ".join(f"{config} and {weights}" for config, weights in FOLDERS)
    raise CheckpointError(
        f"{folder}: the folder contains no checkpoint, since it has neither a .nemo file, nor {pairs}; pass a .nemo "
        "or .ckpt file, or another folder."
    )
