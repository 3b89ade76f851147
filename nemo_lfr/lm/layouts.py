"""Layouts that arrange the tokens of several codebooks in sequences for language models.

A layout arranges the C tokens of each frame in one sequence, or in several parallel sequences (streams):

    FlatLayout            DelayLayout             StackLayout(2)
    a0 b0 c0 a1 b1 c1     < a0 a1 a2 >  _  _      a0 a2
                          < <  b0 b1 b2 >  _      b0 b2
                          < <  <  c0 c1 c2 >      c0 c2
                                                  a1 a3
                                                  b1 b3
                                                  c1 c3

In these examples, a1 is the token of codebook a in frame 1, < is BOS, > is EOS, and _ is padding.

The ids for padding, BOS, EOS and the mask follow the ids of the tokens. `restore` is the exact inverse of `arrange`.
It also accepts ids that a language model has sampled, and returns the frames before the first incomplete frame.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from nemo_lfr.errors import ConfigError, TokensError
from nemo_lfr.lm.arrays import arange, as_integers, check_size, constant, run_length, where

NUM_SPECIAL = 4


class Layout(ABC):
    """Base class for layouts.

    Args:
        num_codebooks: number of codebooks, C.
        codebook_size: number of entries in each codebook.
        bos: whether sequences begin with BOS.
        eos: whether sequences end with EOS.
        first_id: smallest id of a token: 0, or the size of a text vocabulary whose ids precede those of the tokens.

    Attributes:
        num_streams: number of parallel sequences, S.

    Raises:
        ConfigError: if `num_codebooks`, `codebook_size` or `first_id` is not an integer, or is too small or too large.
    """

    num_streams: int = 1

    def __init__(
        self, num_codebooks: int, codebook_size: int, *, bos: bool = True, eos: bool = True, first_id: int = 0
    ) -> None:
        self.num_codebooks = check_size(num_codebooks, "num_codebooks", 1)
        self.codebook_size = check_size(codebook_size, "codebook_size", 1)
        self.first_id = check_size(first_id, "first_id", 0)
        self.bos, self.eos = bool(bos), bool(eos)

    @property
    def num_token_ids(self) -> int:
        """Number of ids that stand for tokens."""
        return self.codebook_size

    @property
    def pad_id(self) -> int:
        """Id for padding, and for positions without a token."""
        return self.first_id + self.num_token_ids

    @property
    def bos_id(self) -> int:
        """Id of BOS, the beginning of a sequence."""
        return self.pad_id + 1

    @property
    def eos_id(self) -> int:
        """Id of EOS, the end of a sequence."""
        return self.pad_id + 2

    @property
    def mask_id(self) -> int:
        """Id of the mask token for masked prediction. It never occurs in the sequences that `arrange` returns."""
        return self.pad_id + 3

    @property
    def vocab_size(self) -> int:
        """Number of rows of an embedding table for all ids, including the ids below `first_id`."""
        return self.pad_id + NUM_SPECIAL

    def arrange(self, tokens: Any, tokens_len: Any = None) -> tuple[Any, Any]:
        """Arrange tokens for a language model.

        Args:
            tokens: ids in [0, codebook_size), shape [B, C, T], or [C, T] for one utterance.
            tokens_len: number of valid frames of each utterance, shape [B]; by default T.

        Returns:
            Ids, int64, and the lengths of the sequences, shape [B]. The ids have shape [B, L] for `FlatLayout` and
            [B, S, L] for other layouts, where L is the largest length. A length includes BOS and EOS, but not the
            padding after them. If `tokens` has no dimension B, neither have the results.

        Raises:
            TokensError: if `tokens_len` or the shape of `tokens` is invalid, or an id is outside the codebook.
        """
        tokens = as_integers(tokens, "tokens")
        batched = len(tokens.shape) == 3
        tokens = tokens if batched else tokens[None]
        if len(tokens.shape) != 3 or tokens.shape[1] != self.num_codebooks:
            shape = list(tokens.shape)[not batched :]
            raise TokensError(f"tokens have shape {shape}; pass [B, {self.num_codebooks}, T] to this layout.")
        length = self._lengths(tokens, tokens_len)
        width = tokens.shape[2]
        real = arange(width, tokens)[None, None] < length[:, None, None]
        if bool((real & ((tokens < 0) | (tokens >= self.codebook_size))).any()):
            raise TokensError(
                f"a token is outside [0, {self.codebook_size}); remove padding, or use the codec's codebook_size."
            )
        if width == 0:  # indexing below needs at least one frame
            tokens = constant([0] * tokens.shape[0] * tokens.shape[1], tokens).reshape(*tokens.shape[:2], 1)
        steps = self._num_steps(length)
        longest = int(steps.max()) if len(steps) else 0
        # Position 0 is the first step with tokens; BOS is at position -1.
        at = arange(longest + self.bos + self.eos, tokens)[None, None] - int(self.bos)  # [1, 1, L]
        ends, length = steps[:, None, None], length[:, None, None]
        codebook, frame = self._source(at, length)
        has_token = (at >= 0) & (at < ends) & (frame >= 0) & (frame < length)
        batch = arange(tokens.shape[0], tokens)[:, None, None]
        values = tokens[batch, where(has_token, codebook, 0), where(has_token, frame, 0)]
        ids = where(has_token, values + self.first_id + self._offset(codebook), self.pad_id)
        if self.bos:
            ids = where(self._is_start(at, frame), self.bos_id, ids)
        if self.eos:
            ids = where(self._is_end(at, length, ends), self.eos_id, ids)
        ids_len = steps + int(self.bos) + int(self.eos)
        ids = ids[:, 0] if self._is_flat else ids
        return (ids, ids_len) if batched else (ids[0], ids_len[0])

    def restore(self, ids: Any) -> tuple[Any, Any]:
        """Restore tokens from ids that `arrange` returned or a language model sampled.

        An utterance ends before its first incomplete frame. A frame is incomplete if one of its ids is a special id,
        belongs to another codebook, or is missing because the sequence was truncated.

        Args:
            ids: integers, with the shape that `arrange` returns.

        Returns:
            Tokens, int64, shape [B, C, T], and the number of valid frames, shape [B], as `Codec.decode` expects them.
            Tokens beyond the valid frames are 0. For `ids` without the dimension B, the results have no dimension B
            either.

        Raises:
            TokensError: if the shape of `ids` is not one that `arrange` returns, or a sequence does not begin with BOS
                although the layout has `bos=True`.
        """
        ids = as_integers(ids, "ids")
        dims = 2 if self._is_flat else 3
        batched = len(ids.shape) == dims
        ids = ids if batched else ids[None]
        if len(ids.shape) != dims or (dims == 3 and ids.shape[1] != self.num_streams):
            expected = "[B, L]" if self._is_flat else f"[B, {self.num_streams}, L]"
            raise TokensError(f"ids have shape {list(ids.shape)[not batched :]}; pass {expected} to this layout.")
        ids = ids[:, None] if self._is_flat else ids
        if self.bos:
            if bool((ids[:, :, :1] != self.bos_id).any()):
                advice = "add BOS, remove padding before it, or use a layout with bos=False."
                raise TokensError(f"a sequence begins with an id other than BOS ({self.bos_id}); {advice}")
            ids = ids[:, :, 1:]
        width = ids.shape[2]
        frames = arange(self._most_frames(width), ids)[None, None]  # [1, 1, T]
        codebooks = arange(self.num_codebooks, ids)[None, :, None]
        stream, step = self._target(codebooks, frames, ids)
        inside = step < width
        batch = arange(ids.shape[0], ids)[:, None, None]
        if width == 0:
            ids = constant([self.pad_id] * ids.shape[0] * ids.shape[1], ids).reshape(*ids.shape[:2], 1)
        values = ids[batch, stream, where(inside, step, 0)] - self.first_id - self._offset(codebooks)
        valid = inside & (values >= 0) & (values < self.codebook_size)
        length = run_length(valid.all(1))
        longest = int(length.max()) if len(length) else 0
        tokens = where(frames < length[:, None, None], values, 0)[:, :, :longest]
        return (tokens, length) if batched else (tokens[0], length[0])

    _is_flat = False

    def _lengths(self, tokens: Any, tokens_len: Any) -> Any:
        batch, width = tokens.shape[0], tokens.shape[2]
        if tokens_len is None:
            return constant([width] * batch, tokens)
        listed = tokens_len.tolist() if hasattr(tokens_len, "tolist") else tokens_len
        try:
            values = np.reshape(listed, -1).tolist()
        except ValueError:  # nested lists of different lengths
            values = list(listed)
        if len(values) != batch or not all(type(count) is int and 0 <= count <= width for count in values):
            raise TokensError(f"tokens_len is {values[:8]}; pass {batch} whole numbers from 0 to {width}, in frames.")
        return constant(values, tokens)

    def _offset(self, codebook: Any) -> Any:
        """Return the number that is added to the tokens of a codebook, in addition to `first_id`."""
        return 0

    def _is_start(self, at: Any, frame: Any) -> Any:
        """Return a mask of the positions `at` whose id is BOS; `frame` is the frame of each position."""
        return at < 0

    def _is_end(self, at: Any, length: Any, steps: Any) -> Any:
        """Return a mask of the positions `at` whose id is EOS. `steps` is the number of steps with tokens."""
        return at == steps

    @abstractmethod
    def _num_steps(self, length: Any) -> Any:
        """Return the number of steps that contain tokens, [B], for utterances of `length` frames [B]."""

    @abstractmethod
    def _source(self, at: Any, length: Any) -> tuple[Any, Any]:
        """Return the codebook and frame of each position.

        Args:
            at: positions, shape [1, 1, L].
            length: number of frames of each utterance, shape [B, 1, 1].

        Returns:
            Codebooks and frames, each of which broadcasts to [B, S, L].
        """

    @abstractmethod
    def _most_frames(self, width: int) -> int:
        """Return the maximum number of frames that `width` steps can contain."""

    @abstractmethod
    def _target(self, codebook: Any, frame: Any, ids: Any) -> tuple[Any, Any]:
        """Return the position of each token: the parallel sequence (stream), and the step in it.

        Args:
            codebook: codebook of each token, shape [1, C, 1].
            frame: frame of each token, shape [1, 1, T].
            ids: ids that contain the tokens, shape [B, S, L].

        Returns:
            Indices of the streams and steps, each of which broadcasts to [B, C, T].
        """


class FlatLayout(Layout):
    """Layout with all tokens in a single sequence.

    Args:
        num_codebooks: number of codebooks, C.
        codebook_size: number of entries in each codebook.
        order: "frame" arranges the tokens frame by frame. "codebook" arranges all tokens of the first codebook, then
            all tokens of the second codebook and so on, as coarse-to-fine models do. In this order, a sequence that is
            truncated before the last codebook contains no complete frame.
        offsets: whether each codebook has its own range of ids, as the order "codebook" requires. Otherwise all
            codebooks share one range.
        bos: whether the sequence begins with BOS.
        eos: whether the sequence ends with EOS.
        first_id: smallest id of a token.
    """

    _is_flat = True

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        *,
        order: Literal["frame", "codebook"] = "frame",
        offsets: bool = True,
        bos: bool = True,
        eos: bool = True,
        first_id: int = 0,
    ) -> None:
        super().__init__(num_codebooks, codebook_size, bos=bos, eos=eos, first_id=first_id)
        if order not in ("frame", "codebook"):
            raise ConfigError(f"order is {order!r}; use 'frame' or 'codebook'.")
        if order == "codebook" and not offsets:
            raise ConfigError("order 'codebook' needs offsets=True, which shows where the tokens of a codebook end.")
        self.order, self.offsets = order, offsets

    @property
    def num_token_ids(self) -> int:
        """Number of ids that stand for tokens."""
        return self.codebook_size * (self.num_codebooks if self.offsets else 1)

    def _offset(self, codebook: Any) -> Any:
        return codebook * self.codebook_size if self.offsets else 0

    def _num_steps(self, length: Any) -> Any:
        return length * self.num_codebooks

    def _source(self, at: Any, length: Any) -> tuple[Any, Any]:
        if self.order == "frame":
            return at % self.num_codebooks, at // self.num_codebooks
        length = where(length > 0, length, 1)
        return at // length, at % length

    def _most_frames(self, width: int) -> int:
        return -(-width // self.num_codebooks) if self.order == "frame" else width

    def _target(self, codebook: Any, frame: Any, ids: Any) -> tuple[Any, Any]:
        if self.order == "frame":
            return codebook * 0, frame * self.num_codebooks + codebook
        first = ids[:, 0] - self.first_id
        frames = run_length((first >= 0) & (first < self.codebook_size))[:, None, None]
        # Frames after the end of the first codebook get a step beyond the sequence, so they count as missing.
        step = where(frame < frames, codebook * frames + frame, ids.shape[2])
        return codebook * 0, step


class DelayLayout(Layout):
    """Layout with one sequence per codebook. Each sequence has its own delay.

    This is the delay pattern of MusicGen (Copet et al., arXiv 2306.05284). If all delays are 0, the tokens of a frame
    are at the same step.

    Args:
        num_codebooks: number of codebooks C, and of sequences.
        codebook_size: number of entries in each codebook.
        delays: delay of each codebook in steps, at least 0; by default 0, 1, 2 and so on.
        bos: whether sequences begin with BOS, which also fills the steps before the first token of a codebook.
        eos: whether the tokens of each codebook end with EOS.
        first_id: smallest id of a token.
    """

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        *,
        delays: Sequence[int] | None = None,
        bos: bool = True,
        eos: bool = True,
        first_id: int = 0,
    ) -> None:
        super().__init__(num_codebooks, codebook_size, bos=bos, eos=eos, first_id=first_id)
        self.num_streams = self.num_codebooks
        delays = range(self.num_codebooks) if delays is None else delays
        self.delays = tuple(check_size(delay, "a delay", 0) for delay in delays)
        if len(self.delays) != self.num_codebooks:
            raise ConfigError(f"there are {len(self.delays)} delays; pass {self.num_codebooks}, one per codebook.")

    def _late(self, like: Any) -> Any:
        return constant(self.delays, like)[None, :, None]

    def _num_steps(self, length: Any) -> Any:
        return length + max(self.delays)

    def _source(self, at: Any, length: Any) -> tuple[Any, Any]:
        return arange(self.num_codebooks, at)[None, :, None] + at * 0, at - self._late(at)

    def _is_start(self, at: Any, frame: Any) -> Any:
        return frame < 0

    def _is_end(self, at: Any, length: Any, steps: Any) -> Any:
        return at - self._late(at) == length

    def _most_frames(self, width: int) -> int:
        return max(0, width - max(self.delays))

    def _target(self, codebook: Any, frame: Any, ids: Any) -> tuple[Any, Any]:
        return codebook, frame + self._late(ids)


class StackLayout(Layout):
    """Layout with several frames per step. It has frames_per_step * C parallel sequences.

    Args:
        num_codebooks: number of codebooks, C.
        codebook_size: number of entries in each codebook.
        frames_per_step: number of frames per step, at least 1. An incomplete last step is padded.
        bos: whether sequences begin with BOS.
        eos: whether sequences end with EOS.
        first_id: smallest id of a token.
    """

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        *,
        frames_per_step: int = 1,
        bos: bool = True,
        eos: bool = True,
        first_id: int = 0,
    ) -> None:
        super().__init__(num_codebooks, codebook_size, bos=bos, eos=eos, first_id=first_id)
        self.frames_per_step = check_size(frames_per_step, "frames_per_step", 1)
        self.num_streams = self.num_codebooks * self.frames_per_step

    def _num_steps(self, length: Any) -> Any:
        return -(-length // self.frames_per_step)

    def _source(self, at: Any, length: Any) -> tuple[Any, Any]:
        stream = arange(self.num_streams, at)[None, :, None]
        return stream % self.num_codebooks + at * 0, at * self.frames_per_step + stream // self.num_codebooks

    def _most_frames(self, width: int) -> int:
        return width * self.frames_per_step

    def _target(self, codebook: Any, frame: Any, ids: Any) -> tuple[Any, Any]:
        return frame % self.frames_per_step * self.num_codebooks + codebook, frame // self.frames_per_step
