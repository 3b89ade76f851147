"""Support for copying and pickling the NeMo model."""

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from nemo_lfr.checkpoint.names import plain_key
from nemo_lfr.codec.ambient import building_state
from nemo_lfr.nemo.base import BaseModel
from nemo_lfr.training.components import register_component, registered_components

if TYPE_CHECKING:
    from typing_extensions import Self


# Attributes that are not copied. NeMo wraps each instance's `training_step` in a proxy that cannot be copied or
# pickled.
_NOT_COPIED = ("_codec", "_fabric", "_trainer", "training_step")
_NO_TRAINER = {"_trainer": None, "_fabric": None}
_DATA_LOADERS = ("_train_dl", "_validation_dl", "_test_dl")


class Copies(BaseModel):
    """Mixin with the methods that `copy` and `pickle` call. Copies have no trainer."""

    def __copy__(self) -> "Self":
        """Return a model that shares the weights of this one.

        Modules of the copy can be replaced without changing this model.
        """
        state = {key: dict(value) if isinstance(value, dict) else value for key, value in self._to_copy()}
        other = type(self).__new__(type(self))
        other.__setstate__(state | _NO_TRAINER)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "Self":
        """Return an independent copy. Only the data loaders are shared with this model."""
        other = memo[id(self)] = type(self).__new__(type(self))
        state = {key: value if key in _DATA_LOADERS else copy.deepcopy(value, memo) for key, value in self._to_copy()}
        other.__setstate__(state | _NO_TRAINER)
        return other

    def __reduce__(self) -> Any:
        """Return the config and the weights, so that `pickle` can rebuild the model from them.

        PyTorch cannot pickle a module with weight norm directly.

        Optimizers, the moving average of the weights and attributes of a subclass are not included.
        """
        modes = {plain_key(name): module.training for name, module in self.named_modules()}
        gradients = {plain_key(name): parameter.requires_grad for name, parameter in self.named_parameters()}
        kept = {"_is_random": self._is_random, "_restored_from": self._restored_from}
        has_discriminator = hasattr(self, "discriminator")
        components = registered_components(self.cfg)
        arguments = (type(self), self.cfg, self.state_dict(), modes, gradients, has_discriminator, kept, components)
        return _unpickled, arguments

    def _to_copy(self) -> Iterator[tuple[str, Any]]:
        return ((key, value) for key, value in vars(self).items() if key not in _NOT_COPIED)


def _unpickled(
    cls: type[BaseModel],
    cfg: DictConfig,
    state: dict[str, torch.Tensor],
    modes: dict[str, bool],
    gradients: dict[str, bool],
    has_discriminator: bool,
    attributes: dict[str, Any],
    components: dict[str, type[torch.nn.Module]],
) -> BaseModel:
    """Rebuild a model from the values that `LFRCodecModel.__reduce__` returned.

    The model is on the same device as the weights in `state`.
    """
    for name, component in components.items():
        register_component(component, name=name)
    cls._set_model_restore_state(is_being_restored=True)  # prevents NeMo from opening the training data
    try:
        with building_state(torch.device("cpu")):
            model = cls(cfg=cfg)
    finally:
        cls._set_model_restore_state(is_being_restored=False)
    model.load_state_dict(state, assign=True)
    if not has_discriminator:
        del model.discriminator
    for name, module in model.named_modules():
        module.training = modes.get(name, modes[""])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(gradients.get(name, True))
    for name, value in attributes.items():
        setattr(model, name, value)
    return model
