"""Discriminator of the hidden states of WavLM ("SLM": speech language model)."""

import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from nemo_lfr.frames import num_frames
from nemo_lfr.signal.spectra import Spectra
from nemo_lfr.training.audio_discriminator import AudioDiscriminator, DiscriminatorOutput, Views
from nemo_lfr.training.settings import COUNT, check_settings
from nemo_lfr.training.wavlm import MIN_SAMPLES, WavLM


class SLMDiscriminator(AudioDiscriminator):
    """Discriminator whose input is all hidden states of a frozen WavLM model.

    See StyleTTS 2 (arXiv 2306.07691), and Low Frame-rate Speech Codec (arXiv 2409.12117).

    Args:
        slm_model_name: Hub id of the WavLM model, or a folder that contains it.
        slm_sr: sample rate of the WavLM model in Hz.
        input_sr: sample rate of the audio in Hz.
        slm_hidden: hidden size of the WavLM model.
        slm_layers: number of hidden states: the number of layers plus 1 (for the input of the first layer).
        initial_channel: number of output channels of the discriminator's first layer.
        use_spectral_norm: whether to use spectral norm instead of weight norm.

    Raises:
        ConfigError: if a number is not a whole number of at least 1.
    """

    def __init__(
        self,
        slm_model_name: str = "microsoft/wavlm-base-plus",
        slm_sr: int = 16000,
        input_sr: int = 22050,
        slm_hidden: int = 768,
        slm_layers: int = 13,
        initial_channel: int = 64,
        use_spectral_norm: bool = False,
    ) -> None:
        from nemo.collections.audio.parts.utils.transforms import Resample

        super().__init__()
        check_settings(
            {
                "slm_sr": slm_sr,
                "input_sr": input_sr,
                "slm_hidden": slm_hidden,
                "slm_layers": slm_layers,
                "initial_channel": initial_channel,
            },
            dict.fromkeys(("slm_sr", "input_sr", "slm_hidden", "slm_layers", "initial_channel"), COUNT),
        )
        self._min_samples = num_frames(MIN_SAMPLES * input_sr, slm_sr)
        self.resample = Resample(orig_freq=input_sr, new_freq=slm_sr)
        norm = nn.utils.spectral_norm if use_spectral_norm else weight_norm
        self.slm = WavLM(slm_model_name, slm_hidden, slm_layers)
        width = initial_channel
        self.pre = norm(nn.Conv1d(slm_hidden * slm_layers, width, 1))
        self.convs = nn.ModuleList(
            norm(nn.Conv1d(inputs, outputs, 5, padding=2))
            for inputs, outputs in ((width, 2 * width), (2 * width, 4 * width), (4 * width, 4 * width))
        )
        self.conv_post = norm(nn.Conv1d(4 * width, 1, 3, padding=1))

    @property
    def num_networks(self) -> int:
        """Return 1, since all hidden states form one view."""
        return 1

    @property
    def min_samples(self) -> int:
        """Return the length, in samples, of the shortest audio from which WavLM computes a frame."""
        return self._min_samples

    def preprocess(self, audio: Spectra) -> Views:
        """Return the hidden states of WavLM, [B, slm_layers * slm_hidden, frames]."""
        return [self.slm(self.resample(audio.audio))]

    def score(self, views: Views) -> DiscriminatorOutput:
        """Score the hidden states."""
        hidden = self.pre(views[0])
        feature_maps = []
        for conv in self.convs:
            hidden = F.leaky_relu(conv(hidden), 0.1)
            feature_maps.append(hidden.unsqueeze(-1))
        return [self.conv_post(hidden)], [feature_maps]
