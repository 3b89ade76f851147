"""State dicts of the NeMo model.

State dicts from any NeMo version can be loaded. Returned state dicts use NeMo's names.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch

from nemo_lfr.checkpoint import PARTS
from nemo_lfr.checkpoint.names import DIRECTION, plain_key, plain_keys, spell_as
from nemo_lfr.errors import CheckpointError, shorten
from nemo_lfr.modules.quantizer import FiniteScalarQuantizer
from nemo_lfr.nemo.base import DISCRIMINATOR, WAVLM, BaseModel, NeMoAudioCodecModel


class StateDicts(BaseModel):
    """Mixin with the methods that return and load state dicts."""

    def __delattr__(self, name: str) -> None:
        """Delete an attribute.

        Callers delete `discriminator` to free memory. If the discriminators are not built yet, this method discards
        the weights that are kept for them.
        """
        super().__delattr__(name)
        if name == "discriminator":
            self._unbuilt_discriminator = {}

    def state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Return the state dict with NeMo's names.

        The state dict contains the weights of the discriminators even if they are not built yet, but not the weights
        of WavLM. Modules that are wrapped by `torch.compile`, or whose weight norm was removed, have the same names
        and tensors as in NeMo.

        Args:
            destination: dict to add the tensors to, as in `torch.nn.Module.state_dict`.
            prefix: prefix of the names.
            keep_vars: whether to return parameters with their autograd state instead of detached tensors.
        """
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        own = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
        plain = plain_keys(own.items(), type(self).__name__)
        plain = spell_as(_stock_names(plain), plain) | self._unbuilt_discriminator
        state.update({prefix + key: value for key, value in plain.items() if not _is_wavlm(key)})
        if (metadata := getattr(state, "_metadata", None)) is not None:
            state._metadata = type(metadata)((plain_key(key), value) for key, value in metadata.items())
        return cast(dict[str, Any], state)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict saved by any NeMo version.

        Prefixes that `torch.compile` and `DistributedDataParallel` add to names are removed. The weights of WavLM are
        not loaded. Tensors outside of the encoder, quantizer and decoder (discriminators, windows and filters of the
        losses) vary between NeMo versions and configs. Such a tensor is loaded if its shape fits.

        Args:
            state_dict: tensors by name.
            strict: whether to raise if weights of the encoder, quantizer or decoder are missing or unknown.
            assign: whether to use the tensors themselves instead of copying their values.

        Returns:
            The missing and unexpected keys, as in `torch.nn.Module.load_state_dict`.

        Raises:
            CheckpointError: if `state_dict` does not map names to tensors, or if its shapes or FSQ levels differ from
                those of the model. With `strict`, also if weights are missing or unknown.
        """
        _check_state_dict(state_dict)
        own = super(NeMoAudioCodecModel, self).state_dict()
        shapes = {key: value.shape for key, value in own.items()}
        state_dict = _spelled_for(own, state_dict)
        other = [key for key, value in state_dict.items() if value.shape != shapes.get(key, value.shape)]
        if judged := [key for key in other if key.partition(".")[0] in PARTS]:
            raise CheckpointError(
                f"the state dict belongs to another codec: {len(judged)} weights have other shapes, for example "
                f"{judged[0]}: {list(state_dict[judged[0]].shape)} instead of {list(shapes[judged[0]])}; build "
                "the model from the config of that codec."
            )
        tables = self._quantizer_tables()
        for key in own:
            wanted = tables.get(key, own[key])
            if not key.startswith("vector_quantizer.") or key not in state_dict:
                continue
            if not torch.equal(state_dict[key].to(wanted), wanted):
                raise CheckpointError(
                    f"the state dict belongs to another codec: {key} is "
                    f"{shorten(state_dict[key].flatten().tolist())} in the state dict, but "
                    f"{shorten(wanted.flatten().tolist())} in the model; build the model from the config of that "
                    "codec."
                )
        state = {key: value for key, value in state_dict.items() if WAVLM not in key and key not in other}
        if getattr(self, "discriminator", None) is None:
            discriminator = {key: value for key, value in state.items() if key.startswith(DISCRIMINATOR)}
            if hasattr(self, "discriminator"):  # otherwise the caller has deleted it
                self._unbuilt_discriminator = {key: value.detach().cpu() for key, value in discriminator.items()}
            state = {key: value for key, value in state.items() if key not in discriminator}
        result = super(NeMoAudioCodecModel, self).load_state_dict(state, strict=False, assign=assign)
        for what, keys in (("lacks", result.missing_keys), ("has unknown", result.unexpected_keys)):
            judged = [key for key in keys if key.partition(".")[0] in PARTS]
            if strict and judged:
                raise CheckpointError(
                    f"the state dict {what} weights ({len(judged)} in total, the first are {judged[:5]}); pass "
                    "strict=False to load the weights that fit."
                )
        self._is_random = False
        return result

    def _quantizer_tables(self) -> dict[str, torch.Tensor]:
        """Return the values of the quantizer's buffers by key, even if the buffers are empty after `to_empty`."""
        with torch.device("cpu"):
            return {
                f"{path}.{name}": value
                for path, module in self.named_modules()
                if isinstance(module, FiniteScalarQuantizer)
                for name, value in module.tables().items()
            }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Rename weights to match the modules, then load them.

        PyTorch calls this method, and not `load_state_dict`, if the model is a submodule of another module.
        """
        theirs = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        own = super(NeMoAudioCodecModel, self).state_dict()
        state_dict.update({prefix + key: value for key, value in _spelled_for(own, theirs).items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _check_state_dict(state_dict: Any) -> None:
    """Check that an argument maps names to tensors.

    Raises:
        CheckpointError: if a key is not a string or a value is not a tensor. The message describes the first invalid
            entry.
    """
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(
            f"the state dict has the type {shorten(type(state_dict).__name__)}; pass a mapping from names to tensors."
        )
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise CheckpointError(
                f"the state dict has the key {shorten(repr(key))}; pass a mapping from names to tensors."
            )
        if not isinstance(value, torch.Tensor) or value.is_meta:
            is_meta = isinstance(value, torch.Tensor)
            fault = "a meta tensor, which has no values" if is_meta else f"not a tensor but {type(value).__name__}"
            hint = "; pass the value of that key" if key == "state_dict" else ""
            raise CheckpointError(f"the value of {shorten(key)} in the state dict is {shorten(fault)}{hint}.")


def _is_wavlm(key: str) -> bool:
    return key.startswith(DISCRIMINATOR) and WAVLM in key


def _stock_names(state: Mapping[str, Any]) -> set[str]:
    """Return the names of the weight-norm directions for convolutions whose weight norm was removed.

    NeMo's state dicts have these names. `state` contains plain weights instead.
    """
    stems = [key.removesuffix(".weight") for key in state if key.endswith(".conv.weight")]
    return {stem + DIRECTION for stem in stems if stem.partition(".")[0] in PARTS}


def _spelled_for(own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the weights of a state dict to match a model's modules and wrappers."""
    names = {plain_key(key): key for key in own}
    plain = plain_keys(state_dict.items(), "the state dict")
    return {names.get(key, key): value for key, value in spell_as(names, plain).items()}
