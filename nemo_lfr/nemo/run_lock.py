"""Lock the folder of a training run, so that a second run in the same folder is refused."""

import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from nemo_lfr.errors import ConfigError, NemoLfrError
from nemo_lfr.io.atomic import make_folder
from nemo_lfr.io.exclusive import exclusive

logger = logging.getLogger(__name__)

# Locks that this process holds, by the real path of the locked folder
_held: dict[str, ExitStack] = {}


def lock_run(folder: Path) -> None:
    """Lock a folder of checkpoints until the process ends or `unlock_runs` is called.

    The folder is created if it does not exist. If this process holds the lock already, the call has no effect.

    Args:
        folder: folder of the checkpoints of a run.

    Raises:
        NemoLfrError: if another process holds the lock, or the path is a file.
    """
    make_folder(folder)
    if (key := os.path.realpath(folder)) not in _held:
        with ExitStack() as stack:
            stack.enter_context(exclusive(folder))
            _held[key] = stack.pop_all()


def unlock_runs() -> None:
    """Release all locks of this process."""
    while _held:
        _held.popitem()[1].close()


class RunLock(Callback):
    """Callback that locks the folders of a run's checkpoints while the run trains.

    Only the process with rank 0 takes the lock. If a resumed run was already complete, the callback warns that nothing
    was trained.
    """

    _has_trained = False

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Lock the folders of the trainer's checkpoint callbacks, except remote ones.

        Raises:
            ConfigError: in all processes, if another run is using one of the folders.
        """
        self._has_trained = False
        problem: str | None = None
        if trainer.is_global_zero:
            folders = [str(getattr(callback, "dirpath", None) or "") for callback in trainer.checkpoint_callbacks]
            try:
                for folder in folders:
                    if folder and "://" not in folder:
                        lock_run(Path(folder))
            except (NemoLfrError, OSError) as error:
                problem = str(error)
        if problem := trainer.strategy.broadcast(problem):
            unlock_runs()
            raise ConfigError(problem)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Record that training starts. Lightning does not call this method if the run was already complete."""
        self._has_trained = True

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Warn if no step was trained, because the run was already complete when it was resumed."""
        if not self._has_trained and trainer.is_global_zero:
            logger.warning(
                "no step was trained, because the run to resume is complete; raise max_epochs to continue training, "
                "or choose another exp_manager.name to start again"
            )

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Release the locks."""
        unlock_runs()

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Release the locks at the end of training."""
        if stage == "fit":
            unlock_runs()
