"""Log spectrograms as images, and check whether manifests exist."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from nemo.collections.tts.parts.utils.callbacks import ArtifactGenerator, AudioArtifact, ImageArtifact, create_id
from omegaconf import DictConfig, OmegaConf

from nemo_lfr.signal.spectra import Spectra

RESOLUTION = (1024, 256, 1024)


class SpectrogramGenerator(ArtifactGenerator):
    """Generator of spectrogram images, in dB, for the clips that `log_config` in the config selects.

    The original clips are logged once. Their reconstructions are logged at every logging step.
    """

    def generate_artifacts(
        self, model: LightningModule, batch_dict: dict[str, Any], initial_log: bool = False
    ) -> tuple[list[AudioArtifact], list[ImageArtifact]]:
        """Return spectrogram images for a batch of clips.

        Args:
            model: codec model that reconstructs the clips.
            batch_dict: batch with `audio` [B, T_audio], `audio_lens` [B], `dataset_names` and `audio_filepaths`.
            initial_log: whether to also return images of the originals, as at the start of training.

        Returns:
            An empty list of audio artifacts, and the image artifacts.
        """
        audio, audio_len = batch_dict["audio"], batch_dict["audio_lens"]
        with torch.no_grad():
            output, _ = model(audio=audio, audio_len=audio_len)
        images = []
        names = zip(batch_dict["dataset_names"], map(create_id, batch_dict["audio_filepaths"]), strict=True)
        for index, (dataset, clip) in enumerate(names):
            length = int(audio_len[index])
            images.append(_image(output[index, :length], dataset, f"{clip}_spectrogram_out"))
            if initial_log:
                images.append(_image(audio[index, :length], dataset, f"{clip}_spectrogram_in"))
        return [], images


def lists_missing_manifests(section: DictConfig | None) -> bool:
    """Return whether a data section lists manifests that do not exist.

    `save_to` shortens absolute paths in the config to file names, so a restored model may list missing manifests.
    """
    values: Any = None if section is None else OmegaConf.to_container(section, resolve=False)
    for key in ("dataset", "dataset_meta"):
        values = values.get(key) if isinstance(values, dict) else None
    datasets = values.values() if isinstance(values, dict) else ()
    paths = [dataset.get("manifest_path") for dataset in datasets if isinstance(dataset, dict)]
    return any(isinstance(path, str) and "${" not in path and not os.path.isfile(path) for path in paths)


def _image(audio: torch.Tensor, dataset: str, name: str) -> ImageArtifact:
    padded = torch.nn.functional.pad(audio, (0, max(0, RESOLUTION[0] - len(audio))))
    decibel = 20 * Spectra(padded[None]).magnitude(RESOLUTION)[0].log10()
    return ImageArtifact(
        id=name,
        data=decibel.float().cpu().numpy(),
        filepath=Path(dataset, f"{name}.png"),
        x_axis="frame",
        y_axis="frequency bin",
    )
