"""Moving average of the encoder's and decoder's weights during training, if the config sets `ema_decay`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nemo_lfr.nemo.base import BaseModel, logging
from nemo_lfr.training.average import Average, is_finite

# Modules whose weights are averaged, in the order of `_generator`.
PARTS = ("audio_encoder", "audio_decoder")


class WeightAveraging(BaseModel):
    """Mixin that uses averaged weights for validation and stores them in checkpoints.

    `CodecCallback` calls most of these methods.
    """

    @property
    def _generator(self) -> torch.nn.ModuleList:
        return torch.nn.ModuleList([getattr(self, name) for name in PARTS])

    def use_average(self, averaged: bool) -> None:
        """Put the averaged weights into the model, or the trained weights if `averaged` is False.

        Without an average, the weights do not change.
        """
        self.update_average()
        if averaged:
            self._check_average()
        if self._average is not None:
            self._average.use(self._generator, averaged)

    def finish_average(self) -> None:
        """Record checksums of the trained weights at the end of a training, to detect later changes."""
        self.update_average()
        # Only once: if a later validation fails, the weights may have been changed since the training.
        if self._average is not None and not self._average.in_use and not self._average.is_finished:
            self._average.finish(self._generator)

    def _check_average(self) -> None:
        """Drop the average if the weights were changed after the training.

        If the average contains NaN or infinity, but the weights do not, restart it from the weights. While the
        averaged weights are in the model, this method does nothing.
        """
        average = self._average
        if average is None or average.in_use:
            return
        if not average.describes(self._generator):
            self._average = None
            logging.warning(
                "The weights were changed after the training, so their moving average (ema_decay) is not "
                "used. The .ckpt files that the training wrote contain the average."
            )
        elif not is_finite(average.weights) and is_finite(self._generator.parameters()):
            average.restart(self._generator)
            logging.warning(
                "The moving average of the weights (ema_decay) contains NaN or infinity, but the weights are finite "
                "again. The average restarts from the current weights."
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the averaged weights of the encoder and decoder inside a `with` block.

        Without a moving average, the weights do not change. If the weights were changed after the training, the
        moving average is dropped with a warning.
        """
        before = self._average is not None and self._average.in_use
        self.use_average(True)
        try:
            yield
        finally:
            self.use_average(before)

    def use_trained_weights(self) -> None:
        """Put the trained weights into the model. A failed validation may have left the averaged ones there.

        The average is dropped with a warning if the weights were changed after the training.
        """
        self.use_average(False)
        self._check_average()

    def start_average(self) -> None:
        """Start or resume the moving average."""
        self._average = self._average or Average(self._generator, float(self.cfg.ema_decay))

    def follow_optimizers(self) -> None:
        """Register a hook on new optimizers, so that `update_average` knows whether one of them took a step.

        The average is not updated in `training_step`, because a subclass may replace that method. A script may replace
        the optimizers during training, so this method is called before each batch.
        """
        if self._average is None:
            return
        averaged = {id(parameter) for parameter in self._generator.parameters()}
        for optimizer in self.trainer.optimizers:
            is_new = self._note_step not in optimizer._optimizer_step_post_hooks.values()
            weights = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            if is_new and not averaged.isdisjoint(weights):
                optimizer.register_step_post_hook(self._note_step)

    def _note_step(self, *_: Any) -> None:
        if self._average is not None:
            self._average.is_due = True

    def update_average(self) -> None:
        """Update the average if the encoder or decoder was trained since the last update.

        Steps of several optimizers cause only one update. Without an average, this method does nothing.
        """
        if self._average is not None and self._average.is_due and not self._average.in_use:
            self._average.update(self._generator)

    def on_validation_epoch_end(self, *args: Any, **kwargs: Any) -> Any:
        """Switch back to the trained weights after validation."""
        # Not in `on_validation_end`, where callbacks write checkpoints before the model's hook runs.
        result = super().on_validation_epoch_end(*args, **kwargs)
        self.use_average(False)
        return result

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the average to a checkpoint; see `store_average`.

        `CodecCallback` does not suffice: Lightning calls no callback when it saves a checkpoint with only weights.
        """
        super().on_save_checkpoint(checkpoint)
        self.store_average(checkpoint)

    def store_average(self, checkpoint: dict[str, Any]) -> None:
        """Put the averaged weights into the state dict of a checkpoint, and the trained weights into another entry.

        Only a resumed run reads the trained weights. Inference and fine-tuning use the averaged weights, with which
        `val_loss` was measured.
        """
        self.update_average()
        self._check_average()
        if self._average is None or "average" in checkpoint:
            return
        state, names = checkpoint["state_dict"], self._averaged_names()
        stored, others = [state[name] for name in names], self._average.weights
        averaged, trained = (stored, others) if self._average.in_use else (others, stored)
        state.update(zip(names, averaged, strict=True))
        checkpoint["average"] = {"count": self._average.count, "trained": dict(zip(names, trained, strict=True))}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop the average: it belongs to weights that the checkpoint replaces."""
        super().on_load_checkpoint(checkpoint)
        self._average = None

    def resume_average(self, checkpoint: dict[str, Any]) -> None:
        """Restore the trained weights and their moving average from the checkpoint of a run to resume."""
        self._average = None
        if "average" not in checkpoint:
            return
        state, average = checkpoint["state_dict"], checkpoint["average"]
        if "trained" in average:
            weights = [state[name] for name in average["trained"]]
            self.load_state_dict(average["trained"], strict=False)
        else:  # written by a development version, with the trained weights in the state dict
            weights = list(average["weights"])
        if self.cfg.get("ema_decay"):
            self._average = Average(self._generator, float(self.cfg.ema_decay))
            self._average.count, self._average.weights = average["count"], weights

    def _averaged_names(self) -> list[str]:
        return [f"{PARTS[int(name[0])]}{name[1:]}" for name, _ in self._generator.named_parameters()]
