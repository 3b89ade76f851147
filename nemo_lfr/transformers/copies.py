"""Support for copying and pickling the model for `transformers`."""

import copy
import functools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nemo_lfr.checkpoint.names import spell_as
from nemo_lfr.checkpoint.rebuilt import flags_of, restore_flags, restore_settings, settings_to_pickle
from nemo_lfr.codec.ambient import building_state
from nemo_lfr.modules.altered import PICKLE
from nemo_lfr.modules.empty import on_meta_device
from nemo_lfr.transformers.configuration import NemoLfrConfig

if TYPE_CHECKING:
    from typing_extensions import Self


class Copies(nn.Module):
    """Mixin with the methods that `copy` and `pickle` call."""

    config: Any
    _is_validated: bool

    def __copy__(self) -> "Self":
        """Return a model that shares the weights of this one. Its modules can be replaced separately."""
        other = type(self).__new__(type(self))
        state = {key: copy.copy(value) if isinstance(value, dict | set) else value for key, value in self._to_copy()}
        other.__setstate__(state | {"_codec": None})
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "Self":
        """Return an independent copy."""
        other = memo[id(self)] = type(self).__new__(type(self))
        state = {key: copy.deepcopy(value, memo) for key, value in self._to_copy()}
        other.__setstate__(state | {"_codec": None})
        return other

    def __reduce__(self) -> Any:
        """Return the config and the weights, so that `pickle` can rebuild the model from them.

        PyTorch cannot pickle a module with weight norm directly.

        Raises:
            NemoLfrError: if the model has changes that would be lost: hooks, added or replaced modules, added
                parameters or buffers, or changed settings of convolutions, activations or the quantizer.
        """
        model: Any = self
        model.codec.backend.check_described(PICKLE)
        state = self.state_dict()
        build = functools.partial(_rebuilt, type(self), copy.deepcopy(self.config))
        settings = settings_to_pickle(self, state, build, skipped=("_is_hf_initialized",))
        arguments = (type(self), self.config, state, *flags_of(self), self._is_validated)
        return _unpickled, arguments, settings or None, None, None, restore_settings

    def _to_copy(self) -> Iterator[tuple[str, Any]]:
        # `Module.compile` sets `_compiled_call_impl`. In a copy, it would still run the original model.
        return ((key, value) for key, value in vars(self).items() if key not in ("_codec", "_compiled_call_impl"))


def _unpickled(
    cls: type[Copies],
    config: NemoLfrConfig,
    state: dict[str, torch.Tensor],
    modes: dict[str, bool],
    gradients: dict[str, bool],
    is_validated: bool,
) -> Copies:
    """Rebuild a model from the values that `Copies.__reduce__` returned, on the device of the weights."""
    model: Copies = _rebuilt(cls, config, has_weights=True)
    model.load_state_dict(spell_as(model.state_dict(), state), assign=True)
    restore_flags(model, modes, gradients)
    model._is_validated = is_validated
    return model


def _rebuilt(cls: Any, config: NemoLfrConfig, has_weights: bool) -> Any:
    """Build a model with random weights; without `has_weights`, on the meta device, which saves time and memory."""
    with building_state(torch.device("cpu")), nullcontext() if has_weights else on_meta_device():
        return cls(config)
