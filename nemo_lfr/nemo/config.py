"""Check the configs of the NeMo model."""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from torch.nn.parallel import DistributedDataParallel

from nemo_lfr.checkpoint import check_interpolations, codec_values
from nemo_lfr.errors import ConfigError, quoted, shorten
from nemo_lfr.frames import num_frames
from nemo_lfr.io.locate import expand_home
from nemo_lfr.nemo.base import EMA, Trainer, common, model_utils
from nemo_lfr.nemo.cuts import uses_lhotse
from nemo_lfr.training import discriminators, losses
from nemo_lfr.training.components import import_components
from nemo_lfr.training.settings import check_model

# NeMo rejects a `_target_` whose import path does not start with a prefix in this list. Add this package's prefix.
if "nemo_lfr." not in common.ALLOWED_TARGET_PREFIXES:
    common.ALLOWED_TARGET_PREFIXES.append("nemo_lfr.")

# Values of Lightning's `precision` that keep the weights in fp32
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
IDENTITY = {"_target_": "torch.nn.Identity"}
BUILT_IN = {*discriminators.BUILT_IN, *losses.BUILT_IN}
ANY_LOSS = {"_target_": next(iter(losses.GENERATOR_LOSSES))}
SMALLEST_QUANTIZER = {
    "_target_": "nemo.collections.tts.modules.audio_codec_modules.FiniteScalarQuantizer",
    "num_levels": [2],
}


def checked_values(cfg: DictConfig) -> dict[str, Any]:
    """Return the config values that determine the codec; see `codec_values`.

    Raises:
        ConfigError: if the config sets `use_scl_loss`, `use_slm_loss` or a key of a semantic codec, or if a value
            cannot be resolved.
    """
    for key in ("use_scl_loss", "use_slm_loss"):
        if cfg.get(key):
            raise ConfigError(f"{key} is set; nemo_lfr does not train codecs with it. Use NeMo's own AudioCodecModel.")
    return codec_values(cfg)


def check_training(cfg: DictConfig, num_codebooks: int) -> None:
    """Validate the values of a model config that are only used for training.

    Args:
        cfg: model config.
        num_codebooks: number of codebooks of the codec.

    Raises:
        ConfigError: if a value cannot be resolved, a number is out of its range, or the config sets a codebook
            dropout although the codec has only one codebook.
    """
    try:
        values = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"the config cannot be resolved: {_reason(error)}.") from error
    check_model(values)
    if (rate := values.get("codebook_dropout_rate")) and num_codebooks < 2:
        raise ConfigError(f"codebook_dropout_rate is {rate}, but the codec has only one codebook; remove the key.")


def check_precision(trainer: Trainer | None) -> None:
    """Raise ConfigError if a trainer's precision would convert the codec's weights from fp32 to another dtype."""
    if trainer is not None and (precision := str(trainer.precision)) not in PRECISIONS:
        raise ConfigError(
            f"trainer.precision is {precision}, but the weights of the codec must be fp32; use one of "
            f"{', '.join(PRECISIONS)}."
        )


def check_gradients(trainer: Trainer) -> None:
    """Check that a trainer does not accumulate or clip gradients.

    Lightning supports neither option for models that step their optimizers themselves.

    Args:
        trainer: trainer that is about to fit a model.

    Raises:
        ConfigError: if the trainer is set to accumulate or clip gradients.
    """
    for key, unset, ours in (
        ("accumulate_grad_batches", (None, 1), "accumulate_grad_batches"),
        ("gradient_clip_val", (None, 0), "clip_grad_norm"),
    ):
        if (value := getattr(trainer, key)) not in unset:
            raise ConfigError(
                f"trainer.{key} is {value}, but the model steps its optimizers itself; remove it, and set {ours}: "
                f"{value} in the model config."
            )


def check_fit(trainer: Trainer, has_discriminator: bool) -> None:
    """Check that a trainer's strategy and callbacks can train the model.

    Args:
        trainer: trainer that is about to fit a model.
        has_discriminator: whether discriminators are trained too.

    Raises:
        ConfigError: if discriminators are trained with DDP, but without `find_unused_parameters`. Also if NeMo's EMA
            callback would have to read a checkpoint, which fails with PyTorch 2.6 and later.
    """
    wrapper = trainer.strategy.model
    if has_discriminator and isinstance(wrapper, DistributedDataParallel) and not wrapper.find_unused_parameters:
        raise ConfigError(
            "trainer.strategy is DDP without the search for unused parameters, but the generator and the "
            "discriminators are updated in turn; pass trainer.strategy=ddp_find_unused_parameters_true."
        )
    uses_average = any(isinstance(callback, EMA) for callback in trainer.callbacks)
    saves_best = any(getattr(callback, "save_best_model", False) for callback in trainer.checkpoint_callbacks)
    if uses_average and (saves_best or trainer.ckpt_path):
        raise ConfigError(
            "exp_manager.ema is enabled, but with PyTorch 2.6 and later, NeMo cannot read the checkpoints that its "
            "EMA callback saves, so it could neither resume the run nor save the best model; remove exp_manager.ema, "
            "and set model.ema_decay=0.999."
        )


def check_segments(cfg: DictConfig, min_samples: int) -> None:
    """Check the length of the training segments in a model config.

    Args:
        cfg: model config.
        min_samples: length, in samples, of the shortest audio that the losses and discriminators can use.

    Raises:
        ConfigError: if the segments are shorter than `min_samples`, even when they are padded to whole frames.
    """
    section, frame = cfg.get("train_ds"), cfg.samples_per_frame
    if not section:
        return
    shortest = (num_frames(min_samples, frame) - 1) * frame + 1
    name, key, rate = "dataset", "n_samples", 1
    if uses_lhotse(section):
        name, key, rate = "dataset_args", "segment_duration", cfg.sample_rate
    value = (section.get(name) or {}).get(key)
    if value is not None and int(value * rate) < shortest:
        least = shortest if rate == 1 else -(-shortest * 1000 // rate) / 1000
        raise ConfigError(
            f"train_ds.{name}.{key} is {value}, but the losses and discriminators of this config need segments of at "
            f"least {shortest} samples; set it to {least} or more."
        )


def target_of(section: Any) -> str | None:
    """Return the `_target_` of a config section; None if the section has no such key."""
    return section.get("_target_") if isinstance(section, Mapping | DictConfig) else None


def model_config(cfg: Any) -> DictConfig:
    """Resolve a config as NeMo's models do, and update a config written for an old version of NeMo.

    Args:
        cfg: config, or structured config (a dataclass).

    Raises:
        ConfigError: if `cfg` is not a config, a value cannot be resolved, or an interpolation is too long.
    """
    if not isinstance(cfg, DictConfig) and not is_dataclass(cfg):
        raise ConfigError(f"cfg is {shorten(repr(cfg))}; pass a DictConfig, such as OmegaConf.create({{...}}).")
    try:
        if isinstance(cfg, DictConfig):
            check_interpolations(OmegaConf.to_container(cfg, resolve=False))
        resolved: DictConfig = model_utils.convert_model_config_to_dict_config(cfg)
        updated: DictConfig = model_utils.maybe_update_config_version(resolved)
        return updated
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"the config cannot be resolved: {_reason(error)}.") from error


@contextlib.contextmanager
def unset_keys_named() -> Iterator[None]:
    """Raise ConfigError if NeMo or a data loader reads a key whose value is `???`, OmegaConf's mark of an unset value.

    A config may contain unset keys that are never read.
    """
    try:
        yield
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} is '???', which means that it is not set; set it.") from error


def check_trainer(trainer: Any) -> None:
    """Raise ConfigError if `trainer` is neither None nor a Trainer of the package `lightning`, which NeMo uses."""
    if trainer is not None and not isinstance(trainer, Trainer):
        raise ConfigError(f"trainer is {shorten(repr(trainer))}; pass a lightning.pytorch.Trainer, or None.")


def override_config(source: Any) -> DictConfig:
    """Load and resolve a config that replaces the config of a checkpoint.

    Args:
        source: path of a YAML file, an open YAML file, or a config. If the config has a `model` section, only that
            section is used.

    Raises:
        ConfigError: if `source` cannot be read, is not a valid config, or names a component that cannot be imported.
    """
    is_path = isinstance(source, str | os.PathLike) and os.fspath(source)
    if not (is_path or OmegaConf.is_config(source) or hasattr(source, "read")):
        raise ConfigError(
            f"override_config_path is {shorten(repr(source))}; pass the path of a YAML file, or a config such as "
            "OmegaConf.create({...})."
        )
    name = "override_config_path"
    if is_path:
        source = expand_home(source, ConfigError)
        name = f"{name} {source}"
    config = source if OmegaConf.is_config(source) else _loaded(source, name)
    try:
        import_components(_model_section(config, name), built_in=BUILT_IN)
        return _model_section(OmegaConf.create(OmegaConf.to_container(config, resolve=True)), name)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{name}: the config cannot be resolved: {_reason(error)}.") from error


def _model_section(config: Any, name: str) -> DictConfig:
    has_section = isinstance(config, DictConfig) and "model" in config
    section = config.model if has_section else config
    if not isinstance(section, DictConfig):
        where = "the section 'model'" if has_section else "the config"
        raise ConfigError(f"{name}: {where} is {quoted(section)}; pass a mapping from names to values.")
    return section


def _loaded(file: Any, name: str) -> DictConfig | ListConfig:
    try:
        text = file.read() if hasattr(file, "read") else Path(file).read_text("utf-8")
        check_interpolations(text.decode() if isinstance(text, bytes) else text)
        return OmegaConf.load(io.StringIO(text) if isinstance(text, str) else io.BytesIO(text))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    except Exception as error:  # OmegaConf and PyYAML raise many exception classes
        if isinstance(error, OSError) and error.strerror:
            raise ConfigError(f"{name}: the file cannot be read ({error.strerror}); pass a YAML file.") from error
        raise ConfigError(f"{name}: the file is not a YAML config: {_reason(error)}.") from error


def check_hparams(file: Any) -> None:
    """Limit the OmegaConf interpolations (`${...}`) in a file of hyperparameters.

    A file that cannot be read or parsed is ignored, because Lightning reports it.

    Args:
        file: local path of a YAML file. Other values are not checked.

    Raises:
        ConfigError: if the strings with interpolations are too long.
    """
    if not isinstance(file, str | os.PathLike) or not os.path.isfile(file):
        return
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        try:
            check_interpolations(Path(file).read_text("utf-8"))
        except ConfigError as error:
            raise ConfigError(f"hparams_file {shorten(file, 300)}: {error}") from error


def _reason(error: Exception) -> str:
    return shorten(" ".join(str(error).split()), 200) or type(error).__name__
