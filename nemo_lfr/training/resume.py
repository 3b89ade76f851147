"""Checkpoints of a training run that is killed: put in place whole, and tidied before NeMo looks for the last one."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from nemo_lfr.atomic import PART, naming, open_aside, sweep

logger = logging.getLogger(__name__)

# NeMo puts a file NAME-unfinished beside the checkpoint that it is about to write or remove.
MARKER = "-unfinished"
LAST = "last.ckpt"


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
        with naming(target), open_aside(target) as file:
            try:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, target)
            finally:
                Path(file.name).unlink(missing_ok=True)


def tidy_checkpoints(experiment: str | os.PathLike[str]) -> None:
    """Remove unfinished checkpoints, so that NeMo's `exp_manager` resumes from the last whole one.

    Call it before `exp_manager`, in one process. NeMo refuses to go on where the last checkpoint is unfinished, though
    an older one is whole; if no whole one is the last, the newest other one becomes it.

    Args:
        experiment: folder of the run, such as EXP_DIR/NAME; nothing happens if it is not there.
    """
    for folder in sorted(Path(experiment).rglob("checkpoints")):
        sweep(folder, [match["name"] for path in folder.glob("*.part") if (match := PART.fullmatch(path.name))])
        unfinished = False
        for marker in sorted(folder.glob(f"*{MARKER}")):
            unfinished = True
            stem = marker.name.removesuffix(MARKER)
            for path in folder.glob("*.ckpt"):
                if path.name.removesuffix(".ckpt").removesuffix("-EMA") == stem:
                    logger.warning("%s: unfinished when its run was killed; removed", path)
                    path.unlink()
            marker.unlink()
        if unfinished:
            _keep_a_last(folder)


def _keep_a_last(folder: Path) -> None:
    """Leave exactly one last checkpoint, the newest whole one."""
    whole = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    last = [path for path in whole if path.name.endswith(LAST)]
    for older in last[:-1]:
        logger.warning("%s: older than %s; removed", older, last[-1].name)
        older.unlink()
    if whole and not last:
        newest = whole[-1]
        shutil.copyfile(newest, aside := folder / f"{newest.stem}.part")
        os.replace(aside, folder / f"{newest.stem}-{LAST}")
        logger.warning("%s: the newest whole checkpoint; training resumes from it", newest)
