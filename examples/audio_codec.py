"""Train or fine-tune the codec through NeMo: the script of NeMo's audio codec tutorial, on this package's modules.

    python examples/audio_codec.py max_epochs=100 weighted_sampling_steps_per_epoch=1000 batch_size=16 \\
        log_dir=logs exp_manager.exp_dir=runs \\
        +train_ds_meta.mine.manifest_path=train.json +train_ds_meta.mine.audio_dir=audio/ \\
        +val_ds_meta.mine.manifest_path=valid.json +val_ds_meta.mine.audio_dir=audio/ \\
        +log_ds_meta.mine.manifest_path=log.json +log_ds_meta.mine.audio_dir=audio/

Fine-tune with `+init_from_nemo_model=codec.nemo`. On a CPU add `trainer.accelerator=cpu trainer.devices=1
trainer.strategy=auto`. `--config-name` chooses another file of `conf/`, `+seed=1` other random weights. The same
command again continues from the last epoch that was saved.
"""

import nemo_lfr  # noqa: F401, I001  first: turns off the usage reports of a library that NeMo imports

import lightning.pytorch as pl
from nemo.core.config import hydra_runner
from nemo.utils import logging
from nemo.utils.exp_manager import exp_manager
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import DictConfig, OmegaConf

from nemo_lfr import AudioCodecModel
from nemo_lfr.training.endings import ending_in_one_line
from nemo_lfr.nemo.resume import tidy_experiment


@hydra_runner(config_path="../conf", config_name="audio_codec_low_frame_rate_22050")
def main(cfg: DictConfig) -> None:
    """Train; a full disk or a mistake in the config is one line."""
    with ending_in_one_line(cfg.get("exp_manager", {}).get("exp_dir")):
        train(cfg)


def train(cfg: DictConfig) -> None:
    """Build what the config describes, and train it."""
    logging.info("Config:\n%s", OmegaConf.to_yaml(cfg, resolve=True))
    # With it, and an epoch's draws following from its number, a run that is killed and started again ends the same.
    pl.seed_everything(cfg.get("seed", 0), workers=True)
    trainer = pl.Trainer(**cfg.trainer)
    if is_global_rank_zero():
        tidy_experiment(cfg.get("exp_manager"))  # of a run that was killed while it saved
    exp_manager(trainer, cfg.get("exp_manager"))
    model = AudioCodecModel(cfg=cfg.model, trainer=trainer)
    model.maybe_init_from_pretrained_checkpoint(cfg=cfg)
    trainer.fit(model)


if __name__ == "__main__":
    main()
