"""Initialize the weights of a codec from data.

With the default initialization, the output of the encoder is almost constant, so FSQ uses a single code for the first
1,000 steps of training. Weights that are initialized from data avoid this.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import IterableDataset

from nemo_lfr.checkpoint.names import GAIN
from nemo_lfr.errors import ConfigError, shorten
from nemo_lfr.modules.conv import Conv1d, ConvTranspose1d
from nemo_lfr.modules.decoder import HiFiGANDecoder
from nemo_lfr.modules.encoder import HiFiGANEncoder


def draw_segments(loader: Any, num_segments: int, samples_per_frame: int, min_frames: int) -> torch.Tensor:
    """Draw a batch of training speech.

    Args:
        loader: `DataLoader`, or another iterable over batches with `audio` [B, T_audio].
        num_segments: batches are drawn until there are at least this many segments, or no more batches.
        samples_per_frame: number of samples per frame.
        min_frames: minimum of T_audio, in frames.

    Returns:
        Audio [B, T_audio] of complete frames. Segments that are shorter than T_audio are padded with zeros.

    Raises:
        ConfigError: if a batch is not a mapping with a tensor `audio`.
    """
    batches: Iterable[Mapping[str, torch.Tensor]] = loader
    rows = getattr(loader, "batch_sampler", None)
    if rows is not None and not isinstance(loader.dataset, IterableDataset):
        # Bypass the loader's iterator: with persistent workers, training would continue the same iterator.
        batches = (loader.collate_fn([loader.dataset[row] for row in batch]) for batch in rows)
    audio: list[torch.Tensor] = []
    for drawn in batches:
        if not isinstance(drawn, Mapping) or not isinstance(drawn.get("audio"), torch.Tensor):
            described = f"a {type(drawn).__name__}"
            if isinstance(drawn, Mapping):
                described += f" with the keys {shorten(list(drawn))}"
            raise ConfigError(
                f"initialize_from_data needs batches with a tensor 'audio', but the loader returns {described}; "
                "set model.initialize_from_data=false."
            )
        audio += [*drawn["audio"]]
        if len(audio) >= num_segments:
            break
    frames = max(segment.shape[-1] for segment in audio) // samples_per_frame
    length = max(frames, min_frames) * samples_per_frame
    return torch.stack([F.pad(segment, (0, max(0, length - len(segment))))[:length] for segment in audio])


@torch.no_grad()
def initialize_from_data(
    encoder: HiFiGANEncoder,
    quantizer: nn.Module,
    decoder: HiFiGANDecoder,
    audio: torch.Tensor,
    encoded_spread: float = 0.9,
    output_spread: float = 0.1,
) -> None:
    """Rescale every convolution so that its output on speech has a standard deviation of 1.

    The outputs of the last convolutions of the encoder and of the decoder get the standard deviations `encoded_spread`
    and `output_spread` instead. Convolutions with frozen parameters stay unchanged.

    Args:
        encoder: encoder to change in place.
        quantizer: quantizer between encoder and decoder; it is not changed.
        decoder: decoder to change in place.
        audio: batch of speech, shape [B, T_audio]. T_audio is a multiple of the number of samples per frame.
        encoded_spread: standard deviation of each dimension of the encoder output. The mean becomes 0.
        output_spread: standard deviation of the waveform before the output activation.
    """

    def rescale(module: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        conv = module.conv
        assert isinstance(conv, nn.Conv1d | nn.ConvTranspose1d)
        assert conv.bias is not None
        if not all(parameter.requires_grad for parameter in conv.parameters()):
            return output
        if module is encoder.post_conv:
            mean = output.mean(dim=(0, 2))
            scale = encoded_spread / output.std(dim=(0, 2)).clamp_min(1e-8)
            _multiply_weight(conv, scale[:, None, None])
            conv.bias.sub_(mean).mul_(scale)
            return (output - mean[:, None]) * scale[:, None]
        spread = output_spread if module is decoder.post_conv else 1.0
        factor = spread / output.std().clamp_min(1e-8)
        _multiply_weight(conv, factor)
        conv.bias.mul_(factor)
        return output * factor

    parts = [module for part in (encoder, decoder) for module in part.modules()]
    hooks = [part.register_forward_hook(rescale) for part in parts if isinstance(part, Conv1d | ConvTranspose1d)]
    try:
        codes, _ = quantizer(encoder.encode_frames(audio))
        decoder.decode_frames(codes)
    finally:
        for hook in hooks:
            hook.remove()


def _multiply_weight(conv: nn.Conv1d | nn.ConvTranspose1d, factor: torch.Tensor) -> None:
    """Multiply the weight of a convolution by a factor. With weight norm, multiply the gain instead.

    The factor is a scalar or, for `nn.Conv1d`, a tensor [H_out, 1, 1].
    """
    gain = dict(conv.named_parameters()).get(GAIN.removeprefix("."))
    (conv.weight if gain is None else gain).mul_(factor)
