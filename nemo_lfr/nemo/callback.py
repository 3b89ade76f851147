"""Lightning callback that prepares the training of the codec and switches to the averaged weights."""

from typing import Any

from lightning.pytorch import Callback, Trainer

from nemo_lfr.nemo.averaging import WeightAveraging


class CodecCallback(Callback):
    """Callback that prepares the training of an `LFRCodecModel`, and switches between trained and averaged weights.

    Hooks of the model cannot do this reliably, because subclasses override them without calling `super()`. Lightning
    runs this callback before the callbacks that save checkpoints.
    """

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Prepare the model; see `TrainingSteps.prepare`."""
        if isinstance(pl_module, WeightAveraging):
            pl_module.prepare(stage)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Check the trainer; see `TrainingSteps.begin_fit`."""
        if isinstance(pl_module, WeightAveraging):
            pl_module.begin_fit()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Prepare the weights; see `TrainingSteps.begin_training`."""
        if isinstance(pl_module, WeightAveraging):
            pl_module.begin_training()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Make optimizer steps update the average; see `WeightAveraging.follow_optimizers`."""
        if isinstance(pl_module, WeightAveraging):
            pl_module.follow_optimizers()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the average if an optimizer took a step."""
        if isinstance(pl_module, WeightAveraging):
            pl_module.update_average()

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Switch to the averaged weights for validation."""
        if isinstance(pl_module, WeightAveraging):
            pl_module.use_average(True)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Switch back to the trained weights if the model's `on_validation_epoch_end` did not."""
        if isinstance(pl_module, WeightAveraging):
            pl_module.use_average(False)

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Switch to the averaged weights."""
        self.on_validation_start(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Switch back to the trained weights."""
        self.on_validation_end(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Switch to the averaged weights, which saved files contain too."""
        self.on_validation_start(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Switch back to the trained weights."""
        self.on_validation_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Switch back to the trained weights, and record their checksums."""
        if isinstance(pl_module, WeightAveraging):
            pl_module.use_average(False)
            pl_module.finish_average()

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Record checksums of the trained weights, to detect later changes."""
        # Lightning calls `on_train_end` only if the run was not already complete.
        if isinstance(pl_module, WeightAveraging):
            pl_module.finish_average()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Store the averaged weights; see `WeightAveraging.store_average`."""
        if isinstance(pl_module, WeightAveraging):
            pl_module.store_average(checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore the trained weights and their average; see `WeightAveraging.resume_average`."""
        if isinstance(pl_module, WeightAveraging):
            pl_module.resume_average(checkpoint)


class FirstCallback(Callback):
    """Callback that runs before those of the user, and records checksums of the trained weights.

    A user's callback may load other weights at the end of the training, for example the best ones.
    """

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Record checksums of the trained weights; see `WeightAveraging.finish_average`."""
        if isinstance(pl_module, WeightAveraging):
            pl_module.finish_average()
