"""Checkpoints of a training run that is killed: put in place whole, and tidied before NeMo looks for the last one."""

import logging
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from nemo_lfr.io.atomic import replacing, sweep
from nemo_lfr.io.tensor_file import save_tensors

logger = logging.getLogger(__name__)

# NeMo puts a file NAME-unfinished beside the checkpoint that it is about to write or remove.
MARKER = "-unfinished"
LAST = "last.ckpt"
# NeMo saves averaged weights beside a checkpoint, under its name with this end.
AVERAGE = "-EMA"


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, written aside in their own folder and renamed.

    Lightning writes to the folder for temporary files and moves the result, which across file systems is a copy: a run
    that is killed during it, or a full disk, would leave half a checkpoint under its final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; paths of remote storage are left to Lightning."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(target, checkpoint)


def tidy_checkpoints(experiment: str | os.PathLike[str]) -> None:
    """Remove unfinished checkpoints, so that NeMo's `exp_manager` resumes from the last whole one.

    Call it before `exp_manager`, in one process. NeMo refuses to go on where the last checkpoint is unfinished, though
    an older one is whole; if no whole one is the last, the newest other one becomes it.

    Args:
        experiment: folder of the run, such as EXP_DIR/NAME; nothing happens if it is not there.
    """
    for folder in sorted(Path(experiment).rglob("checkpoints")):
        _tidy(folder)


def tidy_experiment(settings: Mapping[str, Any] | None) -> None:
    """Tidy the checkpoints of the run that `exp_manager` is about to resume.

    A script of your own calls it before `exp_manager`, on rank 0. No hook of the model can, since `exp_manager` looks
    for the last checkpoint before the model exists. Without it, NeMo asks for a checkpoint to be removed by hand after
    a kill between putting the only last one in place and removing its mark.

    Args:
        settings: what `exp_manager` is given, such as `cfg.exp_manager`; nothing happens unless it is to resume.
    """
    if not settings or not settings.get("resume_if_exists"):
        return
    folder = (settings.get("checkpoint_callback_params") or {}).get("dirpath")
    if folder:
        if "://" not in str(folder):
            _tidy(Path(folder))
        return
    run = settings.get("explicit_log_dir")
    if not run:
        run = Path(settings.get("exp_dir") or "nemo_experiments", settings.get("name") or "default")
        run /= str(settings.get("version") or "")
    _tidy(Path(run, "checkpoints"))


def _tidy(folder: Path) -> None:
    sweep(folder, None)
    # Of a folder, as distributed checkpoints are, NeMo's own mark stays.
    markers = [path for path in folder.glob(f"*{MARKER}") if not Path(str(path).removesuffix(MARKER)).is_dir()]
    if not markers:
        return
    stems = {marker.name.removesuffix(MARKER) for marker in markers}
    files = sorted(filter(Path.is_file, folder.glob("*.ckpt")), key=lambda path: path.stat().st_mtime_ns)
    averages = {path for path in files if path.stem.endswith(AVERAGE)}
    marked = {path for path in files if path.stem.removesuffix(AVERAGE) in stems}
    # A marked one is whole if the run was killed just after it was put in place, or before it was removed. With
    # averaged weights it is one of two files, of which the other may be missing.
    damaged = {path for path in marked if averages or not _is_whole(path)}
    whole = [path for path in files if path not in averages | damaged]
    kept = None
    if whole:
        kept = next((path for path in reversed(whole) if path.name.endswith(LAST)), None)
        if kept is None:
            kept = whole[-1].with_name(f"{whole[-1].stem}-{LAST}")
            _copy(whole[-1], kept)
            if _average_of(whole[-1]) in averages:
                _copy(_average_of(whole[-1]), _average_of(kept))
            logger.warning("%s: the newest whole checkpoint; training resumes from it", whole[-1])
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
    """Whether a file has its end: that of the archive which `torch.save` makes."""
    try:
        with zipfile.ZipFile(path):
            return True
    except (OSError, zipfile.BadZipFile):
        return False


def _copy(path: Path, target: Path) -> None:
    """Copy a file, which appears whole."""
    with replacing(target) as file, open(path, "rb") as source:
        shutil.copyfileobj(source, file)
