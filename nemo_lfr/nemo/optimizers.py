"""Build the optimizers of a model, load initial weights, and check that a run to resume fits the config."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from omegaconf import DictConfig, open_dict

from nemo_lfr.checkpoint.names import plain_keys
from nemo_lfr.errors import CheckpointError, ConfigError, shorten
from nemo_lfr.nemo.averaging import WeightAveraging
from nemo_lfr.nemo.base import DISCRIMINATOR, WAVLM, NeMoAudioCodecModel
from nemo_lfr.nemo.patches import patched_method
from nemo_lfr.nemo.training_checkpoint import weights_without_config


def check_discriminator(checkpoint: Mapping[str, Any], state: Mapping[str, torch.Tensor], path: Any) -> None:
    """Check that a checkpoint contains exactly the discriminator weights that a model has.

    Args:
        checkpoint: content of the checkpoint.
        state: state dict of the model.
        path: path of the checkpoint, for error messages.

    Raises:
        ConfigError: if the discriminators in the checkpoint differ from those of the model.
    """
    ours = {key: list(value.shape) for key, value in state.items() if key.startswith(DISCRIMINATOR)}
    saved = plain_keys(checkpoint.get("state_dict", {}).items(), "the state dict")
    theirs = {key: list(value.shape) for key, value in saved.items() if key.startswith(DISCRIMINATOR)}
    theirs = {key: shape for key, shape in theirs.items() if WAVLM not in key}
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            found, wanted = (
                f"has the shape {shapes[key]}" if key in shapes else "is missing" for shapes in (theirs, ours)
            )
            raise _differs(path, "discriminator", f"{key} {found} in the checkpoint, but {wanted} in the model")


def check_optimizers(checkpoint: Mapping[str, Any], optimizers: Sequence[torch.optim.Optimizer], path: Any) -> None:
    """Check that the state of the optimizers in a checkpoint fits the optimizers of the model.

    Args:
        checkpoint: content of the checkpoint.
        optimizers: optimizers of the model.
        path: path of the checkpoint, for error messages.

    Raises:
        ConfigError: if the optimizers in the checkpoint differ from those of the model.
    """
    states = checkpoint.get("optimizer_states", [])
    if len(states) != len(optimizers):
        raise _differs(path, "optim", f"the checkpoint has {len(states)} optimizers instead of {len(optimizers)}")
    for state, optimizer in zip(states, optimizers, strict=True):
        theirs, ours = state["param_groups"], optimizer.param_groups
        sizes = [[len(group["params"]) for group in groups] for groups in (theirs, ours)]
        if sizes[0] != sizes[1]:
            raise _differs(
                path,
                "optim",
                f"the parameter groups of an optimizer in the checkpoint have {sizes[0]} weight tensors instead of "
                f"{sizes[1]}",
            )
        missing = sorted(set(optimizer.defaults) - {"fused", "foreach"} - set(theirs[0]))
        unknown = sorted(set(theirs[0]) - set(optimizer.defaults) - {"params", "initial_lr"})
        # Other versions of PyTorch may have more or fewer settings, and scripts may add keys such as "name".
        if missing and unknown:
            raise _differs(
                path,
                "optim",
                f"the optimizer in the checkpoint is not {type(optimizer).__name__}: its settings lack {missing} and "
                f"also contain {unknown}",
            )


def _differs(path: Any, section: str, what: str) -> ConfigError:
    return ConfigError(
        f"{path}: this run cannot be resumed, because the section {section} of the config does not match the "
        f"checkpoint: {what}. Restore this section. Or train in another folder (exp_manager.name), and add "
        "init_from_ptl_ckpt to start from the weights of this checkpoint."
    )


class Optimizers(WeightAveraging):
    """Mixin with the hooks that build the optimizers, load initial weights and resume a run."""

    @property
    def _batches_per_update(self) -> int:
        return int(self.cfg.get("accumulate_grad_batches") or 1)

    @property
    def max_steps(self) -> int:
        """Number of steps in the learning-rate schedule.

        With `steps_per_epoch: null`, an epoch is one pass over the data.

        Raises:
            ConfigError: if the number of steps is 0, or cannot be computed from the config and the training data.
        """
        config = self._cfg
        if patched_method(NeMoAudioCodecModel, ("max_steps",)) is not None:
            patched: int = super().max_steps
            return patched
        if config.get("max_steps") is None and config.get("max_epochs") is None:
            raise ConfigError(
                "neither max_steps nor max_epochs is set, but the learning-rate schedule needs one of them; set "
                "max_epochs, for instance."
            )
        if config.get("max_steps") is None and config.get("max_epochs") == 0:
            raise ConfigError("max_epochs is 0, so the learning-rate schedule has no step; pass 1 or more.")
        if config.get("max_steps") is not None or not config.get("max_epochs"):
            steps: int = super().max_steps
            return steps
        batches = config.get("steps_per_epoch")
        if batches is None:
            if self._train_dl is None:
                raise ConfigError(
                    "steps_per_epoch must be set, because the config has no train_ds, whose length would give the "
                    "number of steps."
                )
            try:
                batches = len(self._train_dl)
            except TypeError as error:
                raise ConfigError(
                    "steps_per_epoch must be set, because training data from Lhotse has no end and thus no epochs."
                ) from error
        return int(config.max_epochs) * -(-int(batches) // self._batches_per_update)

    def configure_optimizers(self) -> Any:
        """Return NeMo's optimizers and schedules, with fused Adam on a CPU.

        Adam is not changed if the config sets `fused`, or sets `foreach` to true.

        Raises:
            ConfigError: if the config has no optimizer, or if an optimizer or schedule cannot be built.
        """
        if not self.cfg.get("optim"):
            raise ConfigError(
                "the model config has no section optim, so there is no optimizer for training; add it before fit, for "
                "example model.cfg.optim = {'_target_': 'torch.optim.Adam', 'lr': 2e-4}."
            )
        try:
            configured = super().configure_optimizers()
        except ConfigError:
            raise
        except Exception as error:  # values of any type reach the constructors
            reason = shorten(" ".join(str(error).split()), 300)
            raise ConfigError(f"optim: the optimizer or its schedule cannot be built: {reason}") from error
        # NeMo returns one optimizer, several optimizers, or a list of optimizers and a list of schedules.
        several = configured if isinstance(configured, list | tuple) else [configured]
        optimizers = several[0] if isinstance(several[0], list) else several
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.Adam) and self.device.type == "cpu":
                for group in optimizer.param_groups:
                    if group["fused"] is None and not group["foreach"]:
                        group["fused"] = True
        return configured

    def check_resumed(self) -> None:
        """Check that the checkpoint to resume from contains states of the trainer's optimizers.

        Raises:
            ConfigError: if the optimizers in the checkpoint differ from those of the trainer.
        """
        checkpoint, self._resumed = self._resumed, None
        if checkpoint is not None and "optimizer_states" in checkpoint:  # otherwise, Lightning raises an error
            check_optimizers(checkpoint, self.trainer.optimizers, self.trainer.ckpt_path)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint of a run to resume has the discriminators of the config.

        Raises:
            ConfigError: if the discriminators in the checkpoint differ from those of the config.
        """
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            check_discriminator(checkpoint, self.state_dict(), self.trainer.ckpt_path)
            self._resumed = checkpoint  # for `check_resumed`

    def maybe_init_from_pretrained_checkpoint(self, cfg: DictConfig, map_location: str = "cpu") -> None:
        """Load initial weights as configured by NeMo's `init_from_*` keys.

        Unlike NeMo's method, this method can read a codec's training checkpoint from `init_from_ptl_ckpt`.

        Args:
            cfg: config with the `init_from_*` keys.
            map_location: device to load the weights to.

        Raises:
            ConfigError: if `init_from_ptl_ckpt` and `init_from_nemo_model` are both set.
            CheckpointError: if a file cannot be read or belongs to another codec. Also if
                `init_from_ptl_ckpt` is a section that lists files, and a file contains objects other than tensors.
        """
        path = cfg.get("init_from_ptl_ckpt")
        if isinstance(path, str):
            if cfg.get("init_from_nemo_model"):
                raise ConfigError("init_from_ptl_ckpt and init_from_nemo_model are both set; remove one of them.")
            with open_dict(cfg):
                del cfg.init_from_ptl_ckpt
            if (weights := weights_without_config(Path(path))) is not None:
                try:
                    self.load_state_dict(weights, strict=False)
                except CheckpointError as error:
                    raise CheckpointError(f"{path}: {error}") from error
                return
            with open_dict(cfg):
                cfg.init_from_nemo_model = path
        if isinstance(path := cfg.get("init_from_nemo_model"), str):
            self._restored_from = Path(path)  # set in every process, although NeMo reads the file on rank 0 only
        sections = cfg.get("init_from_ptl_ckpt")
        try:
            super().maybe_init_from_pretrained_checkpoint(cfg, map_location)
        except pickle.UnpicklingError as error:  # NeMo reads the files of a section with weights_only=True
            if not isinstance(sections, Mapping | DictConfig):
                raise
            paths = ", ".join(str(section.get("path")) for section in sections.values())
            raise CheckpointError(
                f"init_from_ptl_ckpt: a file of this section ({paths}) is damaged, or contains objects other than "
                "tensors; save {'state_dict': ...} alone, or pass one path (init_from_ptl_ckpt=PATH)."
            ) from error
