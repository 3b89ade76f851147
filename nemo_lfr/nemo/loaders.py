"""Data loaders of the NeMo model, for manifests and for Lhotse cuts."""

from typing import Any

from nemo.collections.tts.data import audio_codec_dataset_lhotse, vocoder_dataset
from nemo.collections.tts.models import audio_codec
from omegaconf import DictConfig

from nemo_lfr.errors import ConfigError, shorten
from nemo_lfr.nemo.base import BaseModel, NeMoAudioCodecModel
from nemo_lfr.nemo.config import unset_keys_named
from nemo_lfr.nemo.cuts import cut_loader, data_section, uses_lhotse
from nemo_lfr.nemo.patches import is_changed, patched_method
from nemo_lfr.training.data import manifest_loader


class DataLoaders(BaseModel):
    """Mixin with the methods that build the data loaders."""

    def get_dataset(self, cfg: DictConfig) -> Any:
        """Build a data loader with `CodecDataset` instead of NeMo's `VocoderDataset`.

        If `CodecDataset` does not support the config section, or a caller has patched `VocoderDataset`, NeMo builds
        the data loader.

        Raises:
            ConfigError: if the section is invalid. Also if its `sample_rate` is not the codec's and it has no
                `resample_rate`.
        """
        rate = (cfg.get("dataset") or {}).get("sample_rate")
        if rate not in (None, self.sample_rate) and not cfg.dataset.get("resample_rate"):
            raise ConfigError(
                f"{cfg._get_full_key('dataset')}.sample_rate is {shorten(rate)}, but the codec runs at "
                f"{self.sample_rate} Hz; set it to this rate. Recordings at other rates are resampled."
            )
        if is_changed(vocoder_dataset.VocoderDataset, vocoder_dataset) or patched_method(
            NeMoAudioCodecModel, ("get_dataset",)
        ):
            return super().get_dataset(cfg)
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self._trainer else (1, 0)
        return manifest_loader(cfg, world_size, rank) or super().get_dataset(cfg)

    def _get_lhotse_dataloader(self, cfg: DictConfig) -> Any:
        patched = patched_method(NeMoAudioCodecModel, ("_get_lhotse_dataloader",))
        if patched is not None or is_changed(audio_codec.AudioCodecLhotseDataset, audio_codec_dataset_lhotse):
            return super()._get_lhotse_dataloader(cfg)
        return cut_loader(cfg, self.sample_rate, self.global_rank, self.world_size)

    def setup_training_data(self, cfg: DictConfig | dict[str, Any]) -> None:
        """Build the training loader from a section of the config."""
        with unset_keys_named():
            super().setup_training_data(data_section(cfg, "train_ds"))

    def setup_validation_data(self, cfg: DictConfig | dict[str, Any]) -> None:
        """Build the validation loader from manifests or from Lhotse cuts.

        NeMo itself supports manifests only.
        """
        cfg = data_section(cfg, "validation_ds")
        with unset_keys_named():
            if uses_lhotse(cfg):
                ranks = self.global_rank, self.world_size
                self._validation_dl = cut_loader(cfg, self.sample_rate, *ranks, validation=True)
            else:
                super().setup_validation_data(cfg)
