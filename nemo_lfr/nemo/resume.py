"""Write training checkpoints atomically, and remove unfinished checkpoints before a run is resumed."""

import logging
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from nemo_lfr.errors import ConfigError
from nemo_lfr.io.atomic import replacing, sweep
from nemo_lfr.io.tensor_file import save_tensors
from nemo_lfr.nemo.run_lock import lock_run

logger = logging.getLogger(__name__)

# While NeMo writes or removes the checkpoint NAME, there is a marker file NAME-unfinished next to the checkpoint.
MARKER = "-unfinished"
LAST = "last.ckpt"
# NeMo's EMA callback saves averaged weights next to a checkpoint, under the checkpoint's name with this suffix.
AVERAGE = "-EMA"


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning checkpoint plugin that writes files atomically.

    Lightning's own plugin moves the file from the system's folder for temporary files. Between file systems, this is a
    copy, so a killed run or a full disk would leave a truncated checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint atomically.

        Args:
            checkpoint: content of the checkpoint.
            path: target file. Remote paths, which contain `://`, are passed on to Lightning.
            storage_options: passed on to Lightning, which writes the file if this is set.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(target, checkpoint)


def tidy_checkpoints(experiment: str | os.PathLike[str]) -> None:
    """Remove unfinished checkpoints so that `exp_manager` can resume the run.

    Call this function before `exp_manager`, in one process only.

    NeMo resumes from the file named `*last.ckpt`. If there is an unfinished checkpoint, this function also removes
    every `*last.ckpt` file except the newest intact one. If no `*last.ckpt` file is intact, the newest intact
    checkpoint is copied to a new `*last.ckpt` file.

    Args:
        experiment: folder of the run, such as EXP_DIR/NAME. A missing folder is ignored.
    """
    for folder in sorted(Path(experiment).rglob("checkpoints")):
        _tidy(folder)


def tidy_experiment(settings: Mapping[str, Any] | None) -> None:
    """Remove unfinished checkpoints of the run that `exp_manager` will resume.

    Call this function in your training script before `exp_manager`, on rank 0 only. Without it, a run that is killed
    while it writes a checkpoint may leave a file that you must delete by hand before NeMo resumes.

    The function also locks the folder of the checkpoints until training or the process ends. The folder is created if
    it does not exist.

    Args:
        settings: settings of `exp_manager`, such as `cfg.exp_manager`. The function does nothing if
            `resume_if_exists` is not set, or if the folder of the checkpoints is a URL.

    Raises:
        ConfigError: if the checkpoint that NeMo would resume from is damaged, or if several files are named
            `*last.ckpt`.
        NemoLfrError: if another run is using the folder of the checkpoints, or the path of this folder is a file.
    """
    if not settings or not settings.get("resume_if_exists"):
        return
    folder = (settings.get("checkpoint_callback_params") or {}).get("dirpath")
    if not folder:
        run = settings.get("explicit_log_dir")
        if not run:
            run = Path(settings.get("exp_dir") or "nemo_experiments", settings.get("name") or "default")
            run /= str(settings.get("version") or "")
        folder = Path(run, "checkpoints")
    if "://" in str(folder):
        return
    lock_run(Path(folder))
    _tidy(Path(folder))
    _check_last(Path(folder))


def _check_last(folder: Path) -> None:
    """Raise an error if NeMo cannot resume from the last checkpoint. Distributed checkpoints are not checked."""
    last = sorted(path for path in folder.glob(f"*{LAST}") if not path.is_dir())
    if len(last) > 1:
        names = ", ".join(path.name for path in last)
        raise ConfigError(
            f"{folder}: the names of {len(last)} checkpoints end in {LAST} ({names}); "
            "keep the one to resume from, and move the others to another folder."
        )
    if not last or _is_whole(last[0]):
        return
    intact = [path for path in folder.glob("*.ckpt") if not path.stem.endswith(AVERAGE) and _is_whole(path)]
    newest = max(intact, key=lambda path: path.stat().st_mtime_ns, default=None)
    advice = "remove it to start again" if newest is None else (
        f"remove it, and rename {newest.name} to {newest.stem}-{LAST} to resume from there"
    )  # fmt: skip
    raise ConfigError(
        f"{last[0]}: this checkpoint is damaged, or a link to a missing file, so the run cannot be resumed; {advice}."
    )


def _tidy(folder: Path) -> None:
    sweep(folder, None)
    # Distributed checkpoints are folders; NeMo manages their markers itself.
    markers = [path for path in folder.glob(f"*{MARKER}") if not Path(str(path).removesuffix(MARKER)).is_dir()]
    if not markers:
        return
    stems = {marker.name.removesuffix(MARKER) for marker in markers}
    files = sorted(filter(Path.is_file, folder.glob("*.ckpt")), key=lambda path: path.stat().st_mtime_ns)
    averages = {path for path in files if path.stem.endswith(AVERAGE)}
    marked = {path for path in files if path.stem.removesuffix(AVERAGE) in stems}
    # A marked file may be intact: the run may have been killed just after the checkpoint was renamed, or just before
    # it was removed. With NeMo's EMA callback, a checkpoint consists of two files, one of which may be missing. In
    # this case every marked file is treated as damaged.
    damaged = {path for path in marked if averages or not _is_whole(path)}
    whole = [path for path in files if path not in averages | damaged]
    kept = None
    if whole:
        kept = next((path for path in reversed(whole) if path.name.endswith(LAST)), None)
        if kept is None:
            kept = whole[-1].with_name(f"{whole[-1].stem}-{LAST}")
            _copy_as_last(whole[-1], kept)
            if _average_of(whole[-1]) in averages:
                _copy(_average_of(whole[-1]), _average_of(kept))
            logger.warning("%s: training resumes from this checkpoint, the newest complete one", whole[-1])
    older = [path for path in whole if path.name.endswith(LAST)]
    for path in {*marked, *older, *(averages & set(map(_average_of, older)))}:
        if path != kept and (kept is None or path != _average_of(kept)):
            why = "unfinished when its run was killed" if path in damaged else "training resumes from a newer one"
            logger.warning("%s: removed: %s", path, why)
            path.unlink()
    for marker in markers:
        marker.unlink()


def _average_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}{AVERAGE}{path.suffix}")


def _is_whole(path: Path) -> bool:
    """Return whether a file ends with the zip directory that `torch.save` writes last."""
    try:
        with zipfile.ZipFile(path):
            return True
    except (OSError, zipfile.BadZipFile):
        return False


def _copy_as_last(path: Path, target: Path) -> None:
    """Copy a checkpoint, and record in the copy that it is the last one of its run.

    Without this record, Lightning would keep the copy when it writes the next last checkpoint. Two files would then be
    named `*last.ckpt`.
    """
    try:  # with the same trust as Lightning, which loads this file next
        checkpoint = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    except Exception:  # Lightning will report this error, and may raise anything
        _copy(path, target)
        return
    callbacks = checkpoint.get("callbacks") if isinstance(checkpoint, dict) else None
    for state in (callbacks or {}).values():
        if isinstance(state, dict) and state.get("dirpath"):
            state["last_model_path"] = os.path.join(state["dirpath"], target.name)
    save_tensors(target, checkpoint)


def _copy(path: Path, target: Path) -> None:
    """Copy a file atomically."""
    with replacing(target) as file, open(path, "rb") as source:
        shutil.copyfileobj(source, file)
