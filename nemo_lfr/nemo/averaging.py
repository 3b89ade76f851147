"""Moving average of the NeMo model's weights, if the config sets `ema_decay`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nemo_lfr.nemo.base import BaseModel
from nemo_lfr.training.average import Average


class WeightAveraging(BaseModel):
    """Mixin of Lightning hooks that validate and save the averaged weights."""

    @property
    def _generator(self) -> torch.nn.ModuleList:
        return torch.nn.ModuleList([self.audio_encoder, self.audio_decoder])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the averaged weights of the encoder and decoder within this context.

        The context has no effect if the model keeps no average.
        """
        if self._average is None:
            yield
            return
        self._average.swap(self._generator)
        try:
            yield
        finally:
            self._average.swap(self._generator)

    def on_validation_start(self) -> None:
        """Switch to the averaged weights for validation."""
        super().on_validation_start()
        if self._average is not None:
            self._average.swap(self._generator)

    def on_validation_epoch_end(self, *args: Any, **kwargs: Any) -> Any:
        """Switch back to the trained weights."""
        # Not in `on_validation_end`: callbacks write checkpoints there before the model's hook runs.
        result = super().on_validation_epoch_end(*args, **kwargs)
        if self._average is not None:
            self._average.swap(self._generator)
        return result

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the moving average of the weights to a checkpoint."""
        super().on_save_checkpoint(checkpoint)
        if self._average is not None:
            checkpoint["average"] = {"count": self._average.count, "weights": self._average.weights}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the moving average of the weights from a checkpoint."""
        super().on_load_checkpoint(checkpoint)
        if "average" in checkpoint and self.cfg.get("ema_decay"):
            self._average = Average(self._generator, float(self.cfg.ema_decay))
            self._average.count = checkpoint["average"]["count"]
            self._average.weights = list(checkpoint["average"]["weights"])
