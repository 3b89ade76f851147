"""Pictures of the logged clips, beside the audio that NeMo's `AudioCodecArtifactGenerator` logs."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from nemo.collections.tts.parts.utils.callbacks import ArtifactGenerator, AudioArtifact, ImageArtifact, create_id

from nemo_lfr.signal.spectra import Spectra

RESOLUTION = (1024, 256, 1024)


class SpectrogramGenerator(ArtifactGenerator):
    """Spectrograms in dB of each clip of `log_config`: the originals once, the reconstructions each time."""

    def generate_artifacts(
        self, model: LightningModule, batch_dict: dict[str, Any], initial_log: bool = False
    ) -> tuple[list[AudioArtifact], list[ImageArtifact]]:
        """No audio, and one image per clip; `initial_log` is NeMo's sign that training begins."""
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
