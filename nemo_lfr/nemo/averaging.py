"""Moving average of the encoder's and decoder's weights during training, if the config sets `ema_decay`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback

from nemo_lfr.nemo.base import BaseModel, Trainer
from nemo_lfr.training.average import Average

# Modules whose weights are averaged, in the order of `_generator`.
PARTS = ("audio_encoder", "audio_decoder")


class RestoreTrainedWeights(Callback):
    """Callback that restores the trained weights if validation, which uses averaged weights, raises an exception.

    Lightning runs this callback before the callbacks that save a checkpoint of the failed run.
    """

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Switch back to the trained weights."""
        pl_module._use_average(False)


class WeightAveraging(BaseModel):
    """Mixin with Lightning hooks that use averaged weights for validation and store them in checkpoints."""

    @property
    def _generator(self) -> torch.nn.ModuleList:
        return torch.nn.ModuleList([getattr(self, name) for name in PARTS])

    def _use_average(self, averaged: bool) -> None:
        if self._average is not None:
            self._average.use(self._generator, averaged)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the averaged weights of the encoder and decoder inside a `with` block.

        Without a moving average, the weights do not change.
        """
        before = self._average is not None and self._average.in_use
        self._use_average(True)
        try:
            yield
        finally:
            self._use_average(before)

    def on_train_start(self) -> None:
        """Switch to the trained weights, because a failed validation may have left the averaged ones in use."""
        self._use_average(False)
        super().on_train_start()

    def on_validation_start(self) -> None:
        """Switch to the averaged weights for validation."""
        super().on_validation_start()
        self._use_average(True)

    def on_validation_epoch_end(self, *args: Any, **kwargs: Any) -> Any:
        """Switch back to the trained weights after validation."""
        # Not in `on_validation_end`, where callbacks write checkpoints before the model's hook runs.
        result = super().on_validation_epoch_end(*args, **kwargs)
        self._use_average(False)
        return result

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the moving average of the weights to a checkpoint.

        A checkpoint may be saved during validation, for example after a signal from Slurm. The model then holds the
        averaged weights, but the state dict in the checkpoint still gets the trained weights.
        """
        super().on_save_checkpoint(checkpoint)
        if self._average is None:
            return
        weights = self._average.weights
        if self._average.in_use:
            state, trained = checkpoint["state_dict"], weights
            names = [f"{PARTS[int(name[0])]}{name[1:]}" for name, _ in self._generator.named_parameters()]
            weights = [state[name] for name in names]
            state.update(zip(names, trained, strict=True))
        checkpoint["average"] = {"count": self._average.count, "weights": weights}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the moving average of the weights from a checkpoint."""
        super().on_load_checkpoint(checkpoint)
        if "average" in checkpoint and self.cfg.get("ema_decay"):
            self._average = Average(self._generator, float(self.cfg.ema_decay))
            self._average.count = checkpoint["average"]["count"]
            self._average.weights = list(checkpoint["average"]["weights"])
