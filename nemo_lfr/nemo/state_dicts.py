"""State dicts of the NeMo model.

State dicts from any NeMo version can be loaded. Returned state dicts use NeMo's names.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch.nn.parallel import DistributedDataParallel

from nemo_lfr.checkpoint import PARTS
from nemo_lfr.checkpoint.names import DIRECTION, GAIN, plain_key, plain_keys, spell_as
from nemo_lfr.checkpoint.tensors import Tensors
from nemo_lfr.errors import CheckpointError, ConfigError, shorten
from nemo_lfr.modules.quantizer import FiniteScalarQuantizer
from nemo_lfr.nemo.base import DISCRIMINATOR, WAVLM, BaseModel, NeMoAudioCodecModel

logger = logging.getLogger(__name__)

# Attributes with the modules that are built from the config when they are first used.
CONFIGURED = ("discriminator", "_losses", "_metrics")


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
        of WavLM. Wrappers such as `torch.compile`, and the removal of weight norm, change neither the names nor the
        tensors.

        Args:
            destination: dict to add the tensors to, as in `torch.nn.Module.state_dict`.
            prefix: prefix of the names.
            keep_vars: whether to return parameters with their autograd state instead of detached tensors.
        """
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        own = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
        plain = plain_keys(own.items(), type(self).__name__)
        plain = spell_as(_stock_names(plain), plain)
        if self._unbuilt_discriminator and self.cfg.get("discriminator"):  # not if a caller has removed the section
            plain |= self._unbuilt_discriminator
        state.update({prefix + key: value for key, value in plain.items() if not _is_wavlm(key)})
        if (metadata := getattr(state, "_metadata", None)) is not None:
            state._metadata = type(metadata)((plain_key(key), value) for key, value in metadata.items())
        return cast(dict[str, Any], state)

    def _fqn_modifiers(self) -> dict[str, str]:
        """Return a dict that names the substitute for unbuilt discriminators.

        `torch.distributed.checkpoint` looks up each name in the state dict as an attribute of the model. Weights of
        unbuilt discriminators are looked up in `_unbuilt_names`. Weights of wrapped modules cannot be looked up,
        because the state dict leaves out the names of wrappers.

        Raises:
            ConfigError: if a module is wrapped in `torch.compile` or `DistributedDataParallel`.
        """
        for name, module in self.named_modules():
            if name and ("_orig_mod" in module._modules or isinstance(module, DistributedDataParallel)):
                raise ConfigError(
                    f"{name} is wrapped in {type(module).__name__}, so torch.distributed.checkpoint cannot look up "
                    f"the names of its weights; remove the wrapper. To compile the module, call {name}.compile()."
                )
        return {"discriminator": "_unbuilt_names"} if self._unbuilt_discriminator else {}

    @property
    def _unbuilt_names(self) -> SimpleNamespace:
        """Namespaces in which the keys of `_unbuilt_discriminator` are attributes."""
        names = SimpleNamespace()
        for key in self._unbuilt_discriminator:
            node = names
            for name in key.split("."):
                node = vars(node).setdefault(name, SimpleNamespace())
        return names

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict saved by any NeMo version.

        Prefixes that `torch.compile` and `DistributedDataParallel` add to names are removed. The weights of WavLM are
        not loaded. A tensor of a discriminator, loss or metric is loaded if its shape fits.

        Args:
            state_dict: tensors by name.
            strict: whether to raise if weights of the encoder, quantizer or decoder are missing or unknown.
            assign: whether to use the tensors themselves instead of copying their values.

        Returns:
            The missing and unexpected keys, as in `torch.nn.Module.load_state_dict`.

        Raises:
            CheckpointError: if `state_dict` does not map names to tensors, if the FSQ levels differ, or if a tensor of
                the codec or of an added module has another shape. With `strict`, also for missing or unknown weights.
        """
        _check_state_dict(state_dict)
        own = super(NeMoAudioCodecModel, self).state_dict()
        shapes = {key: value.shape for key, value in own.items()}
        state_dict = _spelled_for(own, state_dict)
        other = [key for key, value in state_dict.items() if value.shape != shapes.get(key, value.shape)]
        if judged := [key for key in other if not self._varies(key)]:
            is_codec = judged[0].partition(".")[0] in PARTS
            remedy = "from the config of that codec" if is_codec else "with the modules whose weights were saved"
            raise CheckpointError(
                f"the state dict belongs to another {'codec' if is_codec else 'model'}: {len(judged)} weights have "
                f"other shapes, for example {judged[0]}: {list(state_dict[judged[0]].shape)} instead of "
                f"{list(shapes[judged[0]])}; build the model {remedy}."
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
        state = self._keep_discriminator(state)
        result = super(NeMoAudioCodecModel, self).load_state_dict(state, strict=False, assign=assign)
        for what, keys in (("lacks", result.missing_keys), ("has unknown", result.unexpected_keys)):
            judged = [key for key in keys if key.partition(".")[0] in PARTS]
            if strict and judged:
                raise CheckpointError(
                    f"the state dict {what} weights ({len(judged)} in total, the first are {judged[:5]}); pass "
                    "strict=False to load the weights that fit."
                )
        if not self._is_random:  # Lightning's tuners restore the initial weights
            self._random_weights = None
        return result

    def _keep_discriminator(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict without the weights of discriminators that are not built yet.

        `_unbuilt_discriminator` keeps these weights until the discriminators are built.
        """
        if getattr(self, "discriminator", None) is not None:
            return state
        discriminator = {key: value for key, value in state.items() if key.startswith(DISCRIMINATOR)}
        if self.cfg.get("discriminator") and hasattr(self, "discriminator"):  # otherwise the caller has deleted it
            kept = {key: value.detach().cpu().clone() for key, value in discriminator.items()}
            self._unbuilt_discriminator = self._unbuilt_discriminator | kept
        return {key: value for key, value in state.items() if key not in discriminator}

    def _load_kept_discriminator(self) -> None:
        """Load the weights that were kept until the discriminators were built.

        If no weights were kept, do nothing. Otherwise, log a warning if some are missing or have another shape.
        """
        kept, self._unbuilt_discriminator = self._unbuilt_discriminator, {}
        if not kept:
            return
        own = {key: value for key, value in super(NeMoAudioCodecModel, self).state_dict().items() if WAVLM not in key}
        kept = _spelled_for(own, kept)
        names = [key for key in own if key.startswith(DISCRIMINATOR)]
        random = [key for key in names if key not in kept or kept[key].shape != own[key].shape]
        if random:
            logger.warning(
                "%d of %d weights of the discriminators keep their random initial values, because the checkpoint has "
                "none with these names and shapes, for example %s.",
                len(random), len(names), random[0],
            )  # fmt: skip
        self.load_state_dict(own | kept)

    def load_rest(self, tensors: Tensors, loaded: Sequence[torch.Tensor]) -> None:
        """Load those weights of a checkpoint that are not in the model yet.

        These are the weights of modules that a subclass added or replaced, and of the discriminators.

        Args:
            tensors: tensors of the checkpoint. Each one is read when it is accessed.
            loaded: tensors of the model that are loaded already.

        Raises:
            CheckpointError: if a weight is damaged or has another shape.
        """
        if added := {name: tensors[name] for name in self._added_names(tensors.entries, loaded)}:
            try:
                self.load_state_dict(added, strict=False)
            except CheckpointError as error:
                raise CheckpointError(f"{tensors.path}: {error}") from error
        # A subclass may have deleted the discriminator, or built its own.
        if self.cfg.get("discriminator") and getattr(self, "discriminator", self) is None:
            names = [key for key in tensors.entries if key.startswith(DISCRIMINATOR) and WAVLM not in key]
            self._unbuilt_discriminator = {key: tensors[key] for key in names}

    def _added_names(self, stored: Collection[str], loaded: Sequence[torch.Tensor]) -> list[str]:
        """Return the names of stored weights for modules that a subclass added or replaced.

        Tensors of NeMo's losses and of WavLM are left out, because they follow from the config.

        Args:
            stored: names of the tensors in the checkpoint.
            loaded: tensors of the model that are loaded already.
        """
        done = {id(value) for value in loaded}
        names: list[str] = []
        for key, value in super(NeMoAudioCodecModel, self).state_dict(keep_vars=True).items():
            key = plain_key(key)
            if id(value) not in done and not self._is_loss(key) and not _is_wavlm(key):
                stem = key.removesuffix(".weight").removesuffix(GAIN).removesuffix(DIRECTION)
                spellings = [key] if key in stored else [stem + GAIN, stem + DIRECTION, stem + ".weight"]
                names += [name for name in spellings if name in stored]
        return names

    def _varies(self, key: str) -> bool:
        """Return whether a tensor belongs to the discriminators, losses or metrics that the config describes."""
        return key.partition(".")[0] in CONFIGURED or self._is_loss(key)

    def _is_loss(self, key: str) -> bool:
        """Return whether a tensor belongs to one of NeMo's losses."""
        loss = getattr(self, key.partition(".")[0], None)
        return type(loss).__module__.startswith("nemo.collections.tts.losses.")

    def _quantizer_tables(self) -> dict[str, torch.Tensor]:
        """Compute the quantizer's buffers from its levels; return them by state-dict key.

        They are not copied from the model, whose buffers have no valid values after `to_empty`.
        """
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
        state = self._keep_discriminator(_spelled_for(own, theirs))
        state_dict.update({prefix + key: value for key, value in state.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _check_state_dict(state_dict: Any) -> None:
    """Check that an argument maps names to tensors.

    Raises:
        CheckpointError: if a key is not a string or a value is not a tensor.
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
            hint = "; pass the value of the key state_dict" if "state_dict" in state_dict else ""
            raise CheckpointError(f"the value of {shorten(key)} in the state dict is {shorten(fault)}{hint}.")


def _is_wavlm(key: str) -> bool:
    return key.startswith(DISCRIMINATOR) and WAVLM in key


def _stock_names(state: Mapping[str, Any]) -> set[str]:
    """Return NeMo's key of the weight-norm direction for each convolution with a plain weight in `state`."""
    stems = [key.removesuffix(".weight") for key in state if key.endswith(".conv.weight")]
    return {stem + DIRECTION for stem in stems if stem.partition(".")[0] in PARTS}


def _spelled_for(own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a state dict to the names and the form of weights (with or without weight norm) that a model has.

    Args:
        own: state dict of the model. Its keys may contain names of wrappers, such as "_orig_mod".
        state_dict: state dict to convert. The result also contains the weights that the model does not have.
    """
    names = {plain_key(key): key for key in own}
    plain = plain_keys(state_dict.items(), "the state dict")
    return {names.get(key, key): value for key, value in spell_as(names, plain).items()}
