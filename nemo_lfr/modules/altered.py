"""Detect networks that a caller has altered with hooks or replaced layers, and run them through their modules.

Fast inference (packed weights on a CPU, plans on CUDA) uses copies of the weights and does not call the modules.
Forward hooks would not run. Weights that a hook recomputes before each call would not be updated;
`torch.nn.utils.prune` and the older `weight_norm` and `spectral_norm` work this way. Altered networks are therefore
run by calling their modules.
"""

import torch
from torch import nn

from nemo_lfr.errors import NemoLfrError
from nemo_lfr.modules.activation import CodecActivation


def must_be_called(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a layer must be run by calling it.

    This is the case if the layer has hooks, or if its `forward` method is not the `forward` of `kind`.
    """
    if layer._forward_hooks or layer._forward_pre_hooks or not isinstance(layer, kind):
        return True
    return "forward" in layer.__dict__ or type(layer).forward is not kind.forward


def is_altered(network: nn.Module) -> bool:
    """Return whether a network has hooks, patched methods or replaced layers."""
    for module in network.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return True
        for name, child in module._modules.items():
            if name == "conv" and must_be_called(child, _conv_kind(child)):  # type: ignore[arg-type]
                return True
            if name.endswith("_activation") and name != "out_activation" and not isinstance(child, CodecActivation):
                return True
    activations = getattr(network, "activations", ())
    return not all(isinstance(activation, CodecActivation) for activation in activations)


def _conv_kind(layer: nn.Module | None) -> type[nn.Module]:
    return nn.ConvTranspose1d if isinstance(layer, nn.ConvTranspose1d) else nn.Conv1d


def check_unaltered(network: nn.Module, name: str) -> None:
    """Raise an error if a network is altered. Streams need this check, because they do not call its modules.

    Args:
        network: encoder or decoder.
        name: name of the network, for messages.

    Raises:
        NemoLfrError: if the network is altered.
    """
    if is_altered(network):
        raise NemoLfrError(
            f"{name} has forward hooks or replaced layers, which a stream does not call; remove them, or use encode "
            "and decode instead of streams."
        )


def run_encoder(encoder: nn.Module, audio: torch.Tensor, num_frames: list[int], width: int) -> torch.Tensor:
    """Encode each clip of a batch [B, T_audio] separately by calling the module; return frames [B, D, width]."""
    frame = audio.shape[1] // width
    results = []
    for clip, count in zip(audio, num_frames, strict=True):
        length = torch.tensor([count * frame], device=audio.device)
        results.append(encoder(audio=clip[None, : count * frame], audio_len=length)[0])
    return _stacked(results, width)


def run_decoder(decoder: nn.Module, inputs: torch.Tensor, num_frames: list[int], frame: int) -> torch.Tensor:
    """Decode each utterance of a batch [B, D, T] separately by calling the module; return audio [B, T * frame]."""
    results = []
    for codes, count in zip(inputs, num_frames, strict=True):
        length = torch.tensor([count], device=inputs.device)
        results.append(decoder(inputs=codes[None, :, :count], input_len=length)[0])
    return _stacked(results, inputs.shape[2] * frame)


def _stacked(results: list[torch.Tensor], width: int) -> torch.Tensor:
    return torch.cat([nn.functional.pad(result, (0, width - result.shape[-1])) for result in results])
