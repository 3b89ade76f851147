"""Discriminators for periods, complex STFTs and hidden states of WavLM ("SLM").

`preprocess` computes a representation of the audio, such as spectra, without trainable weights. Then `score` computes
scores and feature maps from the representation.

State-dict keys are the same as in the NeMo classes that these classes replace. A custom discriminator is a subclass of
`AudioDiscriminator`; see `nemo_lfr.training.components`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from nemo_lfr.errors import ConfigError, MissingExtraError, quoted, shorten
from nemo_lfr.signal.spectra import Spectra
from nemo_lfr.training.audio_discriminator import (
    AudioDiscriminator,
    DiscriminatorOutput,
    Views,
    preprocess_audio,
    score_views,
)
from nemo_lfr.training.components import build_component, check_accepts
from nemo_lfr.training.networks import Conv2d, Network, PadMode
from nemo_lfr.training.settings import COUNT, Range, check_counts, check_resolutions, check_settings
from nemo_lfr.training.slm_discriminator import SLMDiscriminator


class PeriodDiscriminator(Network):
    """Discriminator whose input is audio folded into rows of `period` samples (HiFi-GAN, arXiv 2010.05646).

    Args:
        period: number of samples in a row.
        lrelu_slope: negative slope of the leaky ReLUs.
        channels: number of output channels of the first layer; 32 in NeMo.
        pad_mode: "reflect" or "zeros".
    """

    def __init__(
        self, period: int, lrelu_slope: float = 0.1, channels: int = 32, pad_mode: PadMode = "reflect"
    ) -> None:
        widths = [1, channels, 4 * channels, 16 * channels, 32 * channels]
        conv = partial(Conv2d, pad_mode=pad_mode)
        layers = [conv(*pair, kernel_size=(5, 1), stride=(3, 1)) for pair in pairwise(widths)]
        layers.append(conv(widths[-1], widths[-1], kernel_size=(5, 1)))
        super().__init__(layers, conv(widths[-1], 1, kernel_size=(3, 1)), lrelu_slope)
        self.period = period

    def view(self, audio: torch.Tensor) -> torch.Tensor:
        """Fold audio [B, T_audio] to [B, 1, ceil(T_audio / period), period]."""
        missing = -audio.shape[-1] % self.period
        return torch.unflatten(F.pad(audio.unsqueeze(1), (0, missing), "reflect"), 2, (-1, self.period))


class _Networks(AudioDiscriminator):
    """Base class for discriminators that have one network for each view."""

    discriminators: nn.ModuleList

    @property
    def num_networks(self) -> int:
        """Return the number of networks."""
        return len(self.discriminators)

    @property
    def min_samples(self) -> int:
        """Return the length, in samples, of the shortest audio that all networks accept."""
        return max(self._min_samples(network) for network in cast(Iterable[Network], self.discriminators))

    def _min_samples(self, network: Network) -> int:
        raise NotImplementedError

    def score(self, views: Views) -> DiscriminatorOutput:
        """Score each view with its own network."""
        outputs = [network(view) for network, view in zip(self.discriminators, views, strict=True)]
        return [score for score, _ in outputs], [maps for _, maps in outputs]


class MultiPeriodDiscriminator(_Networks):
    """Discriminator with one `PeriodDiscriminator` for each of several periods.

    Args:
        periods: period of each network in samples.
        lrelu_slope: negative slope of the leaky ReLUs.
        channels: number of output channels of each network's first layer; 32 in NeMo.
        pad_mode: "reflect" or "zeros".
    """

    def __init__(
        self,
        periods: Sequence[int] = (2, 3, 5, 7, 11),
        lrelu_slope: float = 0.1,
        channels: int = 32,
        pad_mode: PadMode = "reflect",
    ) -> None:
        super().__init__()
        check_counts(periods, "periods")
        check_settings({"channels": channels}, {"channels": COUNT})
        networks = [PeriodDiscriminator(period, lrelu_slope, channels, pad_mode) for period in periods]
        self.discriminators = nn.ModuleList(networks)

    def _min_samples(self, network: Network) -> int:
        # The network needs enough rows. Padding the last row by reflection needs one complete row before it.
        return max(network.least_size(0) - 1, 1) * cast(PeriodDiscriminator, network).period + 1

    def preprocess(self, audio: Spectra) -> Views:
        """Fold the audio into rows, once for each period."""
        return [network.view(audio.audio) for network in cast(Iterable[PeriodDiscriminator], self.discriminators)]


def stft_view(audio: Spectra, resolution: Sequence[int]) -> torch.Tensor:
    """Return the STFT of audio as two channels, scaled by 1 / sqrt(n_fft).

    The result has the channels-last memory layout: real and imaginary parts alternate in memory.

    Args:
        audio: signals [B, T_audio] with cached STFTs.
        resolution: (n_fft, hop, window) in samples.

    Returns:
        Real and imaginary parts, shape [B, 2, frames, bins].
    """
    stft = audio.stft(resolution).transpose(1, 2) * resolution[0] ** -0.5
    return torch.view_as_real(stft).permute(0, 3, 1, 2)


class DiscriminatorSTFT(Network):
    """Discriminator whose input is a complex STFT (EnCodec, arXiv 2210.13438).

    Args:
        resolution: (n_fft, hop, window) in samples.
        lrelu_slope: negative slope of the leaky ReLUs.
        pad_mode: "reflect" or "zeros".
    """

    def __init__(self, resolution: Sequence[int], lrelu_slope: float = 0.1, pad_mode: PadMode = "reflect") -> None:
        conv = partial(Conv2d, pad_mode=pad_mode)
        layers = [conv(2, 32, kernel_size=(3, 9))]
        layers += [conv(32, 32, kernel_size=(3, 9), stride=(1, 2), dilation=(step, 1)) for step in (1, 2, 4)]
        layers.append(conv(32, 32, kernel_size=(3, 3)))
        super().__init__(layers, conv(32, 1, kernel_size=(3, 3)), lrelu_slope)
        self.resolution = tuple(resolution)
        self.check_bins(self.resolution[0] // 2 + 1, f"the resolution {list(resolution)}")
        # Not used, because `Spectra` computes the STFT, but NeMo's checkpoints contain this Hann window.
        self.register_buffer("window", torch.hann_window(self.resolution[2], periodic=False))

    def view(self, audio: Spectra) -> torch.Tensor:
        """Return the real and imaginary parts of the STFT, [B, 2, frames, bins]."""
        return stft_view(audio, self.resolution)


class MultiResolutionDiscriminatorSTFT(_Networks):
    """Discriminator with one `DiscriminatorSTFT` for each resolution.

    Args:
        resolutions: (n_fft, hop, window) of each network, in samples.
        pad_mode: "reflect" or "zeros".
    """

    def __init__(self, resolutions: Sequence[Sequence[int]], pad_mode: PadMode = "reflect") -> None:
        super().__init__()
        check_resolutions(resolutions, "resolutions")
        self.discriminators = nn.ModuleList(
            DiscriminatorSTFT(resolution, pad_mode=pad_mode) for resolution in resolutions
        )

    def _min_samples(self, network: Network) -> int:
        return _stft_samples(network, cast(DiscriminatorSTFT, network).resolution)

    def preprocess(self, audio: Spectra) -> Views:
        """Return the real and imaginary parts of the STFT at each resolution, [B, 2, frames, bins]."""
        return [network.view(audio) for network in cast(Iterable[DiscriminatorSTFT], self.discriminators)]


class MultiBandDiscriminatorSTFT(_Networks):
    """Discriminator with one network for each frequency band of an STFT (DAC, arXiv 2306.06546).

    NanoCodec was trained with this discriminator.

    Args:
        resolution: (n_fft, hop, window) in samples.
        stft_bands: start and end of each band, as fractions of the number of bins.

    Raises:
        ConfigError: if an argument is invalid, or a band has too few bins.
    """

    def __init__(self, resolution: Sequence[int], stft_bands: Sequence[Sequence[float]]) -> None:
        super().__init__()
        check_resolutions([resolution], "resolutions")
        if not (isinstance(stft_bands, Sequence) and stft_bands and all(map(_is_band, stft_bands))):
            raise ConfigError(
                f"stft_bands is {quoted(stft_bands)}; pass a list of [start, end] with 0 <= start < end <= 1."
            )
        self.resolution = tuple(resolution)
        self.register_buffer(
            "window", torch.hann_window(self.resolution[2], periodic=False)
        )  # as in DiscriminatorSTFT
        bins = self.resolution[0] // 2 + 1
        self.bands = [slice(int(low * bins), int(high * bins)) for low, high in stft_bands]
        self.discriminators = nn.ModuleList(_band_network() for _ in self.bands)
        for network, band in zip(cast(Iterable[Network], self.discriminators), self.bands, strict=True):
            network.check_bins(len(range(bins)[band]), f"a band of stft_bands at the resolution {list(resolution)}")

    def _min_samples(self, network: Network) -> int:
        return _stft_samples(network, self.resolution)

    def preprocess(self, audio: Spectra) -> Views:
        """Return the frequency bands of the STFT, each [B, 2, frames, bins of the band]."""
        view = stft_view(audio, self.resolution)
        return [view[..., band] for band in self.bands]


def _stft_samples(network: Network, resolution: Sequence[int]) -> int:
    """Return the length, in samples, of the shortest audio whose STFT has enough frames for a network."""
    n_fft, hop, _ = resolution
    return max((network.least_size(0) - 1) * hop, n_fft // 2 + 1)


def _is_band(band: Any) -> bool:
    """Return whether a value is a pair (start, end) with 0 <= start < end <= 1."""
    is_pair = isinstance(band, Sequence) and len(band) == 2 and all(Range(False, 0, 1).contains(edge) for edge in band)
    return is_pair and band[0] < band[1]


def _band_network() -> Network:
    layers = [Conv2d(2, 32, kernel_size=(3, 9))]
    layers += [Conv2d(32, 32, kernel_size=(3, 9), stride=(1, 2)) for _ in range(3)]
    layers.append(Conv2d(32, 32, kernel_size=(3, 3)))
    return Network(layers, Conv2d(32, 1, kernel_size=(3, 3)), lrelu_slope=0.1)


class Discriminator(AudioDiscriminator):
    """Discriminator that combines the networks of several discriminators."""

    def __init__(self, discriminators: Sequence[AudioDiscriminator]) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(discriminators)

    def _each(self) -> Iterable[AudioDiscriminator]:
        return cast(Iterable[AudioDiscriminator], self.discriminators)

    @property
    def num_networks(self) -> int:
        """Return the total number of networks in all discriminators."""
        return sum(discriminator.num_networks for discriminator in self._each())

    @property
    def min_samples(self) -> int:
        """Return the length, in samples, of the shortest audio that every discriminator can score."""
        return max((discriminator.min_samples for discriminator in self._each()), default=1)

    def preprocess(self, audio: Spectra) -> Views:
        """Return the views of all discriminators, in order."""
        return [view for discriminator in self._each() for view in preprocess_audio(discriminator, audio)]

    def score(self, views: Views) -> DiscriminatorOutput:
        """Score the views of each discriminator, and concatenate all scores and all feature maps."""
        scores: list[torch.Tensor] = []
        feature_maps: list[list[torch.Tensor]] = []
        rest = iter(views)
        for discriminator in self._each():
            own = score_views(discriminator, [next(rest) for _ in range(discriminator.num_networks)])
            scores += own[0]
            feature_maps += own[1]
        return scores, feature_maps


class MultiBandMultiResolutionDiscriminatorSTFT(Discriminator):
    """Discriminator with one `MultiBandDiscriminatorSTFT` for each resolution.

    In NeMo, the corresponding class is `audio_codec_modules.MultiResolutionDiscriminatorSTFT`.

    Args:
        resolutions: (n_fft, hop, window) of each STFT, in samples.
        stft_bands: start and end of each band, as fractions of the number of bins.

    Raises:
        ConfigError: if an argument is invalid, or a band has too few bins.
    """

    def __init__(self, resolutions: Sequence[Sequence[int]], stft_bands: Sequence[Sequence[float]]) -> None:
        check_resolutions(resolutions, "resolutions")
        super().__init__([MultiBandDiscriminatorSTFT(resolution, stft_bands) for resolution in resolutions])


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Freeze the parameters of a module inside this context.

    Gradients still flow through the module to its inputs.

    Args:
        module: module to freeze.
    """
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


_NEMO = "nemo.collections.tts.modules."
# For each NeMo class, by import path: the class of this package that replaces it
NEMO_DISCRIMINATORS: dict[str, type[AudioDiscriminator]] = {
    _NEMO + "audio_codec_modules.Discriminator": Discriminator,
    _NEMO + "audio_codec_modules.MultiPeriodDiscriminator": MultiPeriodDiscriminator,
    _NEMO + "audio_codec_modules.SLMDiscriminator": SLMDiscriminator,
    _NEMO + "audio_codec_modules.MultiResolutionDiscriminatorSTFT": MultiBandMultiResolutionDiscriminatorSTFT,
    _NEMO + "encodec_modules.MultiResolutionDiscriminatorSTFT": MultiResolutionDiscriminatorSTFT,
}
_OUR_DISCRIMINATORS = {f"{ours.__module__}.{ours.__name__}": ours for ours in NEMO_DISCRIMINATORS.values()}
# For each `_target_` that needs no import: its class
BUILT_IN = {**NEMO_DISCRIMINATORS, **_OUR_DISCRIMINATORS}


def build_discriminator(config: Mapping[str, Any]) -> AudioDiscriminator:
    """Build the discriminator that a model config describes.

    Args:
        config: section `discriminator` of the config. The section contains the arguments of the constructor and
            `_target_`, which names a class in NeMo, a class in this package, or a registered class.

    Returns:
        The discriminator, with random weights.

    Raises:
        ConfigError: if the class or an argument is unknown, or the discriminator is not valid.
    """
    ours = BUILT_IN.get(str(config.get("_target_", "")))
    if ours is None:
        return _custom_discriminator(config)
    arguments = {key: value for key, value in config.items() if not str(key).startswith("_")}
    if ours is Discriminator and "discriminators" in arguments:
        sections = arguments["discriminators"]
        if not isinstance(sections, list) or not sections or not all(isinstance(item, Mapping) for item in sections):
            raise ConfigError(f"discriminator.discriminators is {quoted(sections)}; pass a list of sections.")
        arguments["discriminators"] = [build_discriminator(section) for section in sections]
    try:
        return ours(**arguments)
    except ConfigError as error:
        raise ConfigError(f"discriminator: {ours.__name__}: {error}") from error
    except MissingExtraError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:  # values of any type reach the constructors
        reason = shorten(" ".join(str(error).split()), 200)
        raise ConfigError(
            f"discriminator: {ours.__name__} cannot be built: {reason}; correct its arguments."
        ) from error


def _custom_discriminator(config: Mapping[str, Any]) -> AudioDiscriminator:
    """Build a registered discriminator, and check its methods and parameters."""
    module = build_component(config, "discriminator", AudioDiscriminator, NEMO_DISCRIMINATORS)
    what = f"discriminator: {config['_target_']}"
    if type(module).score is AudioDiscriminator.score:
        raise ConfigError(f"{what} does not define score(views); define this method.")
    check_accepts(module.score, what, (), "views")
    check_accepts(module.preprocess, what, (), "audio")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError(f"{what} has no trainable parameters; add layers that can be trained.")
    return module
