"""Save the NeMo model to `.nemo` files, and restore it from checkpoints."""

import copy
import os
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_lfr.bundled import LFR
from nemo_lfr.checkpoint import PARTS, CodecModules, load_parts, read_config
from nemo_lfr.checkpoint.names import unwrapped
from nemo_lfr.codec.ambient import building_state
from nemo_lfr.codec.devices import choose_device
from nemo_lfr.codec.torch_backend import TorchBackend
from nemo_lfr.errors import CheckpointError, ConfigError, NemoLfrError, shorten
from nemo_lfr.io.atomic import sync, writing_folder
from nemo_lfr.io.hub import ALIASES, find_checkpoint
from nemo_lfr.io.locate import check_path, expand_home, locate_checkpoint, looks_local
from nemo_lfr.io.regular import check_replaceable
from nemo_lfr.modules.altered import SAVE
from nemo_lfr.nemo.base import (
    BaseModel,
    NeMoAudioCodecModel,
    PretrainedModelInfo,
    SaveRestoreConnector,
    Trainer,
    logging,
)
from nemo_lfr.nemo.config import check_hparams, check_trainer, checked_values, override_config
from nemo_lfr.nemo.packed_files import PackedFiles, restoring
from nemo_lfr.nemo.training_checkpoint import problem_of_training_checkpoint

# Modules that `restore_from` has loaded. The constructor uses these modules instead of building random ones.
READ_PARTS: ContextVar[CodecModules | None] = ContextVar("parts", default=None)
# Attributes of NeMo's `SaveRestoreConnector` that are used only when a model is saved.
_SAVING = {"save_to", "pack_nemo_file", "_pack_nemo_file", "_save_state_dict_to_disk"}


class NemoFiles(PackedFiles):
    """Mixin with the methods that save a model to a `.nemo` file and restore it from checkpoints."""

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
        """Restore a model from a checkpoint saved by any NeMo version.

        Args:
            restore_path: `.nemo` or `.ckpt` file, folder of an unpacked or exported codec, or folder that contains one
                `.nemo`.
            override_config_path: path of a YAML file, or a config, that replaces the checkpoint's config.
            map_location: device of the model; default: a GPU if available, else the CPU.
            strict: whether missing or unknown weights of the encoder, quantizer and decoder are an error.
            return_config: whether to return only the config, without building the model.
            save_restore_connector: NeMo's `SaveRestoreConnector`. If its `model_extracted_dir` is set, or its class
                overrides a method that restores models, NeMo's own code and this connector restore the model.
            trainer: Lightning trainer, as in NeMo.
            validate_access_integrity: accepted for compatibility with NeMo; only used if NeMo's own code restores the
                model.

        Returns:
            The model in evaluation mode, or its config with `return_config`.

        Raises:
            CheckpointError: if the file cannot be read or does not match the config.
            ConfigError: if `override_config_path` is not a valid config, or `trainer` or `save_restore_connector` has
                the wrong type.
            NemoLfrError: if the device in `map_location` is unknown or not available.
        """
        check_trainer(trainer)
        if _restores_itself(save_restore_connector):
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
        override = None if override_config_path is None else override_config(override_config_path)
        if return_config:
            return read_config(path) if override is None else override
        with building_state(torch.device("cpu")):
            return cls._built_from(path, override, map_location, strict, save_restore_connector, trainer)

    @classmethod
    def _built_from(
        cls,
        path: Path,
        override: DictConfig | None,
        map_location: Any,
        strict: bool,
        save_restore_connector: Any,
        trainer: Trainer | None,
    ) -> Any:
        config = read_config(path) if override is None else override
        parts, tensors = load_parts(path, override, strict=strict)
        loaded = [value for part in parts.named().values() for value in part.state_dict(keep_vars=True).values()]
        read_parts = READ_PARTS.set(parts)
        try:
            with restoring(cls, path, config):
                model = cls(cfg=config, trainer=trainer)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error
        finally:
            READ_PARTS.reset(read_parts)
        model.load_rest(tensors, loaded)
        model._restored_from = path
        model._restored_log_config = model.log_config if override is None else None
        if save_restore_connector is not None:
            model._save_restore_connector = save_restore_connector
        elif path.is_dir() and model.has_artifacts():  # `save_to` packs the files of this folder again
            model._save_restore_connector.model_extracted_dir = str(path)
        logging.info("%s restored from %s", cls.__name__, path)
        return model.to(choose_device(map_location)).eval()

    @classmethod
    def from_pretrained(
        cls,
        model_name: str | os.PathLike[str],
        refresh_cache: bool = False,
        override_config_path: Any = None,
        map_location: torch.device | str | None = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Trainer | None = None,
        save_restore_connector: Any = None,
        return_model_file: bool | None = False,
    ) -> Any:
        """Restore a published model by its name on the Hugging Face Hub or in NeMo's list.

        `list_available_models()` returns the names in NeMo's list. A downloaded file is cached and then used without
        network access.

        Args:
            model_name: name on the Hub (USER/MODEL), name in NeMo's list, or path of a local checkpoint.
            refresh_cache: whether to download the file again.
            override_config_path: path of a YAML file, or a config, that replaces the checkpoint's config.
            map_location: device of the model; default: a GPU if available, else the CPU.
            strict: whether missing or unknown weights of the encoder, quantizer and decoder are an error.
            return_config: whether to return only the config, without building the model.
            trainer: Lightning trainer, as in NeMo.
            save_restore_connector: NeMo's `SaveRestoreConnector`.
            return_model_file: whether to return only the path of the downloaded file.

        Returns:
            The model in evaluation mode, its config with `return_config`, or the path of its file with
            `return_model_file`.

        Raises:
            CheckpointError: if the file cannot be downloaded or read.
            ConfigError: as in `restore_from`.
            NemoLfrError: as in `restore_from`.
        """
        check_path(model_name, CheckpointError)
        model_name = os.fspath(model_name)
        if not model_name:
            raise CheckpointError(f"model_name is ''; pass a name such as {LFR}, or the path of a checkpoint.")
        name = ALIASES.get(model_name, model_name)
        if "/" not in name and not looks_local(name):  # a model from NVIDIA's NGC catalog
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
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        *args: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load a Lightning training checkpoint (`.ckpt`), with NeMo's method.

        Pickled objects in the file may run code, as in NeMo. `restore_from` opens `.ckpt` files without running code.

        Args:
            checkpoint_path: path or URL of the file, or an open file.
            args: further arguments of Lightning's method.
            map_location: device of the weights.
            hparams_file: file with a config that replaces the checkpoint's config.
            strict: whether missing or unknown weights of the encoder, quantizer and decoder are an error.
            kwargs: further arguments of Lightning's method.

        Returns:
            The model.

        Raises:
            CheckpointError: if the file cannot be read as a training checkpoint of this class, or its weights do not
                fit the model.
            ConfigError: if an OmegaConf interpolation in `hparams_file` is too long.
        """
        check_hparams(hparams_file)
        try:
            return _stock(cls, "load_from_checkpoint")(
                checkpoint_path, *args, map_location=map_location, hparams_file=hparams_file, strict=strict, **kwargs
            )
        except Exception as error:  # Lightning, PyTorch and fsspec raise many classes
            is_known = isinstance(error, CheckpointError)
            if not is_known and (problem := problem_of_training_checkpoint(checkpoint_path)) is not None:
                raise problem from error
            if is_known or isinstance(error, ConfigError):
                raise CheckpointError(f"{shorten(checkpoint_path, 300)}: {error}") from error
            raise

    @classmethod
    def list_available_models(cls) -> list[PretrainedModelInfo]:
        """Return the models in NeMo's list, and NVIDIA's low frame-rate codec under the name in its model card."""
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
        """Write the model to a `.nemo` file, with the averaged weights if there is a moving average.

        With a connector whose `pack_nemo_file` is False, the config and the weights are written to the folder of
        `save_path` instead. Each file is written atomically: if the process crashes, an existing file stays intact.

        Args:
            save_path: path of the file to write.
            *args: positional arguments passed on to NeMo.
            **kwargs: keyword arguments passed on to NeMo.

        Raises:
            CheckpointError: if the file cannot be written.
            NemoLfrError: if a module has hooks, replaced layers or changed settings, which would not be saved. With a
                trainer, this is only a warning.
        """
        if not isinstance(save_path, str | os.PathLike) or not os.fspath(save_path):
            raise CheckpointError(f"save_path is {shorten(repr(save_path))}; pass the path of a .nemo file to write.")
        path = expand_home(save_path).absolute()
        if path.is_dir():
            raise CheckpointError(f"{path}: this path is a folder; pass the path of a .nemo file to write.")
        check_replaceable(path, CheckpointError)
        self._check_described()
        try:
            self._save_aside(path, *args, **kwargs)
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(
                f"{path}: the file cannot be written ({reason}); write it to another folder."
            ) from error

    def _check_described(self) -> None:
        """Check that the modules are those that the config describes; see `TorchBackend.check_described`.

        With a trainer, a difference is only a warning, because an error would lose the trained weights.
        """
        encoder, quantizer, decoder = (unwrapped(getattr(self, name)) for name in PARTS)
        values, name = checked_values(self.cfg), type(self).__name__
        backend = TorchBackend(encoder, quantizer, decoder, self.sample_rate, name=name, config=values)  # type: ignore[arg-type]
        try:
            backend.check_described(SAVE)
        except NemoLfrError as error:
            if self._trainer is None:
                raise
            logging.warning("%s", error)

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
            # Ranks other than 0 write nothing. A connector with `pack_nemo_file=False` writes a config and weights.
            for written in Path(folder).iterdir():
                with open(written, "rb+") as file:
                    sync(file.fileno())
                os.replace(written, path.with_name(written.name))


def _restores_itself(connector: Any) -> bool:
    """Return whether a connector restores models in its own way: from a folder, or with overridden methods.

    Raises:
        ConfigError: if `connector` is not an object like NeMo's `SaveRestoreConnector`.
        CheckpointError: if its `model_extracted_dir` does not exist.
    """
    if connector is None:
        return False
    if isinstance(connector, type) or not hasattr(connector, "model_extracted_dir"):
        raise ConfigError(
            f"save_restore_connector is {shorten(repr(connector))}; pass an instance of NeMo's SaveRestoreConnector."
        )
    folder = connector.model_extracted_dir
    if folder is not None and not os.path.exists(expand_home(folder, CheckpointError)):
        raise CheckpointError(f"{folder}: no such folder; set model_extracted_dir to the folder of an unpacked .nemo.")
    usual = SaveRestoreConnector()
    names = [name for name in dir(usual) if not name.startswith("__") and name not in _SAVING]
    return any(_function(getattr(connector, name, None)) != _function(getattr(usual, name)) for name in names)


def _function(value: Any) -> Any:
    """Return the function of a bound method; any other value unchanged."""
    return getattr(value, "__func__", value)


def _stock(cls: type[BaseModel], name: str) -> Any:
    """Return a class method of NeMo's model, bound to `cls`.

    `super()` would add `__class__` to the frame of the calling method, which Lightning's `save_hyperparameters` would
    then mistake for a constructor.
    """
    return getattr(NeMoAudioCodecModel, name).__func__.__get__(cls)


def _without_folders(config: DictConfig) -> DictConfig:
    """Return a copy of a config, with absolute paths in the data sections shortened to their last component.

    A saved model therefore does not reveal the folder names of the machine on which it was trained.
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
