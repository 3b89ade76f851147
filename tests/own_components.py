"""Training components as a user writes them: one of each kind, and some with mistakes."""

import torch
import torch.nn.functional as F
from torch import nn

from nemo_lfr.training.audio_discriminator import AudioDiscriminator


class WaveDiscriminator(AudioDiscriminator):
    """Discriminator of the waveform."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, channels, 15, stride=5)
        self.post = nn.Conv1d(channels, 1, 3)

    def score(self, views):
        hidden = F.leaky_relu(self.conv(views[0].unsqueeze(1)), 0.1)
        return [self.post(hidden).squeeze(1)], [[hidden]]


class PairDiscriminator(AudioDiscriminator):
    """Discriminator of two representations."""

    num_networks = 2

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(1, 2, 9, stride=3) for _ in range(2))

    def preprocess(self, audio):
        return [audio.audio, audio.audio.abs()]

    def score(self, views):
        maps = [layer(view.unsqueeze(1)) for layer, view in zip(self.layers, views, strict=True)]
        return [hidden.mean(1) for hidden in maps], [[hidden] for hidden in maps]


class EnvelopeLoss(nn.Module):
    """Difference of envelopes, with a buffer that counts the calls."""

    def __init__(self, window: int = 64) -> None:
        super().__init__()
        self.window = window
        self.gain = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, audio_real, audio_gen, audio_len):
        self.calls += 1
        real, gen = (F.avg_pool1d(audio.abs(), self.window) for audio in (audio_real, audio_gen))
        return self.gain * (real - gen).abs().mean()


class SignalToNoise(nn.Module):
    """Signal-to-noise ratio of the valid samples in dB."""

    def forward(self, audio_real, audio_gen, audio_len):
        valid = torch.arange(audio_real.shape[1], device=audio_real.device) < audio_len[:, None]
        noise = ((audio_real - audio_gen) * valid).square().sum(1)
        return 10 * ((audio_real * valid).square().sum(1) / noise).log10().mean()


class MeanScore(nn.Module):
    """The generator's loss of a Wasserstein GAN."""

    def forward(self, disc_scores_gen):
        return -torch.stack([score.mean() for score in disc_scores_gen]).mean()


class ScoreGap(nn.Module):
    """The discriminators' loss of a Wasserstein GAN."""

    def forward(self, disc_scores_real, disc_scores_gen):
        pairs = zip(disc_scores_real, disc_scores_gen, strict=True)
        return torch.stack([gen.mean() - real.mean() for real, gen in pairs]).mean()


# Mistakes


def a_function(audio_real, audio_gen, audio_len):
    return audio_gen.mean()


class NotAModule:
    pass


class OtherArguments(nn.Module):
    def forward(self, prediction, target):
        return (prediction - target).mean()


class PerExample(nn.Module):
    def forward(self, audio_real, audio_gen, audio_len):
        return (audio_real - audio_gen).abs().mean(1)


class Detached(nn.Module):
    def forward(self, audio_real, audio_gen, audio_len):
        return (audio_real - audio_gen).detach().abs().mean()


class Broken(nn.Module):
    def __init__(self) -> None:
        self.layer = nn.Linear(1, 1)  # before super().__init__()


class Scoreless(AudioDiscriminator):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)


class Weightless(AudioDiscriminator):
    def score(self, views):
        return views, [views]


class ScoresTwoSignals(WaveDiscriminator):
    def score(self, real, gen):
        return super().score([real])


class ScoresOnly(WaveDiscriminator):
    def score(self, views):
        return super().score(views)[0]


class OneNumber(WaveDiscriminator):
    def score(self, views):
        scores, maps = super().score(views)
        return [scores[0].mean()], maps


class FlatMaps(WaveDiscriminator):
    def score(self, views):
        scores, maps = super().score(views)
        return scores, maps[0]


class TwoViews(WaveDiscriminator):
    def preprocess(self, audio):
        return [audio.audio, audio.audio]
