"""Run NeMo's own training and validation steps if a caller has changed the losses or methods that they use."""

import logging
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from nemo.collections.tts.losses import audio_codec_loss
from torch import nn

from nemo_lfr.errors import ConfigError
from nemo_lfr.nemo.base import NeMoAudioCodecModel
from nemo_lfr.nemo.config import ANY_LOSS, BUILT_IN, target_of
from nemo_lfr.nemo.optimizers import Optimizers
from nemo_lfr.training.audio_discriminator import AudioDiscriminator
from nemo_lfr.training.losses import SCALES

logger = logging.getLogger(__name__)

# Losses that only NeMo's steps compute. The config cannot set them; see `check_training`.
_NEMO_ONLY = ("commit_loss_scale", "mmd_loss_scale", "mmd_time_loss_scale", "use_slm_loss", "use_scl_loss")
_VALIDATED = ("losses", "metrics")  # keys that also affect validation
_PARTS = (
    "mel_loss_fn", "stft_loss_fn", "time_domain_loss_fn", "si_sdr_loss_fn", "feature_loss_fn", "gen_loss_fn",
    "disc_loss_fn", "discriminator",
)  # fmt: skip
# Keys of the config that NeMo's steps do not support, and the values with which they have no effect
_ADDITIONS: dict[str, tuple[Any, ...]] = {
    "accumulate_grad_batches": (None, 0, 1),
    "codebook_dropout_rate": (None, 0),
    "log_mel_loss_scale": (None, 0),
    "losses": (None, {}),
    "metrics": (None, {}),
    "spread_loss_scale": (None, 0),
}


class StockSteps(Optimizers):
    """Mixin that runs NeMo's own steps if a caller has changed something that this package's steps would ignore."""

    _changes: tuple[str, ...] = ()  # attributes that were changed
    _checked: Any = None  # state of the attributes when `_changes` was set

    def setup(self, stage: str | None = None) -> None:
        """Call `find_changes`, so that the changes are known before the first validation.

        Raises:
            ConfigError: see `find_changes`.
        """
        super().setup(stage)
        self.find_changes()

    def find_changes(self) -> bool:
        """Set `_changes`, and return whether NeMo's own steps must run.

        Each step calls this method, because a callback may change losses during training.

        Raises:
            ConfigError: if something was changed, and the config sets a key that NeMo's own steps do not support.
        """
        state = _state(self)
        if state == self._checked:
            return bool(self._changes)
        changes = tuple(_changed_attributes(self))
        if changes and changes != self._changes:
            for key, neutral in _ADDITIONS.items():
                is_used = self._trainer is None or self._trainer.state.fn == TrainerFn.FITTING or key in _VALIDATED
                if is_used and self.cfg.get(key) not in neutral:
                    raise ConfigError(
                        f"{changes[0]} of the model was changed, which only NeMo's own training step uses, but this "
                        f"step does not support {key}; undo the change, or remove {key} from the model config."
                    )
            for key in ("generator_loss", "discriminator_loss"):
                if target_of(self.cfg.get(key)) not in BUILT_IN:  # NeMo's step would use the placeholder instead
                    raise ConfigError(
                        f"{changes[0]} of the model was changed, which only NeMo's own training step uses, but this "
                        f"step does not support the custom {key} of the config; undo the change, or set {key} to a "
                        "loss of NeMo."
                    )
            logger.warning("training uses NeMo's own, slower step, because the model's %s changed", ", ".join(changes))
        self._changes, self._checked = changes, state
        return bool(changes)

    def loss_scales(self) -> dict[str, float]:
        """Return the weights of NeMo's loss terms. As in NeMo, they are attributes that may change at any time."""
        scales = {term: getattr(self, key) for term, (key, _) in SCALES.items() if hasattr(self, key)}
        return {term: float(scale or 0) for term, scale in scales.items()}


def _state(model: Any) -> tuple[Any, ...]:
    """Return values that change if a caller replaces, hooks or patches one of the attributes that NeMo's steps use."""
    parts = [getattr(model, name, None) for name in _PARTS]
    layers = [
        (
            id(layer),
            len(layer._forward_hooks),
            len(layer._forward_pre_hooks),
            id(vars(layer).get("forward")),
            [value for key, value in vars(layer).items() if _is_setting(key, value)],
            [buffer._version for buffer in layer.buffers(recurse=False)],
        )
        for part in parts[:-1]  # discriminators are trained, and only their hooks matter
        if isinstance(part, nn.Module)
        for layer in part.modules()
    ]
    discriminator = parts[-1]
    is_direct = not isinstance(discriminator, nn.Module) or _is_scored_directly(discriminator)
    values = [getattr(model, key, None) for key in _NEMO_ONLY]
    return [id(part) for part in parts], layers, is_direct, values, id(vars(model).get("_process_batch"))


def _changed_attributes(model: Any) -> Iterable[str]:
    """Yield the names of the attributes that NeMo's steps use, and whose values this package's steps would ignore."""
    kind = type(model)
    if kind._process_batch is not NeMoAudioCodecModel._process_batch or "_process_batch" in vars(model):
        yield "_process_batch"
    yield from (key for key in _NEMO_ONLY if getattr(model, key, None))
    cfg, resolutions = model.cfg, model.cfg.loss_resolutions
    references = {
        "mel_loss_fn": audio_codec_loss.MultiResolutionMelLoss(
            sample_rate=model.sample_rate,
            resolutions=resolutions,
            mel_dims=cfg.get("mel_loss_dims"),
            log_guard=cfg.get("mel_loss_log_guard", 1.0),
        ),
        "stft_loss_fn": audio_codec_loss.MultiResolutionSTFTLoss(
            resolutions=resolutions, log_guard=cfg.get("stft_loss_log_guard", 1.0)
        ),
        "time_domain_loss_fn": audio_codec_loss.TimeDomainLoss(),
        "si_sdr_loss_fn": audio_codec_loss.SISDRLoss(),
        "feature_loss_fn": audio_codec_loss.FeatureMatchingLoss()
        if cfg.get("feature_loss_type") == "absolute"
        else audio_codec_loss.RelativeFeatureMatchingLoss(),
    }
    for name, reference in references.items():
        if hasattr(model, name) and _differs(getattr(model, name), reference):
            yield name
    for name, key in {"gen_loss_fn": "generator_loss", "disc_loss_fn": "discriminator_loss"}.items():
        if hasattr(model, name) and not _is_configured(getattr(model, name), cfg.get(key)):
            yield name
    discriminator = getattr(model, "discriminator", None)
    if discriminator is not None and not _is_scored_directly(discriminator):
        yield "discriminator"


def _is_configured(loss: Any, section: Any) -> bool:
    """Return whether a loss has the class that its config section names, without hooks or a replaced `forward`."""
    name = f"{type(loss).__module__}.{type(loss).__qualname__}"
    target = target_of(section)
    # The placeholder stands for a custom loss, which this package builds itself.
    is_expected = name == target or (name == target_of(ANY_LOSS) and target not in BUILT_IN)
    return is_expected and not (isinstance(loss, nn.Module) and _is_hooked(loss, {"forward"}))


def _is_scored_directly(discriminator: nn.Module) -> bool:
    """Return whether calling a discriminator does nothing but `preprocess` and `score`."""
    parts = [part for part in discriminator.modules() if isinstance(part, AudioDiscriminator)]
    return (
        isinstance(discriminator, AudioDiscriminator)
        and all(type(part).forward is AudioDiscriminator.forward for part in parts)
        and not any(_is_hooked(part, {"forward"}) for part in parts)
    )


def _is_hooked(module: nn.Module, methods: set[str]) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or not methods.isdisjoint(vars(module)))


def _differs(module: Any, reference: nn.Module) -> bool:
    """Return whether a loss module has another class, setting, buffer, method or hook than a reference."""
    if not isinstance(module, nn.Module):
        return True
    for (name, layer), (other, original) in zip_longest(
        module.named_modules(), reference.named_modules(), fillvalue=(None, None)
    ):
        if name != other or type(layer) is not type(original):
            return True
        assert layer is not None  # because both names are equal
        assert original is not None
        added = {key for key, value in vars(layer).items() if callable(value) and key not in vars(original)}
        if _is_hooked(layer, added):
            return True
        for key, expected in vars(original).items():
            if _is_setting(key, expected) and vars(layer).get(key) != expected:
                return True
    # Loading a checkpoint copies the buffers of losses, which may be rounded or come from another version of librosa.
    tensors, expected_tensors = ([*part.parameters(), *part.buffers()] for part in (module, reference))
    pairs = zip(tensors, expected_tensors, strict=False)
    return len(tensors) != len(expected_tensors) or not all(_is_close(a, b) for a, b in pairs)


def _is_setting(key: str, value: Any) -> bool:
    return isinstance(value, str | int | float | None) and key not in ("training", "model_guid") and key[0] != "_"


def _is_close(tensor: torch.Tensor, expected: torch.Tensor) -> bool:
    if tensor.shape != expected.shape:
        return False
    tensor, expected = tensor.detach().cpu().double(), expected.detach().cpu().double()
    return bool((tensor - expected).norm() <= 1e-2 * expected.norm())
