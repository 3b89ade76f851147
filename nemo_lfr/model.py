"""The codec as NeMo sees it: `LFRCodecModel`, an `AudioCodecModel` whose parts are the modules of `nemo_lfr.codec`.

    from nemo_lfr import AudioCodecModel                  # the one line that changes
    model = AudioCodecModel.from_pretrained("nvidia/low-frame-rate-speech-codec-22khz")

What it saves names NeMo's classes only, so that a NeMo without this package opens it.
"""

import copy
import os
import tempfile
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_lfr.audio import check_rate
from nemo_lfr.checkpoint import (
    NEMO_MODEL,
    PARTS,
    Parts,
    build_parts,
    codec_values,
    load_parts,
    nemo_config,
    read_config,
)
from nemo_lfr.codec.codec import Codec
from nemo_lfr.errors import CheckpointError, ConfigError, MissingExtraError
from nemo_lfr.pretrained import ALIASES, choose_device, find_checkpoint

try:
    from lightning.pytorch import Trainer
    from nemo.collections.tts.models.audio_codec import AudioCodecModel as NeMoAudioCodecModel
    from nemo.core.classes import common
    from nemo.core.classes.common import PretrainedModelInfo
    from nemo.utils import logging, model_utils

    from nemo_lfr.training.steps import DISCRIMINATOR, WAVLM, TrainingSteps
except ImportError as error:
    raise MissingExtraError(
        f'NeMo\'s door needs NeMo, which cannot be imported ({error}); run: pip install "nemo-lfr[nemo]". '
        "Encoding and decoding need no NeMo: nemo_lfr.load()."
    ) from error

# Configs may name this package's modules: NeMo builds a `_target_` only if it starts with a prefix listed here.
if "nemo_lfr." not in common.ALLOWED_TARGET_PREFIXES:
    common.ALLOWED_TARGET_PREFIXES.append("nemo_lfr.")

# Parts that `restore_from` has read, for the constructor it calls: nothing is initialised only to be overwritten.
_READ_PARTS: ContextVar[Parts | None] = ContextVar("parts", default=None)
_IDENTITY = {"_target_": "torch.nn.Identity"}
_SMALLEST_QUANTIZER = {
    "_target_": "nemo.collections.tts.modules.audio_codec_modules.FiniteScalarQuantizer",
    "num_levels": [2],
}


class LFRCodecModel(TrainingSteps):
    """Drop-in for NeMo's `AudioCodecModel`, for the codecs whose parts are HiFi-GAN encoders, decoders and FSQ.

    `encode`, `decode` and `forward` run without a graph, take positional arguments, move their inputs to the model,
    take audio of any length, and give each utterance the tokens it has alone. `encode_audio`, `quantize`,
    `dequantize` and `decode_audio` are NeMo's and keep the graph.

    Args:
        cfg: a model config; its parts may be named by NeMo's classes or by ours.
        trainer: as in NeMo.

    Raises:
        ConfigError: for a config that is not of this codec family, naming the key.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        cfg = model_utils.maybe_update_config_version(model_utils.convert_model_config_to_dict_config(cfg))
        values = _checked_values(cfg)
        parts = _READ_PARTS.get() or build_parts(values)
        cfg = copy.deepcopy(cfg)
        with open_dict(cfg):
            cfg.target = NEMO_MODEL
            for name in PARTS:
                cfg[name] = nemo_config(values[name])
        # NeMo's constructor builds the losses and the data; the parts are ours.
        lean = copy.deepcopy(cfg)
        with open_dict(lean):
            lean.audio_encoder, lean.audio_decoder = dict(_IDENTITY), dict(_IDENTITY)
            lean.discriminator = None
            lean.commit_loss_scale = 0.0
            lean.vector_quantizer = dict(_SMALLEST_QUANTIZER)
        super().__init__(cfg=lean, trainer=trainer)
        self.audio_encoder, self.vector_quantizer, self.audio_decoder = parts.encoder, parts.quantizer, parts.decoder
        self._unbuilt_discriminator = {}
        self._losses = None
        self._average = None
        self._codebook_use = None
        self._is_random = _READ_PARTS.get() is None
        self._restored_from = None
        self.cfg = cfg

    def __deepcopy__(self, memo: dict[int, Any]) -> "LFRCodecModel":
        """A model of its own, without a trainer, that reads the same data.

        NeMo hangs a proxy that cannot be copied around each instance's `training_step`; the copy has the plain method.
        """
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        for key, value in vars(self).items():
            if key in ("_train_dl", "_validation_dl", "_test_dl"):
                other.__dict__[key] = value
            elif key in ("_trainer", "_fabric"):
                other.__dict__[key] = None
            elif key != "training_step":
                other.__dict__[key] = copy.deepcopy(value, memo)
        return other

    # Inference.

    @property
    def codec(self) -> Codec:
        """The light door on this model's own modules."""
        return Codec(self.audio_encoder, self.vector_quantizer, self.audio_decoder, self.sample_rate)

    def encode(
        self, audio: torch.Tensor, audio_len: torch.Tensor, sample_rate: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Audio [B, T_audio] to tokens [B, C, T_encoded] and their lengths; see `Codec.encode`.

        Other sample rates are resampled as NeMo does.

        Raises:
            AudioError: for audio that cannot be encoded.
        """
        if sample_rate and sample_rate != self.sample_rate:
            audio, audio_len = self._resampled(audio, audio_len, sample_rate)
        return self.codec.encode(audio, audio_len)

    def decode(
        self, tokens: torch.Tensor, tokens_len: torch.Tensor, audio_len: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, C, T_encoded] to audio [B, T_audio] and its lengths: whole frames, or `audio_len`.

        Raises:
            TokensError: for tokens that cannot be decoded.
        """
        return self.codec.decode(tokens, tokens_len, audio_len)

    def forward(
        self, audio: torch.Tensor, audio_len: torch.Tensor, sample_rate: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode and decode: audio [B, T_audio] to its reconstruction, of the same length."""
        if sample_rate and sample_rate != self.sample_rate:
            audio, audio_len = self._resampled(audio, audio_len, sample_rate)
        tokens, tokens_len = self.codec.encode(audio, audio_len)
        return self.codec.decode(tokens, tokens_len, audio_len)

    def _resampled(self, audio: Any, audio_len: Any, sample_rate: int) -> tuple[torch.Tensor, torch.Tensor]:
        from nemo.collections.tts.parts.utils.tts_dataset_utils import resample_batch

        check_rate(sample_rate)
        return resample_batch(
            audio=torch.as_tensor(audio),
            audio_len=torch.as_tensor(audio_len),
            input_sample_rate=sample_rate,
            output_sample_rate=self.sample_rate,
        )

    def pad_audio(
        self, audio: torch.Tensor, audio_len: torch.Tensor, samples_per_frame: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """NeMo's padding to whole frames, but silent after each clip's end, whatever the batch holds there."""
        positions = torch.arange(audio.shape[1], device=audio.device)
        audio = audio.masked_fill(positions >= audio_len[:, None], 0)
        return super().pad_audio(audio, audio_len, samples_per_frame)

    # State.

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Everything but WavLM; discriminators that are not built yet included."""
        state = super().state_dict(*args, **kwargs)
        for key in [key for key in state if key.startswith(DISCRIMINATOR) and WAVLM in key]:
            del state[key]
        state.update(self._unbuilt_discriminator)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights of any NeMo version.

        `strict` judges the encoder, quantizer and decoder; what NeMo versions and configs differ in (discriminators,
        WavLM, windows and filters of the losses) is loaded where it fits.

        Raises:
            CheckpointError: if weights of the codec have other shapes; if `strict`, and they are incomplete or others.
        """
        self._is_random = False
        shapes = {key: value.shape for key, value in super(NeMoAudioCodecModel, self).state_dict().items()}
        other = [key for key, value in state_dict.items() if value.shape != shapes.get(key, value.shape)]
        if judged := [key for key in other if key.partition(".")[0] in PARTS]:
            raise CheckpointError(
                f"the state dict is of another codec: {len(judged)} weights have other shapes, first {judged[0]}: "
                f"{list(state_dict[judged[0]].shape)} instead of {list(shapes[judged[0]])}."
            )
        state = {key: value for key, value in state_dict.items() if WAVLM not in key and key not in other}
        if self.discriminator is None:
            discriminator = {key: value for key, value in state.items() if key.startswith(DISCRIMINATOR)}
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

    # Files.

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
        """Restore a `.nemo` of any NeMo version; see `nemo_lfr.checkpoint` for what is accepted.

        Args:
            restore_path: the file.
            override_config_path: a YAML file or a config to use instead of the file's.
            map_location: device; a GPU if there is one, else the CPU.
            strict: every weight of the codec's three parts must be there.
            return_config: return the file's config only.
            save_restore_connector: NeMo's hook; one with an extracted folder is passed on to NeMo.
            trainer: as in NeMo.
            validate_access_integrity: as in NeMo; not used.

        Raises:
            CheckpointError: naming the file, what was wrong, and what to do.
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
        path = Path(restore_path).expanduser().absolute()
        config = read_config(path) if override_config_path is None else _override_config(override_config_path)
        if return_config:
            return config
        others = DISCRIMINATOR if config.get("discriminator") else None
        parts, rest = load_parts(path, config, strict=strict, others=others)
        read_parts = _READ_PARTS.set(parts)
        try:
            # While this is set, NeMo does not open the training data that the config names.
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
        """Restore a published checkpoint by its Hub id, or by a name from `list_available_models()`.

        Once downloaded it is used from the cache, without the network. Arguments as in `restore_from`.

        Raises:
            CheckpointError: if it cannot be had or read.
        """
        name = ALIASES.get(model_name, model_name)
        if "/" not in name:  # NVIDIA's NGC catalogue
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
        """NeMo's list, and the names that the model card and its tutorial use."""
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
        """Write a `.nemo` aside and rename it into place: a crash leaves the old file whole."""
        path = Path(save_path).expanduser().absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
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
    """Put our parts, with the same weights, into a stock `AudioCodecModel` that other code already holds.

    Args:
        model: changed in place. A plain `AudioCodecModel` becomes an `LFRCodecModel`; of a subclass only the parts
            are replaced.

    Returns:
        The same object.

    Raises:
        ConfigError: if it is no such model, or not of this codec family.
    """
    if isinstance(model, LFRCodecModel):
        return model
    if not isinstance(model, NeMoAudioCodecModel):
        raise ConfigError(f"{type(model).__name__} is no AudioCodecModel of NeMo's; accelerate takes one, loaded.")
    parts = build_parts(_checked_values(model.cfg))
    reference = next(model.audio_decoder.parameters())
    for name, part in parts.named().items():
        stock = getattr(model, name)
        part.load_state_dict(stock.state_dict())
        part.to(device=reference.device).train(stock.training)
        for parameter, old in zip(part.parameters(), stock.parameters(), strict=True):
            parameter.requires_grad_(old.requires_grad)
        setattr(model, name, part)
    if type(model) is NeMoAudioCodecModel:
        model.__class__ = LFRCodecModel
        # Training builds ours; until then its weights are carried along.
        state = {} if model.discriminator is None else model.discriminator.state_dict(prefix=DISCRIMINATOR)
        model._unbuilt_discriminator = {key: value for key, value in state.items() if WAVLM not in key}
        model.discriminator = None
        model._losses = None
        model._average = None
        model._codebook_use = None
        model._is_random = False
        model._restored_from = None
    return model


def _stock(cls: type[LFRCodecModel], name: str) -> Any:
    """NeMo's class method, bound to `cls`.

    `super()` in a method that constructs models would give its frame a `__class__`, by which Lightning's
    `save_hyperparameters` mistakes it for a constructor.
    """
    return getattr(NeMoAudioCodecModel, name).__func__.__get__(cls)


def _checked_values(cfg: DictConfig) -> dict[str, Any]:
    """`codec_values` of a config whose losses neither open a file nor ask the network."""
    for key in ("use_scl_loss", "use_slm_loss"):
        if cfg.get(key):
            raise ConfigError(f"{key} is set; nemo_lfr does not train codecs with it. Use NeMo's own AudioCodecModel.")
    return codec_values(cfg)


def _without_folders(config: DictConfig) -> DictConfig:
    """A copy whose data sections name files without the folders of the machine that trained."""

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
    """A config given instead of the file's; one with a `model` section means that section."""
    config = source if OmegaConf.is_config(source) else OmegaConf.load(source)
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    if not isinstance(config, DictConfig):
        raise ConfigError("the config given is a list, not a mapping.")
    return config.model if "model" in config else config
