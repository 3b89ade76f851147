"""Codec as a `PreTrainedModel`, with an interface similar to that of `MimiModel`."""

import copy
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedAudioTokenizerBase
from transformers.utils.generic import ModelOutput

from nemo_lfr.checkpoint.config import CONFIG_KEYS, build_parts
from nemo_lfr.checkpoint.folder import move_files, record_checksum
from nemo_lfr.checkpoint.names import gain_of
from nemo_lfr.checkpoint.reader import read_weights
from nemo_lfr.codec.ambient import building_state
from nemo_lfr.codec.codec import Codec
from nemo_lfr.codec.torch_backend import TorchBackend
from nemo_lfr.errors import AudioError, CheckpointError, ConfigError, TokensError, counted, quoted
from nemo_lfr.io.atomic import writing_folder
from nemo_lfr.modules.altered import SAVE
from nemo_lfr.modules.quantizer import FiniteScalarQuantizer
from nemo_lfr.transformers.arguments import check_tensor, checked_files, mask_lengths
from nemo_lfr.transformers.configuration import NemoLfrConfig
from nemo_lfr.transformers.copies import Copies

_HUB_ARGUMENTS = {
    "repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags"
}  # fmt: skip


@dataclass
class NemoLfrEncoderOutput(ModelOutput):
    """Result of `NemoLfrModel.encode`.

    Attributes:
        audio_codes: tokens [B, C, frames] as int64, zero after the end of a clip.
        audio_codes_mask: mask [B, frames], 1 for the frames of a clip and 0 after its end.
    """

    audio_codes: torch.Tensor | None = None
    audio_codes_mask: torch.Tensor | None = None


@dataclass
class NemoLfrDecoderOutput(ModelOutput):
    """Result of `NemoLfrModel.decode`.

    Attributes:
        audio_values: audio [B, 1, T_audio], which is zero after the end of a clip.
    """

    audio_values: torch.Tensor | None = None


@dataclass
class NemoLfrOutput(ModelOutput):
    """Result of `NemoLfrModel.forward`, with the attributes of `NemoLfrEncoderOutput` and `NemoLfrDecoderOutput`."""

    audio_codes: torch.Tensor | None = None
    audio_values: torch.Tensor | None = None
    audio_codes_mask: torch.Tensor | None = None


class NemoLfrModel(Copies, PreTrainedAudioTokenizerBase):
    """Low Frame-rate Speech Codec, for inference.

    Args:
        config: config of the modules. The constructor initializes them with random weights; call `from_pretrained` to
            load a checkpoint.
    """

    config_class = NemoLfrConfig
    base_model_prefix = "nemo_lfr"
    main_input_name = "input_values"
    input_modalities = "audio"
    _no_split_modules: ClassVar = ["HiFiGANEncoder", "HiFiGANDecoder"]  # type: ignore[misc]
    # Weights stay in fp32 whatever `dtype` is passed to `from_pretrained`, because tokens depend on them. The
    # quantizer is not listed, because its buffers are int32.
    _keep_in_fp32_modules: ClassVar = ["audio_encoder", "audio_decoder"]  # type: ignore[misc]
    _keep_in_fp32_modules_strict: ClassVar = ["audio_encoder", "audio_decoder"]  # type: ignore[misc]

    def __init__(self, config: NemoLfrConfig) -> None:
        super().__init__(config)
        parts = build_parts(config.to_dict(), weight_norm=True)
        self.audio_encoder = parts.encoder
        self.vector_quantizer = parts.quantizer
        self.audio_decoder = parts.decoder
        self._codec: tuple[Any, Codec[torch.Tensor]] | None = None
        self._is_validated = False
        self._built_for = {key: getattr(config, key) for key in ("sample_rate", "samples_per_frame")}
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model; the arguments are those of `PreTrainedModel.from_pretrained`.

        The files are validated as in `nemo_lfr.load`. A missing weight is an error.

        Raises:
            CheckpointError: if a file is damaged, is not a safetensors file, or does not match the config or the
                index. Also if the model is not in the local cache, and the Hub cannot be reached.
        """
        with checked_files(pretrained_model_name_or_path, **kwargs):
            result = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        if not model._is_validated and kwargs.get("state_dict") is None:
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: transformers loaded these weights without validation; pass a "
                "folder with model.safetensors, or use nemo_lfr.load."
            )
        return result

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: list[str] | None, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Read the weights with this package's reader, which validates them, and then load them with transformers."""
        if state_dict is None and checkpoint_files:
            shards = (load_config.sharded_metadata or {}).get("weight_map")
            with building_state():
                config = {key: getattr(model.config, key) for key in CONFIG_KEYS}
                state_dict = read_weights(checkpoint_files, config, shards)
            model._is_validated = True
        load = PreTrainedAudioTokenizerBase._load_pretrained_model
        return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the model; the arguments are those of `PreTrainedModel.save_pretrained`.

        Unless `variant` is passed, `config.json` contains the SHA-256 of `model.safetensors` or of each shard, so that
        loading fails if the weights in the folder are replaced. If saving fails, an earlier save in the folder
        remains.

        Raises:
            NemoLfrError: if the saved model would give other results, for example because of hooks, replaced layers or
                a changed `config`.
        """
        if getattr(self, "_hf_peft_config_loaded", False):  # transformers then saves only the adapter
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
            return
        backend: Any = self.codec.backend
        backend.check_described(SAVE)
        backend.check_weights()
        folder, variant = Path(save_directory), kwargs.get("variant")
        hub = {key: kwargs.pop(key) for key in _HUB_ARGUMENTS & kwargs.keys()}
        if not is_main_process or folder.is_file():
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
            return
        folder.mkdir(parents=True, exist_ok=True)
        with writing_folder(folder) as temporary:
            super().save_pretrained(temporary, is_main_process, state_dict, **kwargs)
            if variant is None:
                record_checksum(temporary)
            move_files(temporary, folder, "model" if variant is None else f"model.{variant}")
        if push_to_hub:
            upload: Any = self.push_to_hub
            upload(hub.pop("repo_id", None) or folder.resolve().name, **hub)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the weights of a module at random; transformers calls this if a checkpoint does not have them."""
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            norm: Any = module.parametrizations.weight  # type: ignore[union-attr]
            init.kaiming_uniform_(norm.original1, a=math.sqrt(5))
            init.copy_(norm.original0, gain_of(norm.original1))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, FiniteScalarQuantizer):
            fresh = FiniteScalarQuantizer(module.levels, module.eps)
            init.copy_(module.num_levels, fresh.num_levels)
            init.copy_(module.dim_base_index, fresh.dim_base_index)
        elif isinstance(alpha := getattr(module, "alpha", None), nn.Parameter):
            init.ones_(alpha)

    @property
    def codec(self) -> Codec[torch.Tensor]:
        """`nemo_lfr.Codec` that uses this model's modules, for files and streams.

        Raises:
            ConfigError: if `config.sample_rate` or `config.samples_per_frame` was changed.
        """
        for key, value in self._built_for.items():
            if (changed := getattr(self.config, key)) != value:
                raise ConfigError(
                    f"config.{key} is {quoted(changed)}, but the model was built for {value}; set config.{key} to "
                    f"{value} again. Audio at another rate has to be resampled."
                )
        # A copy, because the sections of the config are dicts, which can be changed in place
        config = copy.deepcopy({key: getattr(self.config, key) for key in CONFIG_KEYS})
        modules = (self.audio_encoder, self.vector_quantizer, self.audio_decoder)
        made_of = (*modules, next(self.audio_decoder.parameters()).device, config)
        if self._codec is None or self._codec[0] != made_of:
            name = self.config._name_or_path or type(self).__name__
            backend = TorchBackend(*modules, self.config.sample_rate, name=name, config=config)
            self._codec = made_of, Codec(backend)
        return self._codec[1]

    def encode(
        self,
        input_values: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        num_codebooks: int | None = None,
        return_dict: bool | None = None,
    ) -> NemoLfrEncoderOutput | tuple[torch.Tensor, ...]:
        """Encode audio to tokens.

        Args:
            input_values: audio at the codec's rate, [B, 1, T_audio] or [B, T_audio].
            padding_mask: mask [B, T_audio] or [B, 1, T_audio], 1 for the samples of a clip and 0 after its end.
                Default: all samples.
            num_codebooks: number of codebooks to return, starting with the first. Default: all.
            return_dict: whether to return an output object (default) or a tuple.

        Raises:
            AudioError: if `input_values` or the mask has the wrong type or shape, if samples are NaN, infinite or far
                outside [-1, 1], or if the mask is invalid.
            TokensError: for an invalid `num_codebooks`.
        """
        check_tensor(input_values, "input_values", AudioError)
        if input_values.dim() == 3 and input_values.shape[1] == 1:
            input_values = input_values[:, 0]
        if input_values.dim() != 2:
            raise AudioError(f"input_values has shape {list(input_values.shape)}; expected [B, 1, T_audio], mono.")
        lengths = mask_lengths(padding_mask, input_values.shape, "padding_mask", AudioError)
        if lengths is None:
            lengths = torch.full((len(input_values),), input_values.shape[1])
        codes, codes_len = self.codec.encode(input_values, lengths, self.config.sample_rate, num_codebooks)
        mask = torch.arange(codes.shape[2], device=codes.device) < codes_len.to(codes.device)[:, None]
        result = NemoLfrEncoderOutput(audio_codes=codes.long(), audio_codes_mask=mask.long())
        return result if self._wants_dict(return_dict) else result.to_tuple()

    def decode(
        self,
        audio_codes: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        audio_codes_mask: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> NemoLfrDecoderOutput | tuple[torch.Tensor, ...]:
        """Decode tokens to audio.

        Args:
            audio_codes: tokens [B, C, frames]. C may be smaller than the codec's number of codebooks, if only the
                first codebooks were encoded.
            padding_mask: mask of samples that was passed to `encode`. If it is passed, the audio has the same length
                as the mask.
            audio_codes_mask: mask [B, frames], 1 for the frames of a clip and 0 after its end; not needed with
                `padding_mask`. Pass it by name, because the second argument is `padding_mask`, as in `MimiModel`.
            return_dict: whether to return an output object (default) or a tuple.

        Raises:
            TokensError: if an argument has the wrong type or shape, if a token is outside the codebook, or if a mask
                is invalid or does not fit the tokens or the other mask.
        """
        return self._decode(audio_codes, padding_mask, audio_codes_mask, return_dict)

    def _decode(
        self,
        audio_codes: torch.Tensor,
        padding_mask: torch.Tensor | None,
        audio_codes_mask: torch.Tensor | None,
        return_dict: bool | None,
        *,
        is_frame_mask_possible: bool = True,
    ) -> NemoLfrDecoderOutput | tuple[torch.Tensor, ...]:
        """Decode as `decode` does.

        If `is_frame_mask_possible` is set, a `padding_mask` with one column is refused, because it may be for one
        sample or for one frame.
        """
        check_tensor(audio_codes, "audio_codes", TokensError)
        if audio_codes.dim() != 3:
            raise TokensError(f"audio_codes has shape {list(audio_codes.shape)}; expected [B, C, frames].")
        batch, kept, frames = audio_codes.shape
        frames_len = mask_lengths(audio_codes_mask, (batch, frames), "audio_codes_mask", TokensError)
        samples, width = None, None
        if padding_mask is not None:
            check_tensor(padding_mask, "padding_mask", TokensError)
            width = padding_mask.shape[-1] if padding_mask.dim() else 0
            samples = mask_lengths(padding_mask, (batch, width), "padding_mask", TokensError)
            assert samples is not None
            needed = -(-samples // self.config.samples_per_frame)
            # Without a mask of frames, the longest clip must have all frames. A mask of one column is ambiguous: it
            # may be for one sample or for one frame.
            fits = int(needed.max()) == frames if frames_len is None else torch.equal(needed, frames_len)
            if len(samples) and not (fits and (width > 1 or not is_frame_mask_possible)):
                if fits:
                    fault = "padding_mask has only one column, so it may be a mask of frames"
                elif frames_len is None:
                    fault = (
                        f"the longest clip in padding_mask has {counted(int(samples.max()), 'sample')} "
                        f"({counted(int(needed.max()), 'frame')}), but audio_codes has {counted(frames, 'frame')}"
                    )
                else:
                    row = int((needed != frames_len).nonzero()[0])
                    fault = (
                        f"clip {row} has {counted(int(samples[row]), 'sample')} "
                        f"({counted(int(needed[row]), 'frame')}) in padding_mask, but "
                        f"{counted(int(frames_len[row]), 'frame')} in audio_codes_mask"
                    )
                raise TokensError(
                    f"{fault}; pass the padding_mask that encode got. A mask of frames is passed by name: "
                    "audio_codes_mask=MASK."
                )
            frames_len = needed
        first = kept if kept < self.codec.num_codebooks else None
        audio, _ = self.codec.decode(audio_codes, frames_len, samples, first)
        if width is not None:
            audio = nn.functional.pad(audio, (0, width - audio.shape[1]))
        result = NemoLfrDecoderOutput(audio_values=audio[:, None])
        return result if self._wants_dict(return_dict) else result.to_tuple()

    def forward(
        self,
        input_values: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        num_codebooks: int | None = None,
        return_dict: bool | None = None,
    ) -> NemoLfrOutput | tuple[torch.Tensor, ...]:
        """Encode audio to tokens and decode the tokens again; see `encode` for the arguments.

        In the result, `audio_values` has the length of `input_values`.
        """
        check_tensor(input_values, "input_values", AudioError)
        encoded: Any = self.encode(input_values, padding_mask, num_codebooks, return_dict=True)
        if padding_mask is None:
            padding_mask = torch.ones(len(input_values), input_values.shape[-1], dtype=torch.long)
        decoded: Any = self._decode(encoded.audio_codes, padding_mask, None, True, is_frame_mask_possible=False)
        result = NemoLfrOutput(
            audio_codes=encoded.audio_codes,
            audio_values=decoded.audio_values,
            audio_codes_mask=encoded.audio_codes_mask,
        )
        return result if self._wants_dict(return_dict) else result.to_tuple()

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return bool(getattr(self.config, "return_dict", True) if return_dict is None else return_dict)
