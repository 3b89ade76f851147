"""Function `accelerate`, which replaces the modules of a NeMo codec model with the faster modules of this package."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from nemo_lfr.checkpoint import PARTS, build_part, build_parts, nemo_config
from nemo_lfr.checkpoint.names import DIRECTION, plain_key, plain_keys, unwrapped
from nemo_lfr.checkpoint.rebuilt import Operation, check_layers, check_settings
from nemo_lfr.codec.ambient import building_state
from nemo_lfr.errors import ConfigError, shorten
from nemo_lfr.modules.empty import on_meta_device
from nemo_lfr.nemo.base import DISCRIMINATOR, PROXIES, WAVLM, NeMoAudioCodecModel, audio_codec_modules, model_utils
from nemo_lfr.nemo.config import checked_values
from nemo_lfr.nemo.model import LFRCodecModel
from nemo_lfr.nemo.patches import patched_method

_OPERATION = Operation("accelerate()", "the stock", "accelerated model")


def accelerate(model: NeMoAudioCodecModel) -> NeMoAudioCodecModel:
    """Replace the encoder, quantizer and decoder of a loaded NeMo `AudioCodecModel` with modules of this package.

    The weights are kept: the parameters remain the same objects, with their dtype, device and `requires_grad`. If
    `torch.compile` or `DistributedDataParallel` wraps a replaced module, the wrapper is removed. Modules that already
    come from this package are not replaced.

    Args:
        model: model to change in place. A plain `AudioCodecModel` becomes an `LFRCodecModel`; an instance of a
            subclass keeps its class.

    Returns:
        `model` itself.

    Raises:
        ConfigError: if the model is not an `AudioCodecModel` of the LFR codec family, is being trained, or has changes
            that would be lost, such as hooks. The model is then unchanged.
    """
    inner = unwrapped(model) if isinstance(model, torch.nn.Module) else model
    if isinstance(inner, LFRCodecModel):
        return model
    if not isinstance(inner, NeMoAudioCodecModel):
        raise ConfigError(f"{type(model).__name__} is not NeMo's AudioCodecModel; pass a loaded model of that class.")
    trainer = inner._trainer
    is_fit = trainer is not None and trainer.lightning_module is inner and trainer.state.fn == TrainerFn.FITTING
    if is_fit and trainer.state.status == TrainerStatus.RUNNING:  # its optimizers and hooks would stay those of NeMo
        raise ConfigError("the model is being trained; call accelerate before the trainer's fit.")
    # Everything that can fail runs before the first change to the model.
    values = checked_values(inner.cfg)
    with building_state(torch.device("cpu")):
        build_parts(values, weight_norm=False)
        parts = {name: _replacement(name, values[name], getattr(inner, name, None)) for name in PARTS}
    is_stock = type(inner) is NeMoAudioCodecModel
    has_discriminator = hasattr(inner, "discriminator")
    discriminator = getattr(inner, "discriminator", None)
    state = {} if discriminator is None else discriminator.state_dict(prefix=DISCRIMINATOR)
    for name, part in parts.items():
        setattr(inner, name, part)
    if is_stock:
        inner.__class__ = LFRCodecModel
        # The model builds this package's discriminators when training starts. Keep the weights until then.
        kept = {plain_key(key): value for key, value in state.items() if WAVLM not in key}
        if has_discriminator:
            inner.discriminator = None
        inner.init_codec_state(is_random=False, discriminator=kept)
        inner._is_without_gan = has_discriminator and discriminator is None
        # NeMo wraps `training_step` in a proxy, which still calls the method of the old class. Create the proxy again.
        # Copies of a model have no proxy yet. If a caller has replaced the proxy with a function, keep the function.
        if isinstance(inner.__dict__.get("training_step"), PROXIES):
            del inner.training_step
        if "training_step" not in inner.__dict__:
            inner.training_step = model_utils.wrap_training_step(inner.training_step)
    return model


def _replacement(name: str, config: Mapping[str, Any], given: Any) -> torch.nn.Module:
    """Build this package's module around the parameters of a NeMo module.

    Args:
        name: attribute of the model that contains the module, such as "audio_encoder".
        config: config section of the module.
        given: the module. If it already belongs to this package, it is returned unchanged.

    Raises:
        ConfigError: if the NeMo module does not match the config, or was altered in a way that would be lost.
    """
    if not isinstance(given, torch.nn.Module):
        raise ConfigError(f"the model's {name} is {shorten(repr(given))}, not a module; load the model again.")
    stock = unwrapped(given)
    tensors = plain_keys(stock.state_dict(keep_vars=True).items(), name)
    needs_gradient = {key: value.requires_grad for key, value in tensors.items()}
    if any(value.is_meta for value in tensors.values()):
        raise ConfigError(f"{name} is on the meta device, which stores no weights; load the model again.")
    has_norm = any(key.endswith((DIRECTION, ".weight_v")) for key in tensors)
    with on_meta_device():
        part = build_part(dict(config), weight_norm=has_norm).requires_grad_(False)
    is_ours = type(stock) is type(part)
    if not is_ours:
        # Before the weights are compared with the config, because another class of layer may have other weights.
        reference = _stock_module(config)
        check_layers(given, reference, name, _OPERATION)
        _check_classes(stock, name)
    levels = build_part(dict(config)).state_dict() if name == "vector_quantizer" else {}
    differ = [key for key, value in levels.items() if key in tensors and not torch.equal(tensors[key].cpu(), value)]
    # `load_state_dict` sets `requires_grad`. For tensors made in inference mode this is only allowed in that mode.
    with torch.inference_mode(any(value.is_inference() for value in tensors.values())):
        try:
            if differ:
                wanted = shorten(levels[differ[0]].flatten().tolist())
                used = shorten(tensors[differ[0]].flatten().tolist())
                raise ConfigError(f"{differ[0]} is {used} instead of {wanted}")
            part.load_state_dict(tensors, assign=True)
        except (RuntimeError, ConfigError) as error:
            reason = shorten(" ".join(str(error).split()), 200)
            raise ConfigError(f"{name} does not match the model's config: {reason}") from error
        finally:
            for key, value in tensors.items():
                if value.requires_grad != needs_gradient[key]:
                    value.requires_grad_(needs_gradient[key])
    if is_ours:
        return given
    check_settings(given, reference, name, _OPERATION)
    layers = {plain_key(path): module for path, module in stock.named_modules(remove_duplicate=False)}
    for path, module in part.named_modules():
        layer = layers.get(path, stock)
        module.training = layer.training
        if isinstance(module, torch.nn.Dropout) and isinstance(layer, torch.nn.Dropout):
            module.p = layer.p
    return part


def _stock_module(config: Mapping[str, Any]) -> torch.nn.Module:
    """Build NeMo's module that a section of a model config describes, for comparison.

    The weights of an encoder or decoder are on the meta device.

    Raises:
        ConfigError: if NeMo has no class for this module.
    """
    config = nemo_config(config)
    name = str(config["_target_"]).rpartition(".")[2]
    kind: type[torch.nn.Module] = getattr(audio_codec_modules, name)
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    if name.endswith("Quantizer"):  # its constructor reads values of tensors
        return kind(**arguments)
    with on_meta_device():
        return kind(**arguments)


def _check_classes(stock: torch.nn.Module, path: str) -> None:
    """Check that no methods of NeMo's classes are patched.

    Args:
        stock: NeMo's module.
        path: name of the module in the model, for messages.

    Raises:
        ConfigError: if the class of the module or of a sub-module has a patched method.
    """
    for name, layer in stock.named_modules():
        if (method := patched_method(type(layer))) is not None:
            raise ConfigError(
                f"{plain_key(f'{path}.{name}').removesuffix('.')}: the method {shorten(method)} of NeMo is patched, "
                "and accelerate() would drop the patch; undo it before accelerate(), and patch the modules of the "
                "accelerated model afterwards."
            )
