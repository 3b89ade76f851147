"""Feature extractor of the codec: it pads clips, stacks them in a batch, and returns a mask."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import logging

from nemo_lfr.codec.arguments import check_not_empty, float_audio
from nemo_lfr.codec.arrays import NumpyArrays
from nemo_lfr.codec.clips import is_list_of_clips
from nemo_lfr.codec.tables import as_list
from nemo_lfr.errors import AudioError, ConfigError, quoted, shorten
from nemo_lfr.io.audio import check_peak

logger = logging.get_logger(__name__)


class NemoLfrFeatureExtractor(SequenceFeatureExtractor):
    """Feature extractor that pads clips, stacks them in a batch, and returns a mask of their samples.

    Args:
        feature_size: number of channels, which must be 1.
        sampling_rate: sample rate of the codec, Hz.
        padding_value: value of the samples after the end of a clip.
        hop_length: number of samples per frame.
        kwargs: arguments of `SequenceFeatureExtractor`. Clips are always padded on the right.

    Raises:
        ConfigError: if `padding_side` is not "right".
    """

    model_input_names = ("input_values", "padding_mask")

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 22050,
        padding_value: float = 0.0,
        hop_length: int = 1024,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.hop_length = hop_length
        self._check_padding_side()

    def __call__(
        self,
        raw_audio: Any,
        padding: bool | str | None = True,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        sampling_rate: int | None = None,
    ) -> BatchFeature:
        """Convert one clip or a list of clips.

        Args:
            raw_audio: mono samples, [T_audio], or a list of such clips; floating point in [-1, 1], or int16.
            padding: True or "longest" pads all clips to the length of the longest one, "max_length" pads them to
                `max_length`, and False or None does not pad.
            truncation: whether to cut clips at `max_length`.
            max_length: length in samples for `padding` and `truncation`.
            return_tensors: "pt" or "np"; None for lists of arrays.
            sampling_rate: sample rate of `raw_audio`, Hz. It must be the codec's sample rate. If it is None, the
                codec's sample rate is assumed, and a warning is logged.

        Returns:
            `input_values` [B, 1, T_audio] and, if clips are padded, `padding_mask` [B, T_audio].

        Raises:
            ConfigError: if `padding_side` is not "right".
            AudioError: if `sampling_rate` is not the codec's sample rate, or `raw_audio` is invalid, such as a path.
        """
        self._check_padding_side()
        if sampling_rate is None:
            logger.warning_once(
                f"sampling_rate is missing, so audio is assumed to be at {self.sampling_rate} Hz; pass "
                f"sampling_rate={self.sampling_rate} to confirm."
            )
        elif sampling_rate != self.sampling_rate:
            raise AudioError(
                f"sampling_rate is {shorten(repr(sampling_rate))}, but the codec runs at {self.sampling_rate} Hz; "
                "resample the audio first."
            )
        raw_audio = as_list(raw_audio)
        check_not_empty(raw_audio, "raw_audio", "clip", AudioError)
        is_batch = is_list_of_clips(raw_audio)
        clips = [_mono_samples(clip, f"clip {row}") for row, clip in enumerate(raw_audio if is_batch else [raw_audio])]
        features = self.pad(
            BatchFeature({"input_values": clips}),
            padding=padding or False,
            max_length=max_length,
            truncation=truncation,
            return_attention_mask=bool(padding),
        )
        if padding:
            features["padding_mask"] = features.pop("attention_mask")
        features["input_values"] = [np.asarray(clip, np.float32)[None] for clip in features["input_values"]]
        return features if return_tensors is None else features.convert_to_tensors(return_tensors)

    def _check_padding_side(self) -> None:
        """Raise ConfigError if clips would be padded on the left, where the codec accepts no padding."""
        if self.padding_side != "right":
            raise ConfigError(
                f"padding_side is {shorten(repr(self.padding_side))}, but the codec needs clips padded on the "
                'right; remove padding_side, or set it to "right".'
            )


def _mono_samples(clip: object, name: str) -> np.ndarray:
    """Convert one clip to float32 samples [T_audio], or raise AudioError."""
    if isinstance(clip, Mapping):
        raise AudioError(
            f"{name} is a {type(clip).__name__} with the keys {shorten([str(key) for key in clip])}; pass an array of "
            "samples, such as item['array'], and its rate as sampling_rate."
        )
    if isinstance(clip, str | bytes | os.PathLike):
        raise AudioError(
            f"{name} is {quoted(clip)}, but the extractor reads no files; pass an array of samples, or pass "
            "the path to the encode method of nemo_lfr.load(...)."
        )
    samples: np.ndarray = float_audio(NumpyArrays(), clip, name)
    if samples.ndim != 1:
        raise AudioError(f"{name} has shape {list(samples.shape)}; pass mono clips, [T_audio].")
    if len(samples):
        check_peak(float(np.abs(samples).max()), name)
    return samples
