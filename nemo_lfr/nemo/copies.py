"""Support for copying and pickling the NeMo model."""

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from omegaconf import DictConfig

from nemo_lfr.checkpoint import build_parts
from nemo_lfr.checkpoint.rebuilt import flags_of, restore_flags, restore_settings, settings_to_pickle
from nemo_lfr.codec.ambient import building_state
from nemo_lfr.modules.empty import on_meta_device
from nemo_lfr.nemo.base import PROXIES, BaseModel, logging
from nemo_lfr.nemo.config import checked_values
from nemo_lfr.nemo.files import READ_PARTS
from nemo_lfr.nemo.state_dicts import CONFIGURED
from nemo_lfr.training.components import register_component, registered_components

if TYPE_CHECKING:
    from typing_extensions import Self


# Attributes that are not copied. `Module.compile` sets `_compiled_call_impl`, which runs the original model. The proxy
# that NeMo puts around each instance's `training_step` is not copied either, because `copy` cannot copy it.
_NOT_COPIED = ("_codec", "_compiled_call_impl", "_fabric", "_trainer")
_NO_TRAINER = {"_trainer": None, "_fabric": None}
_DATA_LOADERS = ("_train_dl", "_validation_dl", "_test_dl")


class Copies(BaseModel):
    """Mixin with the methods that `copy` and `pickle` call. Copies have no trainer."""

    def __copy__(self) -> "Self":
        """Return a model that shares the weights of this one.

        Modules of the copy can be replaced without changing this model.
        """
        state = {key: copy.copy(value) if isinstance(value, dict | set) else value for key, value in self._to_copy()}
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

        The trainer, the optimizers and the data loaders are not included. Rates of dropout and other changed
        attributes of the model and its layers are included.

        Raises:
            ConfigError: if the model has hooks, modules, methods, parameters or buffers that the config and the
                constructor of its class do not describe. The message names the first one.
        """
        kept = {
            "_random_weights": self._random_weights,
            "_is_without_gan": self._is_without_gan,
            "_restored_from": self._restored_from,
            "_average": self._average,
        }
        built = tuple(name for name in CONFIGURED if getattr(self, name, None) is not None)
        recipe = (type(self), self.cfg, hasattr(self, "discriminator"), kept, registered_components(self.cfg), built)
        state = self.state_dict()
        with logging.temp_verbosity(logging.ERROR):
            settings = settings_to_pickle(
                self, state, functools.partial(_rebuilt, *recipe), skipped=("model_guid", "_checked")
            )
        arguments = (*recipe[:2], state, *flags_of(self), *recipe[2:])
        return _unpickled, arguments, settings or None, None, None, restore_settings

    def _to_copy(self) -> Iterator[tuple[str, Any]]:
        for key, value in vars(self).items():
            if key not in _NOT_COPIED and not (key == "training_step" and isinstance(value, PROXIES)):
                yield key, value


def _unpickled(
    cls: type[BaseModel],
    cfg: DictConfig,
    state: dict[str, torch.Tensor],
    modes: dict[str, bool],
    gradients: dict[str, bool],
    has_discriminator: bool,
    attributes: dict[str, Any],
    components: dict[str, type[torch.nn.Module]],
    built: Sequence[str] = (),  # older versions did not pickle this value
) -> BaseModel:
    """Rebuild a model from the values that `LFRCodecModel.__reduce__` returned.

    The model is on the same device as the weights in `state`.
    """
    has_weights = not cls.__init__.__module__.startswith("nemo_lfr.")  # a constructor of a user may use the weights
    model = _rebuilt(cls, cfg, has_discriminator, attributes, components, built, has_weights)
    model.load_state_dict(state, assign=True)
    restore_flags(model, modes, gradients)
    for name, value in attributes.items():
        setattr(model, name, value)
    if len(devices := {value.device for value in state.values()}) == 1:
        model.to(*devices)
    return model


def _rebuilt(
    cls: type[BaseModel],
    cfg: DictConfig,
    has_discriminator: bool,
    attributes: dict[str, Any],
    components: dict[str, type[torch.nn.Module]],
    built: Sequence[str],
    has_weights: bool,
) -> BaseModel:
    """Build a model without the weights of the original.

    Args:
        cls: class of the model.
        cfg: config of the model.
        has_discriminator: whether the model has the attribute `discriminator`.
        attributes: further attributes of the original.
        components: custom discriminators, losses and metrics by name.
        built: attributes in `CONFIGURED` whose modules the original has built.
        has_weights: whether the encoder and the decoder have random weights. If not, they are on the meta device,
            which saves time and memory.
    """
    for name, component in components.items():
        register_component(component, name=name)
    with building_state(torch.device("cpu")):
        parts = None
        if not has_weights:
            with on_meta_device():
                parts = build_parts(checked_values(cfg))
        read_parts = READ_PARTS.set(parts)
        cls._set_model_restore_state(is_being_restored=True)  # prevents NeMo from opening the training data
        try:
            model = cls(cfg=cfg)
        finally:
            cls._set_model_restore_state(is_being_restored=False)
            READ_PARTS.reset(read_parts)
        if not has_discriminator:
            del model.discriminator
        model._restored_from = attributes["_restored_from"]
        training = cast(Any, model)
        if "discriminator" in built:
            training.build_discriminator()
        if "_losses" in built:
            _ = training.losses
        if "_metrics" in built:
            _ = training.metrics
    return model
