"""Mean of training metrics over the processes of a distributed run."""

from typing import Any

import torch

from nemo_lfr.nemo.base import Trainer


def mean_over_processes(metrics: dict[str, Any], trainer: Trainer, device: torch.device) -> dict[str, Any]:
    """Return the mean of each metric over all processes, as NeMo logs it.

    Args:
        metrics: numbers and tensors with one element, by name. All processes must have the same names.
        trainer: Lightning trainer of the run.
        device: device of the model, for the communication.

    Returns:
        Scalar fp32 tensors by name; `metrics` itself if there is only one process.
    """
    if trainer.world_size == 1:
        return metrics
    values = [torch.as_tensor(value, dtype=torch.float32, device=device).reshape(()) for value in metrics.values()]
    means = trainer.strategy.reduce(torch.stack(values), reduce_op="mean")
    return dict(zip(metrics, means, strict=True))
