"""Copy and pickle the models that wrap the codec for NeMo and for `transformers`."""

import copy
import functools
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from nemo_lfr.checkpoint.names import plain_key, spell_as
from nemo_lfr.checkpoint.rebuilt import flags_of, restore_flags, restore_settings, settings_to_pickle
from nemo_lfr.errors import CheckpointError
from nemo_lfr.modules.weight_norm import remove_weight_norm

if TYPE_CHECKING:
    from typing_extensions import Self

_FORM = 3  # version of the content of pickled models; increase it when the content changes


class Copies:
    """Mixin for modules, with the methods that `copy` and `pickle` call."""

    _not_copied: ClassVar[tuple[str, ...]] = ("_codec",)  # attributes that copies set to None
    _shared: ClassVar[tuple[str, ...]] = ()  # attributes that a deep copy shares with the original
    _kept: ClassVar[tuple[str, ...]] = ()  # private attributes that are pickled
    _recomputed: ClassVar[tuple[str, ...]] = ()  # attributes that are neither pickled nor compared

    def __copy__(self) -> "Self":
        """Return a model that shares this model's weights. Replacing a module in one does not change the other."""
        other = type(self).__new__(type(self))
        state = self._to_copy().items()
        vars(other).update({key: copy.copy(value) if isinstance(value, dict | set) else value for key, value in state})
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "Self":
        """Return a copy that shares only the attributes in `_shared` with this object."""
        other = memo[id(self)] = type(self).__new__(type(self))
        state = self._to_copy().items()
        vars(other).update({key: value if key in self._shared else copy.deepcopy(value, memo) for key, value in state})
        return other

    def __reduce__(self) -> Any:
        """Return the config and the weights, so that `pickle` can rebuild the model from them.

        PyTorch cannot pickle a module with weight norm directly. Dropout rates and other changed attributes of the
        model and its layers are included.

        Raises:
            ConfigError: if the model has hooks, modules, methods, parameters or buffers that the config and the
                constructor of its class do not describe.
        """
        model: Any = self
        state, recipe = model.state_dict(), self._recipe()
        build: Any = functools.partial(self._rebuilt, recipe)
        settings = settings_to_pickle(model, state, build, skipped=self._recomputed)
        # Pickled as parameters under their own names, so that an optimizer that is pickled with the model keeps its
        # parameters. The state dict may contain weight norm that a layer no longer has.
        tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        named = {plain_key(name): value for name, value in tensors}
        spelled = spell_as(named, state)
        variables = {
            name: value for name, value in model.state_dict(keep_vars=True).items() if named.get(name) is value
        }
        variables |= {name: named[name] for name in spelled if name not in state}
        content = {
            "form": _FORM,
            "class": type(self),
            "recipe": recipe,
            "state": spelled | variables,
            "flags": flags_of(model),
            "kept": {name: getattr(self, name) for name in self._kept},
        }
        return unpickled, (content,), settings or None, None, None, restore_settings

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Raise an error, because an older version of this package pickled the model without `__reduce__`."""
        refuse_pickle()

    def _to_copy(self) -> dict[str, Any]:
        """Return a dict of the attributes that a copy gets. Those in `_not_copied` are None."""
        # `Module.compile` sets `_compiled_call_impl`. In a copy, it would still run the original model.
        state = {key: value for key, value in vars(self).items() if key != "_compiled_call_impl"}
        return state | dict.fromkeys(self._not_copied)

    def _recipe(self) -> dict[str, Any]:
        """Return the values from which `_rebuilt` builds a model like this one."""
        raise NotImplementedError

    @classmethod
    def _rebuilt(cls, recipe: dict[str, Any], has_weights: bool) -> "Self":
        """Build a model without the weights of the original.

        Args:
            recipe: values that `_recipe` returned.
            has_weights: whether the encoder and the decoder get random weights. Otherwise, they are built on the meta
                device, without weights, which saves time and memory.
        """
        raise NotImplementedError


def unpickled(content: dict[str, Any]) -> Any:
    """Rebuild a model from the values that `Copies.__reduce__` returned.

    The device of the model is that of the pickled weights.

    Raises:
        CheckpointError: if another version of this package pickled the model.
    """
    if content.get("form") != _FORM:
        refuse_pickle()
    kind, state = content["class"], content["state"]
    has_weights = not kind.__init__.__module__.startswith("nemo_lfr.")  # a constructor of a user may use the weights
    model = kind._rebuilt(content["recipe"], has_weights)
    for name, layer in model.named_modules():
        if f"{plain_key(name)}.weight" in state:
            remove_weight_norm(layer)
    model.load_state_dict(state, assign=True)
    restore_flags(model, *content["flags"])
    for name, value in content["kept"].items():
        setattr(model, name, value)
    if len(devices := {value.device for value in state.values()}) == 1:
        model.to(*devices)
    return model


def refuse_pickle(*_: Any) -> NoReturn:
    """Raise an error, because another version of this package pickled a model."""
    raise CheckpointError(
        "another version of nemo_lfr pickled this model; open the pickle with that version, save the model to a "
        "checkpoint, and load the checkpoint with this version."
    )
