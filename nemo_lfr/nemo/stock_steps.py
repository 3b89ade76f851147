"""Run NeMo's own training and validation steps if a caller has changed the losses or methods that they use."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from lightning.pytorch.trainer.states import TrainerFn
from nemo.collections.tts.losses import audio_codec_loss
from omegaconf import OmegaConf
from torch import nn

from nemo_lfr.checkpoint.names import unwrapped
from nemo_lfr.errors import ConfigError
from nemo_lfr.modules.altered import is_patched
from nemo_lfr.nemo.base import NeMoAudioCodecModel
from nemo_lfr.nemo.config import ANY_LOSS, BUILT_IN, target_of
from nemo_lfr.nemo.inference import QUANTIZERS
from nemo_lfr.nemo.optimizers import Optimizers
from nemo_lfr.nemo.patches import is_replaced, patched_method
from nemo_lfr.training.audio_discriminator import AudioDiscriminator
from nemo_lfr.training.losses import SCALES, CodecLosses

logger = logging.getLogger(__name__)

# Losses that only NeMo's steps compute. Training ignores or refuses them in a config, but a caller may set attributes.
_NEMO_ONLY = ("commit_loss_scale", "mmd_loss_scale", "mmd_time_loss_scale", "use_slm_loss", "use_scl_loss")
_VALIDATED = ("losses", "metrics")  # keys that also affect validation
_PLAIN = (str, int, float, type(None))  # types of settings; faster than a union
_OBSERVERS = {"wandb"}  # packages whose hooks only record what a module computes, such as `wandb.watch`
_FORWARD = AudioDiscriminator.forward  # before a caller patches it
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

    _checked: tuple[tuple[str, ...], bool] = ((), True)  # attributes that differ, and whether for training
    _stock_losses: "dict[str, _StockLoss] | None" = None

    def setup(self, stage: str | None = None) -> None:
        """Call `find_changes` before the first validation.

        Raises:
            ConfigError: if NeMo's own steps are required, and the config sets a key that they do not support.
        """
        super().setup(stage)
        self.find_changes()

    @property
    def losses(self) -> CodecLosses:
        """Losses that the config names, built on first access.

        Raises:
            ConfigError: if a loss cannot be built.
        """
        if self._losses is None:
            config = cast(dict[str, Any], OmegaConf.to_container(self.cfg, resolve=True))
            with torch.inference_mode(False):  # the first access may be during validation
                self._losses = CodecLosses(config).to(self.device)
                self._stock_losses = self._build_stock_losses(config)
        return self._losses

    def find_changes(self) -> bool:
        """Return whether a change to the model requires NeMo's own steps.

        Each step calls this method, because a callback may change losses during training.

        Raises:
            ConfigError: if NeMo's own steps are required, and the config sets a key that they do not support.
        """
        changes = tuple(self._find_changes())
        is_fit = self._trainer is None or self._trainer.state.fn == TrainerFn.FITTING
        if changes and (changes, is_fit) != self._checked:
            used = _ADDITIONS if is_fit else _VALIDATED
            obstacles = {key: f"remove {key} from" for key in used if self.cfg.get(key) not in _ADDITIONS[key]}
            for key in ("generator_loss", "discriminator_loss") if is_fit else ():
                if target_of(self.cfg.get(key)) not in BUILT_IN:  # NeMo's step would use the placeholder instead
                    obstacles[f"the custom {key}"] = f"set {key} to a loss of NeMo in"
            for obstacle, remedy in obstacles.items():
                raise ConfigError(
                    f"{changes[0]} of the model was changed, so NeMo's own step must run, but that step does not "
                    f"support {obstacle}; undo the change, or {remedy} the model config."
                )
            logger.warning("the model uses NeMo's own, slower step, because its %s changed", ", ".join(changes))
        self._checked = changes, is_fit
        return bool(changes)

    def loss_scales(self) -> dict[str, float]:
        """Return the current weight of each of NeMo's loss terms by name, read from the model's attributes."""
        scales = {term: getattr(self, key) for term, (key, _) in SCALES.items() if hasattr(self, key)}
        return {term: float(scale or 0) for term, scale in scales.items()}

    def _find_changes(self) -> Iterator[str]:
        """Yield the names of the changed attributes that NeMo's steps use, but this package's steps ignore."""
        if (step := patched_method(NeMoAudioCodecModel, ("training_step", "validation_step"))) is not None:
            yield step
        if is_replaced(self, "_process_batch", StockSteps):
            yield "_process_batch"
        quantizer = self.vector_quantizer  # a caller may have set it to None
        if quantizer is None or not isinstance(unwrapped(quantizer), QUANTIZERS):
            yield "vector_quantizer"
        yield from (key for key in _NEMO_ONLY if getattr(self, key, None))
        # A scale may be a trained parameter, as in uncertainty weighting.
        yield from (key for key, _ in SCALES.values() if getattr(getattr(self, key, None), "requires_grad", False))
        _ = self.losses  # builds `_stock_losses`
        for name, stock_loss in (self._stock_losses or {}).items():
            if hasattr(self, name) and not stock_loss.equals(getattr(self, name)):
                yield name
        discriminator = getattr(self, "discriminator", None)
        if discriminator is not None and not _is_scored_directly(discriminator):
            yield "discriminator"

    def _build_stock_losses(self, config: Mapping[str, Any]) -> dict[str, "_StockLoss"]:
        resolutions = config["loss_resolutions"]
        is_absolute = config.get("feature_loss_type") == "absolute"
        losses: dict[str, nn.Module] = {
            "mel_loss_fn": audio_codec_loss.MultiResolutionMelLoss(
                sample_rate=config["sample_rate"],
                resolutions=resolutions,
                mel_dims=config["mel_loss_dims"],
                log_guard=config.get("mel_loss_log_guard", 1.0),
            ),
            "stft_loss_fn": audio_codec_loss.MultiResolutionSTFTLoss(
                resolutions=resolutions, log_guard=config.get("stft_loss_log_guard", 1.0)
            ),
            "time_domain_loss_fn": audio_codec_loss.TimeDomainLoss(),
            "si_sdr_loss_fn": audio_codec_loss.SISDRLoss(),
            "feature_loss_fn": getattr(audio_codec_loss, f"{'' if is_absolute else 'Relative'}FeatureMatchingLoss")(),
        }
        for name, key in {"gen_loss_fn": "generator_loss", "disc_loss_fn": "discriminator_loss"}.items():
            target, loss = target_of(config[key]), cast(nn.Module, getattr(self, name, None))
            if f"{type(loss).__module__}.{type(loss).__qualname__}" == target not in BUILT_IN:
                losses[name] = loss  # a custom loss in a model of `accelerate`
            else:  # of the class that the constructor of the model uses
                kind = str(target if target in BUILT_IN else target_of(ANY_LOSS)).rpartition(".")[2]
                losses[name] = getattr(audio_codec_loss, kind)()
        return {name: _StockLoss(loss) for name, loss in losses.items()}


class _StockLoss:
    """Layers, settings and buffers of one of NeMo's losses; `equals` compares a loss with them."""

    def __init__(self, loss: nn.Module) -> None:
        self._layers = {name: (type(layer), _settings(layer)) for name, layer in loss.named_modules()}
        self._buffers = [buffer.detach().clone() for buffer in loss.buffers()]
        self._compared: list[torch.Tensor] = []  # buffers of the model in the last comparison
        self._versions: list[tuple[int, int]] = []
        self._is_close = not self._buffers

    def equals(self, loss: Any) -> bool:
        """Return whether a model's loss is equal to the stored one, and has no patched methods or hooks.

        Equal losses have the same layers and settings, and nearly the same buffers.
        """
        layers = dict(loss.named_modules()) if isinstance(loss, nn.Module) else {}
        if layers.keys() != self._layers.keys() or not all(map(_is_same, layers.values(), self._layers.values())):
            return False
        if any(map(patched_method, {type(layer) for layer in layers.values()})):
            return False
        buffers = list(loss.buffers())
        versions = [(id(buffer), 0 if buffer.is_inference() else buffer._version) for buffer in buffers]
        if versions != self._versions:
            # Loading a checkpoint copies these buffers, which may be rounded or come from another version of librosa.
            self._is_close = len(buffers) == len(self._buffers) and all(map(_is_close, buffers, self._buffers))
            self._versions, self._compared = versions, buffers  # keeping the buffers keeps their ids unique
        return self._is_close


def _is_same(layer: nn.Module, expected: tuple[type, dict[str, Any]]) -> bool:
    kind, settings = expected
    return (
        type(layer) is kind
        and not _is_hooked(layer)
        and not is_patched(layer)
        and settings.items() <= _settings(layer).items()
    )


def _settings(layer: nn.Module) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(layer).items()
        if isinstance(value, _PLAIN) and key not in ("training", "model_guid") and key[0] != "_"
    }


def _is_hooked(module: nn.Module) -> bool:
    """Return whether a module has hooks that may change its results."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    modules = [str(getattr(hook, "__module__", "")) for of_kind in hooks for hook in of_kind.values()]
    return any(name.partition(".")[0] not in _OBSERVERS for name in modules)


def _is_scored_directly(discriminator: nn.Module) -> bool:
    """Return whether calling a discriminator does nothing but `preprocess` and `score`."""
    parts = [part for part in discriminator.modules() if isinstance(part, AudioDiscriminator)]
    return isinstance(discriminator, AudioDiscriminator) and not any(
        _is_hooked(part) or "forward" in vars(part) or type(part).forward is not _FORWARD for part in parts
    )


def _is_close(buffer: torch.Tensor, expected: torch.Tensor) -> bool:
    if buffer.shape != expected.shape:
        return False
    buffer, expected = buffer.detach().cpu().double(), expected.cpu().double()
    return bool((buffer - expected).norm() <= 1e-2 * expected.norm())
