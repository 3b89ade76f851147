"""Encoders and decoders whose computation a caller has changed: by hooks, or by other modules in the place of ours.

The forms that inference derives from the weights compute without the modules. A hook that reads or changes what a
layer gives would not run, and weights that are computed before each call, as `torch.nn.utils.prune` and the older
`weight_norm` and `spectral_norm` do, would never be computed again. Such a part runs as its modules stand.
"""

import torch
from torch import nn

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.modules.activation import CodecActivation


def must_be_called(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether calling a layer does more than the arithmetic of `kind` on its weights."""
    if layer._forward_hooks or layer._forward_pre_hooks or not isinstance(layer, kind):
        return True
    return "forward" in layer.__dict__ or type(layer).forward is not kind.forward


def is_altered(part: nn.Module) -> bool:
    """Return whether an encoder or a decoder computes something else than its weights and settings say."""
    for module in part.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return True
        for name, child in module._modules.items():
            if name == "conv" and must_be_called(child, _conv_kind(child)):  # type: ignore[arg-type]
                return True
            if name.endswith("_activation") and name != "out_activation" and not isinstance(child, CodecActivation):
                return True
    activations = getattr(part, "activations", ())
    return not all(isinstance(activation, CodecActivation) for activation in activations)


def _conv_kind(layer: nn.Module | None) -> type[nn.Module]:
    return nn.ConvTranspose1d if isinstance(layer, nn.ConvTranspose1d) else nn.Conv1d


def refuse_altered(part: nn.Module, name: str) -> None:
    """Raise if a part is altered, where only its derived forms can compute.

    Raises:
        NemoLfrError: saying what can be called instead.
    """
    if is_altered(part):
        raise NemoLfrError(
            f"{name} has forward hooks or modules of another kind, which a stream does not call; remove them, or use "
            "encode and decode."
        )


def run_encoder(encoder: nn.Module, audio: torch.Tensor, num_frames: list[int], width: int) -> torch.Tensor:
    """Call an encoder for each clip of a batch [B, T_audio]; returns encoded frames [B, D, width]."""
    frame = audio.shape[1] // width
    results = []
    for clip, count in zip(audio, num_frames, strict=True):
        length = torch.tensor([count * frame], device=audio.device)
        results.append(encoder(audio=clip[None, : count * frame], audio_len=length)[0])
    return _stacked(results, width)


def run_decoder(decoder: nn.Module, inputs: torch.Tensor, num_frames: list[int], frame: int) -> torch.Tensor:
    """Call a decoder for each utterance of a batch [B, D, T]; returns audio [B, T * frame]."""
    results = []
    for codes, count in zip(inputs, num_frames, strict=True):
        length = torch.tensor([count], device=inputs.device)
        results.append(decoder(inputs=codes[None, :, :count], input_len=length)[0])
    return _stacked(results, inputs.shape[2] * frame)


def _stacked(results: list[torch.Tensor], width: int) -> torch.Tensor:
    return torch.cat([nn.functional.pad(result, (0, width - result.shape[-1])) for result in results])
