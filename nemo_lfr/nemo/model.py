"""NeMo model of the codec: `LFRCodecModel`, a drop-in for `AudioCodecModel`.

Its encoder, quantizer and decoder are modules of `nemo_lfr.modules`. To use it, change one import:

    from nemo_lfr import AudioCodecModel
    model = AudioCodecModel.from_pretrained("nvidia/low-frame-rate-speech-codec-22khz")

Saved files name only NeMo's classes, so NeMo can open them without this package.
"""

import copy
import os
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_lfr.checkpoint import (
    NEMO_MODEL,
    PARTS,
    Parts,
    build_part,
    build_parts,
    codec_values,
    load_parts,
    mark_from_file,
    nemo_config,
    read_config,
    sections_from_file,
)
from nemo_lfr.checkpoint.names import DIRECTION, plain_key, plain_keys, spell_as, unwrapped
from nemo_lfr.codec.ambient import building_state
from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.devices import choose_device
from nemo_lfr.codec.torch_backend import TorchBackend
from nemo_lfr.errors import (
    NEMO_PACKAGES,
    AudioError,
    CheckpointError,
    ConfigError,
    MissingExtraError,
    install_command,
    shorten,
)
from nemo_lfr.io.atomic import writing_folder
from nemo_lfr.io.locate import expand_home, locate_checkpoint, looks_local
from nemo_lfr.pretrained import ALIASES, find_checkpoint

try:
    import wrapt
    from lightning.pytorch import Trainer
    from nemo.collections.tts.models.audio_codec import AudioCodecModel as NeMoAudioCodecModel
    from nemo.core.classes import common
    from nemo.core.classes.common import PretrainedModelInfo
    from nemo.utils import logging, model_utils

    from nemo_lfr.nemo import neural_types as nemo_interface  # noqa: F401  gives the modules NeMo's types
    from nemo_lfr.nemo.training import DISCRIMINATOR, WAVLM, TrainingSteps
    from nemo_lfr.training import discriminators, losses
    from nemo_lfr.training.components import import_components, register_component, registered_components
except Exception as error:  # importing NeMo can raise any exception
    raise MissingExtraError(
        f"the NeMo integration needs NeMo, which cannot be imported ({error}): {install_command(*NEMO_PACKAGES)}. "
        "Encoding and decoding need no NeMo: nemo_lfr.load()."
    ) from error

# Configs may name modules of this package; NeMo builds a `_target_` only if its prefix is in this list.
if "nemo_lfr." not in common.ALLOWED_TARGET_PREFIXES:
    common.ALLOWED_TARGET_PREFIXES.append("nemo_lfr.")

# Modules that `restore_from` passes to the constructor, which then skips a random initialization.
_READ_PARTS: ContextVar[Parts | None] = ContextVar("parts", default=None)
_IDENTITY = {"_target_": "torch.nn.Identity"}
_BUILT_IN = {*discriminators.BUILT_IN, *losses.BUILT_IN}
_ANY_LOSS = {"_target_": next(iter(losses.GENERATOR_LOSSES))}
_SMALLEST_QUANTIZER = {
    "_target_": "nemo.collections.tts.modules.audio_codec_modules.FiniteScalarQuantizer",
    "num_levels": [2],
}


class LFRCodecModel(TrainingSteps):
    """NeMo model of the codec, a drop-in for NeMo's `AudioCodecModel`.

    It supports codecs that consist of a HiFi-GAN encoder, FSQ and a HiFi-GAN decoder.

    `encode`, `decode` and `forward` compute no gradients, accept positional arguments, move their inputs to the
    model's device and accept audio of any length. Every utterance gets the tokens that it gets without a batch.
    `encode_audio`, `quantize`, `dequantize` and `decode_audio` behave as in NeMo and support gradients.

    Args:
        cfg: model config, whose `_target_` values may name classes of NeMo or of this package.
        trainer: Lightning trainer, as in NeMo.

    Raises:
        ConfigError: for a config that is not of this codec family, or with a component of the user's own that cannot
            be imported. The message names the key.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        from_file = sections_from_file(cfg)  # NeMo's conversion loses the marks
        cfg = model_utils.maybe_update_config_version(model_utils.convert_model_config_to_dict_config(cfg))
        values = _checked_values(cfg)
        parts = _READ_PARTS.get() or build_parts(values)
        cfg = copy.deepcopy(cfg)
        for key in cfg if self._is_model_being_restored() else from_file:
            mark_from_file(cfg._get_node(key))
        import_components(cfg, built_in=_BUILT_IN)
        with open_dict(cfg):
            cfg.target = NEMO_MODEL
            for name in PARTS:
                cfg[name] = nemo_config(values[name])
        # NeMo's constructor builds the losses and the data loaders. Minimal modules keep it cheap; they are replaced
        # below.
        lean = copy.deepcopy(cfg)
        with open_dict(lean):
            lean.audio_encoder, lean.audio_decoder = dict(_IDENTITY), dict(_IDENTITY)
            lean.discriminator = None
            for key in ("generator_loss", "discriminator_loss"):
                if key in lean and _target_of(lean[key]) not in _BUILT_IN:  # the user's own; NeMo would refuse it
                    lean[key] = dict(_ANY_LOSS)
            lean.commit_loss_scale = 0.0
            lean.vector_quantizer = dict(_SMALLEST_QUANTIZER)
        with building_state():
            super().__init__(cfg=lean, trainer=trainer)
        self.audio_encoder, self.vector_quantizer, self.audio_decoder = parts.encoder, parts.quantizer, parts.decoder
        self._unbuilt_discriminator = {}
        self._losses = None
        self._metrics = None
        self._average = None
        self._codebook_use = None
        self._is_random = _READ_PARTS.get() is None
        self._restored_from = None
        self.cfg = cfg

    # Copies have no trainer and an unwrapped `training_step`: NeMo wraps each instance's `training_step` in a proxy
    # that cannot be copied or pickled.

    def __copy__(self) -> "LFRCodecModel":
        """Return a model that shares the weights of this one.

        Modules of the copy can be replaced without changing this model.
        """
        state = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(self).items()}
        state.pop("_codec", None)
        return self._with_state(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LFRCodecModel":
        """Return an independent model that shares only the data loaders."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        shared = ("_train_dl", "_validation_dl", "_test_dl")
        for key, value in vars(self).items():
            if key in ("_trainer", "_fabric"):
                other.__dict__[key] = None
            elif key not in ("training_step", "_codec"):
                other.__dict__[key] = value if key in shared else copy.deepcopy(value, memo)
        return other

    def __reduce__(self) -> Any:
        """Pickle the config and the weights, because torch cannot pickle weight norm.

        Optimizers, the moving average of the weights and attributes of a subclass are not included.
        """
        modes = {plain_key(name): module.training for name, module in self.named_modules()}
        gradients = {plain_key(name): parameter.requires_grad for name, parameter in self.named_parameters()}
        kept = {"_is_random": self._is_random, "_restored_from": self._restored_from}
        has_discriminator = hasattr(self, "discriminator")
        components = registered_components(self.cfg)
        arguments = (type(self), self.cfg, self.state_dict(), modes, gradients, has_discriminator, kept, components)
        return _unpickled, arguments

    def _with_state(self, state: dict[str, Any]) -> "LFRCodecModel":
        other = type(self).__new__(type(self))
        other.__dict__.update(state, _trainer=None, _fabric=None)
        other.__dict__.pop("training_step", None)
        return other

    # Inference

    @property
    def codec(self) -> Codec[torch.Tensor]:
        """Return a standalone `Codec` that uses this model's modules.

        The object is cached until a module, the sample rate or the device changes.
        """
        encoder, quantizer, decoder = (unwrapped(getattr(self, name)) for name in PARTS)
        made_of = (encoder, quantizer, decoder, self.sample_rate, next(decoder.parameters()).device)
        kept, codec = self.__dict__.get("_codec", (None, None))
        # Return the same object while the modules are the same: only streams of one codec can be batched.
        if kept != made_of:
            codec = Codec(TorchBackend(encoder, quantizer, decoder, self.sample_rate))  # type: ignore[arg-type]
            self.__dict__["_codec"] = made_of, codec
        return codec

    def encode(
        self, audio: torch.Tensor, audio_len: torch.Tensor, sample_rate: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode audio to tokens; see `Codec.encode`.

        Audio at another sample rate is resampled with soxr, because NeMo's resampler takes minutes for rates such as
        22,049 Hz.

        Args:
            audio: samples in [-1, 1], shape [B, T_audio].
            audio_len: valid samples of each example, shape [B].
            sample_rate: sample rate of `audio`, Hz; the codec's own by default.

        Returns:
            Tokens [B, C, T_encoded] and their lengths in frames [B].

        Raises:
            AudioError: for audio that cannot be encoded, or an invalid sample rate.
        """
        return self.codec.encode(audio, audio_len, sample_rate)

    def decode(
        self, tokens: torch.Tensor, tokens_len: torch.Tensor, audio_len: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode tokens to audio; see `Codec.decode`.

        Args:
            tokens: ids in [0, codebook_size), shape [B, C, T_encoded].
            tokens_len: valid frames of each example, shape [B].
            audio_len: samples to return for each example, shape [B]; complete frames by default.

        Returns:
            Audio [B, T_audio] and its lengths in samples [B].

        Raises:
            TokensError: for tokens that cannot be decoded.
        """
        return self.codec.decode(tokens, tokens_len, audio_len)

    def forward(
        self, audio: torch.Tensor, audio_len: torch.Tensor, sample_rate: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode and decode audio.

        Args:
            audio: samples in [-1, 1], shape [B, T_audio].
            audio_len: valid samples of each example, shape [B].
            sample_rate: sample rate of `audio`, Hz; the codec's own by default.

        Returns:
            The reconstruction [B, T_audio] at the codec's sample rate, with the duration of the input, and its lengths
            in samples [B].

        Raises:
            AudioError: for audio that cannot be encoded, or an invalid sample rate.
        """
        codec = self.codec
        audio, audio_len = codec.resample(audio, audio_len, sample_rate)
        tokens, tokens_len = codec.encode(audio, audio_len)
        return codec.decode(tokens, tokens_len, audio_len)

    def encode_audio(
        self, audio: torch.Tensor, audio_len: torch.Tensor, sample_rate: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the encoder's output, with gradients.

        Args:
            audio: samples in [-1, 1], shape [B, T_audio].
            audio_len: valid samples of each example, shape [B].
            sample_rate: sample rate of `audio`, Hz; the codec's own by default.

        Returns:
            Encoded frames [B, D, T_encoded] and their lengths in frames [B].

        Raises:
            AudioError: for an invalid sample rate, or if audio that requires a gradient would have to be resampled.
        """
        if sample_rate is not None:
            audio, audio_len = self._resampled(audio, audio_len, sample_rate)
        return super().encode_audio(audio=audio, audio_len=audio_len)

    def _resampled(
        self, audio: torch.Tensor, audio_len: torch.Tensor, sample_rate: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        resampled, resampled_len = self.codec.resample(audio, audio_len, sample_rate)
        if sample_rate == self.sample_rate:
            return audio, audio_len
        if torch.is_grad_enabled() and audio.requires_grad:
            raise AudioError(
                f"audio at {sample_rate} Hz carries a gradient, which resampling would cut; resample it to "
                f"{self.sample_rate} Hz first, or pass audio.detach()."
            )
        dtype = audio.dtype if audio.is_floating_point() else torch.float32
        return resampled.to(audio.device, dtype), resampled_len.to(audio_len.device, audio_len.dtype)

    def pad_audio(
        self, audio: torch.Tensor, audio_len: torch.Tensor, samples_per_frame: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad audio with zeros to complete frames.

        Unlike NeMo, it also sets the samples after each example's end to zero, so that the content of a batch's
        padding has no effect.

        Args:
            audio: samples, shape [B, T_audio].
            audio_len: valid samples of each example, shape [B].
            samples_per_frame: samples of one frame.

        Returns:
            Padded audio [B, T_audio] and its lengths in samples [B].
        """
        positions = torch.arange(audio.shape[1], device=audio.device)
        audio = audio.masked_fill(positions >= audio_len[:, None], 0)
        return super().pad_audio(audio, audio_len, samples_per_frame)

    # State dicts

    def __delattr__(self, name: str) -> None:
        """Delete an attribute.

        Deleting `discriminator`, which callers do to free memory, also discards the discriminator weights that are not
        in use.
        """
        super().__delattr__(name)
        if name == "discriminator":
            self._unbuilt_discriminator = {}

    def state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Return the state dict without WavLM, and with discriminators not yet built.

        Names and weight norm match NeMo's, even if modules are wrapped by `torch.compile` or their weight norm was
        removed.
        """
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        own = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
        plain = plain_keys(own.items(), type(self).__name__)
        plain = spell_as(_stock_names(plain), plain) | self._unbuilt_discriminator
        state.update({prefix + key: value for key, value in plain.items() if not _is_wavlm(key)})
        if (metadata := getattr(state, "_metadata", None)) is not None:
            state._metadata = type(metadata)((plain_key(key), value) for key, value in metadata.items())
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict saved by any NeMo version.

        Prefixes that `torch.compile` and `DistributedDataParallel` add to names are removed. `strict` applies to the
        encoder, quantizer and decoder. Tensors that vary between NeMo versions and configs (discriminators, WavLM,
        windows and filters of the losses) are loaded if they fit.

        Args:
            state_dict: tensors by name.
            strict: whether to raise if weights are missing or unknown.
            assign: whether to use the tensors themselves instead of copying their values.

        Returns:
            The missing and unexpected keys, as in `torch.nn.Module.load_state_dict`.

        Raises:
            CheckpointError: if `state_dict` is not a state dict, has other shapes or FSQ levels than the model, or,
                with `strict`, lacks weights or has unknown ones.
        """
        _check_state_dict(state_dict)
        own = super(NeMoAudioCodecModel, self).state_dict()
        shapes = {key: value.shape for key, value in own.items()}
        state_dict = _spelled_for(own, state_dict)
        other = [key for key, value in state_dict.items() if value.shape != shapes.get(key, value.shape)]
        if judged := [key for key in other if key.partition(".")[0] in PARTS]:
            raise CheckpointError(
                f"the state dict is of another codec: {len(judged)} weights have other shapes, first {judged[0]}: "
                f"{list(state_dict[judged[0]].shape)} instead of {list(shapes[judged[0]])}."
            )
        levels = [key for key, value in own.items() if key.startswith("vector_quantizer.")]
        for key in levels:
            if key in state_dict and not torch.equal(state_dict[key].to(own[key]), own[key]):
                raise CheckpointError(
                    f"the state dict is of another codec: {key} is {shorten(state_dict[key].flatten().tolist())}, the "
                    f"model's is {shorten(own[key].flatten().tolist())}."
                )
        self._is_random = False
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
                    f"the state dict {what} weights, {len(judged)} in all, first {judged[:5]}; "
                    "pass strict=False to load what fits."
                )
        return result

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Rename weights to match the modules, then load them.

        Torch calls this, also when the model is a submodule of another one.
        """
        theirs = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        own = super(NeMoAudioCodecModel, self).state_dict()
        state_dict.update({prefix + key: value for key, value in _spelled_for(own, theirs).items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # Files

    @classmethod
    def restore_from(
        cls,
        restore_path: str | os.PathLike[str],
        override_config_path: Any = None,
        map_location: torch.device | str | None = None,
        strict: bool = True,
        return_config: bool = False,
        save_restore_connector: Any = None,
        trainer: Trainer | None = None,
        validate_access_integrity: bool = True,
    ) -> Any:
        """Restore a model from a `.nemo` file of any NeMo version.

        See `nemo_lfr.checkpoint` for the accepted files.

        Args:
            restore_path: `.nemo` file, folder of an unpacked `.nemo`, or folder that contains one `.nemo`.
            override_config_path: YAML file or config to use instead of the file's config.
            map_location: device of the model; a GPU if available, else the CPU.
            strict: whether every weight of the encoder, quantizer and decoder must be present.
            return_config: whether to return only the file's config.
            save_restore_connector: NeMo's connector; one with an extracted folder is passed on to NeMo.
            trainer: Lightning trainer, as in NeMo.
            validate_access_integrity: accepted for compatibility with NeMo; not used.

        Returns:
            The model in evaluation mode, or its config with `return_config`.

        Raises:
            CheckpointError: if the file cannot be read. The message names the file, the problem and a remedy.
        """
        if getattr(save_restore_connector, "model_extracted_dir", None) is not None:
            return _stock(cls, "restore_from")(
                str(restore_path),
                override_config_path=override_config_path,
                map_location=map_location,
                strict=strict,
                return_config=return_config,
                save_restore_connector=save_restore_connector,
                trainer=trainer,
                validate_access_integrity=validate_access_integrity,
            )
        path = locate_checkpoint(restore_path).absolute()
        config = read_config(path) if override_config_path is None else _override_config(override_config_path)
        if return_config:
            return config
        with building_state(torch.device("cpu")):
            return cls._built_from(path, config, map_location, strict, save_restore_connector, trainer)

    @classmethod
    def _built_from(
        cls,
        path: Path,
        config: DictConfig,
        map_location: Any,
        strict: bool,
        save_restore_connector: Any,
        trainer: Trainer | None,
    ) -> Any:
        others = DISCRIMINATOR if config.get("discriminator") else None
        parts, rest = load_parts(path, config, strict=strict, others=others)
        read_parts = _READ_PARTS.set(parts)
        try:
            # With this flag, NeMo does not open the training data that the config names.
            cls._set_model_restore_state(is_being_restored=True)
            model = cls(cfg=config, trainer=trainer)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error
        finally:
            cls._set_model_restore_state(is_being_restored=False)
            _READ_PARTS.reset(read_parts)
        model._unbuilt_discriminator = {key: value for key, value in rest.items() if WAVLM not in key}
        model._restored_from = path
        if save_restore_connector is not None:
            model._save_restore_connector = save_restore_connector
        logging.info("%s restored from %s", cls.__name__, path)
        return model.to(choose_device(map_location)).eval()

    @classmethod
    def from_pretrained(
        cls,
        model_name: str,
        refresh_cache: bool = False,
        override_config_path: Any = None,
        map_location: torch.device | str | None = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Trainer | None = None,
        save_restore_connector: Any = None,
        return_model_file: bool | None = False,
    ) -> Any:
        """Restore a published checkpoint by its Hub id or by a name of NeMo's list.

        `list_available_models()` returns the names. A downloaded file is cached and then used without network access.
        Other arguments are those of `restore_from`.

        Args:
            model_name: Hub id, name of a published model, or path of a file.
            refresh_cache: whether to download the file again.
            override_config_path: YAML file or config to use instead of the file's config.
            map_location: device of the model; a GPU if available, else the CPU.
            strict: whether every weight of the encoder, quantizer and decoder must be present.
            return_config: whether to return only the file's config.
            trainer: Lightning trainer, as in NeMo.
            save_restore_connector: NeMo's connector.
            return_model_file: whether to return only the path of the downloaded file.

        Returns:
            The model in evaluation mode, its config with `return_config`, or the path of its file with
            `return_model_file`.

        Raises:
            CheckpointError: if the file cannot be downloaded or read.
        """
        name = ALIASES.get(model_name, model_name)
        if "/" not in name and not looks_local(name):  # a model of NVIDIA's NGC catalog
            return _stock(cls, "from_pretrained")(
                model_name,
                refresh_cache=refresh_cache,
                override_config_path=override_config_path,
                map_location=map_location,
                strict=strict,
                return_config=return_config,
                trainer=trainer,
                save_restore_connector=save_restore_connector,
                return_model_file=return_model_file,
            )
        path = find_checkpoint(name, refresh=refresh_cache)
        if return_model_file:
            return str(path)
        return cls.restore_from(
            path,
            override_config_path=override_config_path,
            map_location=map_location,
            strict=strict,
            return_config=return_config,
            save_restore_connector=save_restore_connector,
            trainer=trainer,
        )

    @classmethod
    def list_available_models(cls) -> list[PretrainedModelInfo]:
        """Return NeMo's published models and the aliases that the model card uses."""
        ours = [
            PretrainedModelInfo(
                pretrained_model_name=alias,
                location=f"https://huggingface.co/{name}/resolve/main/{name.partition('/')[2]}.nemo",
                description=f"Low Frame-rate Speech Codec; the model card is at https://huggingface.co/{name}",
                class_=cls,
            )
            for alias, name in ALIASES.items()
        ]
        return [*super().list_available_models(), *ours]

    def save_to(self, save_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write a `.nemo` file atomically: a crash leaves an existing file intact.

        Args:
            save_path: path of the file to write.
            *args: positional arguments passed on to NeMo.
            **kwargs: keyword arguments passed on to NeMo.

        Raises:
            CheckpointError: if the file cannot be written.
        """
        if not isinstance(save_path, str | os.PathLike) or not os.fspath(save_path):
            raise CheckpointError(f"save_path is {shorten(repr(save_path))}; pass the path of a .nemo file to write.")
        path = expand_home(save_path).absolute()
        if path.is_dir():
            raise CheckpointError(f"{path}: is a folder; pass the path of a .nemo file to write.")
        try:
            self._save_aside(path, *args, **kwargs)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror or error}).") from error

    def _save_aside(self, path: Path, *args: Any, **kwargs: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing_folder(path.parent) as folder:
            aside = Path(folder, path.name)
            config = self.cfg
            try:
                self.cfg = _without_folders(config)
                with self.averaged():
                    super().save_to(str(aside), *args, **kwargs)
            finally:
                self.cfg = config
            if aside.exists():  # ranks other than 0 write nothing
                with open(aside, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(aside, path)


AudioCodecModel = LFRCodecModel


def accelerate(model: NeMoAudioCodecModel) -> NeMoAudioCodecModel:
    """Replace the modules of a loaded NeMo `AudioCodecModel` with this package's.

    Weights are kept: parameters stay the same objects, with their dtype, device and `requires_grad`. Wrappers that
    `torch.compile` or `DistributedDataParallel` put around these modules are removed.

    Args:
        model: model to change in place. A plain `AudioCodecModel` becomes an `LFRCodecModel`; an instance of a
            subclass keeps its class.

    Returns:
        The same object.

    Raises:
        ConfigError: if the model is not an `AudioCodecModel` of this codec family. The model is then unchanged.
    """
    inner = unwrapped(model) if isinstance(model, torch.nn.Module) else model
    if isinstance(inner, LFRCodecModel):
        return model
    if not isinstance(inner, NeMoAudioCodecModel):
        raise ConfigError(f"{type(model).__name__} is no AudioCodecModel of NeMo's; accelerate takes one, loaded.")
    # Everything that can fail runs before the first change to the model.
    values = _checked_values(inner.cfg)
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
        # Training builds this package's discriminators; keep their weights until then.
        inner._unbuilt_discriminator = {plain_key(key): value for key, value in state.items() if WAVLM not in key}
        if has_discriminator:
            inner.discriminator = None
        inner._losses = None
        inner._metrics = None
        inner._average = None
        inner._codebook_use = None
        inner._is_random = False
        inner._restored_from = None
        # Renew NeMo's proxy around this instance's `training_step`. Copies have no proxy; a function that a caller set
        # is kept.
        if isinstance(inner.__dict__.get("training_step"), wrapt.ObjectProxy):
            del inner.training_step
        if "training_step" not in inner.__dict__:
            inner.training_step = model_utils.wrap_training_step(inner.training_step)
    return model


def _replacement(name: str, config: Mapping[str, Any], stock: Any) -> torch.nn.Module:
    """Build this package's module around the parameters of a NeMo module.

    Raises:
        ConfigError: if the NeMo module is not the one that the config describes.
    """
    if not isinstance(stock, torch.nn.Module):
        raise ConfigError(f"the model's {name} is {shorten(repr(stock))}, not a module; load the model again.")
    stock = unwrapped(stock)
    tensors = plain_keys(stock.state_dict(keep_vars=True).items(), name)
    needs_gradient = {key: value.requires_grad for key, value in tensors.items()}
    if any(value.is_meta for value in tensors.values()):
        raise ConfigError(f"{name} is on the meta device, which holds no weights; load the model again.")
    has_norm = any(key.endswith((DIRECTION, ".weight_v")) for key in tensors)
    with torch.device("meta"):
        part = build_part(dict(config), weight_norm=has_norm).requires_grad_(False)
    levels = build_part(dict(config)).state_dict() if name == "vector_quantizer" else {}
    differ = [key for key, value in levels.items() if key in tensors and not torch.equal(tensors[key].cpu(), value)]
    try:
        if differ:
            raise ConfigError(f"{differ[0]} is {shorten(tensors[differ[0]].flatten().tolist())}")
        part.load_state_dict(tensors, assign=True)
    except (RuntimeError, ConfigError) as error:
        reason = shorten(" ".join(str(error).split()), 200)
        raise ConfigError(f"{name} is not the module that the model's config describes: {reason}") from error
    finally:
        for key, value in tensors.items():
            if value.requires_grad != needs_gradient[key]:
                value.requires_grad_(needs_gradient[key])
    modes = {plain_key(path): module.training for path, module in stock.named_modules()}
    for path, module in part.named_modules():
        module.training = modes.get(path, stock.training)
    return part


def _unpickled(
    cls: type[LFRCodecModel],
    cfg: DictConfig,
    state: dict[str, torch.Tensor],
    modes: dict[str, bool],
    gradients: dict[str, bool],
    has_discriminator: bool,
    attributes: dict[str, Any],
    components: dict[str, type[torch.nn.Module]],
) -> LFRCodecModel:
    """Rebuild a model from the values that `LFRCodecModel.__reduce__` returned.

    The model is on the device of its weights.
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
    model.__dict__.update(attributes)
    return model


def _check_state_dict(state_dict: Any) -> None:
    """Raise an error unless the argument maps names to tensors.

    Raises:
        CheckpointError: if it does not. The message says what it is instead.
    """
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(
            f"the state dict is {shorten(type(state_dict).__name__)}; pass names with their tensors."
        )
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise CheckpointError(
                f"the state dict has {shorten(repr(key))} for a name; pass names with their tensors."
            )
        if not isinstance(value, torch.Tensor) or value.is_meta:
            kind = "a meta tensor, without values" if isinstance(value, torch.Tensor) else type(value).__name__
            hint = "; pass what is under that name" if key == "state_dict" else ""
            raise CheckpointError(f"the state dict holds no tensor for {shorten(key)}, but {shorten(kind)}{hint}.")


def _is_wavlm(key: str) -> bool:
    return key.startswith(DISCRIMINATOR) and WAVLM in key


def _stock_names(state: Mapping[str, Any]) -> set[str]:
    """Return the names that NeMo uses for weight-normed convolutions of a state dict."""
    stems = [key.removesuffix(".weight") for key in state if key.endswith(".conv.weight")]
    return {stem + DIRECTION for stem in stems if stem.partition(".")[0] in PARTS}


def _spelled_for(own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the weights of a state dict to match a model's modules and wrappers."""
    names = {plain_key(key): key for key in own}
    plain = plain_keys(state_dict.items(), "the state dict")
    return {names.get(key, key): value for key, value in spell_as(names, plain).items()}


def _stock(cls: type[LFRCodecModel], name: str) -> Any:
    """Return NeMo's class method, bound to `cls`.

    With `super()`, the frame of the calling method would contain `__class__`, and Lightning's `save_hyperparameters`
    would mistake the method for a constructor.
    """
    return getattr(NeMoAudioCodecModel, name).__func__.__get__(cls)


def _checked_values(cfg: DictConfig) -> dict[str, Any]:
    """Return `codec_values` of a config, after checking its losses.

    Raises:
        ConfigError: for a loss that would open a file or access the network.
    """
    for key in ("use_scl_loss", "use_slm_loss"):
        if cfg.get(key):
            raise ConfigError(f"{key} is set; nemo_lfr does not train codecs with it. Use NeMo's own AudioCodecModel.")
    return codec_values(cfg)


def _target_of(section: Any) -> str | None:
    return section.get("_target_") if isinstance(section, Mapping | DictConfig) else None


def _without_folders(config: DictConfig) -> DictConfig:
    """Return a copy of a config without the folders of the training machine.

    File names in data sections are kept, absolute paths are not.
    """

    def shortened(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shortened(item) for key, item in value.items()}
        if isinstance(value, list):
            return [shortened(item) for item in value]
        return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value

    config = copy.deepcopy(config)
    with open_dict(config):
        for section in ("train_ds", "validation_ds", "test_ds", "log_config"):
            if config.get(section) is not None:
                config[section] = shortened(OmegaConf.to_container(config[section], resolve=False))
    return config


def _override_config(source: Any) -> DictConfig:
    """Load the config that replaces a file's own, or its `model` section.

    Raises:
        ConfigError: if it is not a mapping, or names a component that cannot be imported.
    """
    config = source if OmegaConf.is_config(source) else OmegaConf.load(source)
    if isinstance(config, DictConfig):
        import_components(config.get("model") or config, built_in=_BUILT_IN)
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    if not isinstance(config, DictConfig):
        raise ConfigError("the config given is a list, not a mapping.")
    return config.model if "model" in config else config
