r"""Train or fine-tune the codec with NeMo.

The script has the same options as the training script in NeMo's audio codec tutorial.

    python examples/audio_codec.py max_epochs=100 weighted_sampling_steps_per_epoch=1000 batch_size=16 \
        log_dir=logs exp_manager.exp_dir=runs \
        +train_ds_meta.mine.manifest_path=manifests/train.json \
        +val_ds_meta.mine.manifest_path=manifests/valid.json \
        +log_ds_meta.mine.manifest_path=manifests/valid.json

If a run is stopped, the same command resumes it from the last saved epoch. Further options:

    +init_from_nemo_model=codec.nemo                                            fine-tune this checkpoint
    trainer.accelerator=cpu trainer.devices=1 trainer.strategy=auto             train on a CPU
    --config-name audio_codec_low_frame_rate_22050_small                        use another file in conf/
    +seed=1                                                                     start from other random weights
    +seed=1,2 -m                                                                train twice, with seed 1 and seed 2

With `-m`, Hydra trains once for each combination of values. Job N stores its files in the subfolder
`job-N-CHECKSUM` of `log_dir` and of `exp_manager.exp_dir`, with a checksum of the job's options.
"""

import nemo_lfr  # noqa: F401, I001  imported first, to turn off the usage reports of a library that NeMo imports

import hashlib
import os

import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_original_cwd
from nemo.core.config import hydra_runner
from nemo.utils import logging
from nemo.utils.exp_manager import exp_manager
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_lfr import AudioCodecModel, ConfigError
from nemo_lfr.training.endings import ending_in_one_line
from nemo_lfr.nemo.resume import tidy_experiment


@hydra_runner(config_path="../conf", config_name="audio_codec_low_frame_rate_22050")
def main(cfg: DictConfig) -> None:
    """Train. Config errors and disk errors are reported in one line."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        os.chdir(get_original_cwd())  # Hydra may have entered a new folder, but exp_manager requires the original one
        separate_job(cfg, HydraConfig.get().job.num, HydraConfig.get().job.override_dirname)
    with ending_in_one_line((cfg.get("exp_manager") or {}).get("exp_dir"), cfg.get("log_dir")):
        train(cfg)


def separate_job(cfg: DictConfig, number: int, overrides: str) -> None:
    """Give a job of a multirun its own folders, so that it resumes only a job with the same number and options.

    Args:
        cfg: config, which is changed.
        number: number of the job.
        overrides: the options of the job, as Hydra joins them for the name of a folder.
    """
    # A checksum, since the options contain paths and may be longer than the name of a folder.
    name = f"job-{number}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"
    manager = cfg.get("exp_manager") or {}
    with open_dict(cfg):  # the config may lack `exp_dir`
        for section, key, default in (
            (cfg, "log_dir", None),
            (manager, "exp_dir", "nemo_experiments"),  # the default of NeMo
            (manager, "explicit_log_dir", None),
        ):
            if folder := section.get(key) or default:
                section[key] = os.path.join(folder, name)


def train(cfg: DictConfig) -> None:
    """Build the trainer and the model from a config, and train.

    Args:
        cfg: config with the sections `model`, `trainer` and `exp_manager`.
    """
    logging.info("Config:\n%s", OmegaConf.to_yaml(cfg, resolve=True))
    # Random draws depend only on the seed and the epoch, so a killed and resumed run gives the same result.
    seed = cfg.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < 1 << 32:  # Lightning would replace it with 0
        raise ConfigError(f"seed is {seed!r}; pass a whole number from 0 to 2**32 - 1, as in +seed=1.")
    pl.seed_everything(seed, workers=True)
    try:
        trainer = pl.Trainer(**cfg.trainer)
    except (TypeError, ValueError) as error:  # an unknown key or an invalid value
        raise ConfigError(f"trainer: {error}") from error
    if is_global_rank_zero():
        tidy_experiment(cfg.get("exp_manager"))  # locks the folder, and removes an unfinished checkpoint
    exp_manager(trainer, cfg.get("exp_manager"))
    model = AudioCodecModel(cfg=cfg.model, trainer=trainer)
    model.maybe_init_from_pretrained_checkpoint(cfg=cfg)
    trainer.fit(model)


if __name__ == "__main__":
    main()
