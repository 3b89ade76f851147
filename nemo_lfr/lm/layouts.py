"""Layouts: how the C tokens of a frame become the sequence, or the parallel sequences, that a language model reads.

    FlatLayout            DelayLayout             StackLayout(2)
    a0 b0 c0 a1 b1 c1     < a0 a1 a2 >  _  _      a0 a2
                          < <  b0 b1 b2 >  _      b0 b2
                          < <  <  c0 c1 c2 >      c0 c2
                                                  a1 a3
                                                  b1 b3
                                                  c1 c3

(a, b, c are codebooks, 0, 1, 2 frames, < is BOS, > EOS and _ padding.)

A layout has ids of its own for padding, BOS, EOS and mask, behind those of the tokens. `restore` is the exact inverse
of `arrange`. It also takes what a sampler made: it keeps the leading frames of which every token is there.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from nemo_lfr.errors import ConfigError, TokensError
from nemo_lfr.lm.arrays import arange, as_integers, constant, run_length, where

NUM_SPECIAL = 4


class Layout(ABC):
    """Base class of all layouts.

    Args:
        num_codebooks: C, tokens of a frame.
        codebook_size: entries of one codebook.
        bos: begin every sequence with BOS.
        eos: end every sequence with EOS.
        first_id: id of the first token: 0, or the size of a text vocabulary that the tokens follow.

    Raises:
        ConfigError: for sizes that are not positive.
    """

    num_streams: int = 1

    def __init__(
        self, num_codebooks: int, codebook_size: int, *, bos: bool = True, eos: bool = True, first_id: int = 0
    ) -> None:
        for name, value, least in (
            ("num_codebooks", num_codebooks, 1),
            ("codebook_size", codebook_size, 1),
            ("first_id", first_id, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}; pass an integer of at least {least}.")
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.bos, self.eos, self.first_id = bool(bos), bool(eos), first_id

    @property
    def num_token_ids(self) -> int:
        """Ids that stand for tokens."""
        return self.codebook_size

    @property
    def pad_id(self) -> int:
        """Id that fills a batch, and places without a token."""
        return self.first_id + self.num_token_ids

    @property
    def bos_id(self) -> int:
        """Id before the first token."""
        return self.pad_id + 1

    @property
    def eos_id(self) -> int:
        """Id after the last token."""
        return self.pad_id + 2

    @property
    def mask_id(self) -> int:
        """Id for masked prediction; no layout writes it."""
        return self.pad_id + 3

    @property
    def vocab_size(self) -> int:
        """Rows of an embedding for every id of this layout, and for those before `first_id`."""
        return self.pad_id + NUM_SPECIAL

    def arrange(self, tokens: Any, tokens_len: Any = None) -> tuple[Any, Any]:
        """Arrange tokens for a language model.

        Args:
            tokens: ids in [0, codebook_size), [B, C, T], or [C, T] of one utterance.
            tokens_len: frames of each utterance, [B]; T if not given.

        Returns:
            Ids, int64: [B, L] of a `FlatLayout`, [B, S, L] of the others, or without B. Also their lengths, [B]: BOS
            and EOS included, padding after them not.

        Raises:
            TokensError: for tokens of another shape or outside the codebook.
        """
        tokens = as_integers(tokens, "tokens")
        batched = len(tokens.shape) == 3
        tokens = tokens if batched else tokens[None]
        if len(tokens.shape) != 3 or tokens.shape[1] != self.num_codebooks:
            shape = list(tokens.shape)[not batched :]
            raise TokensError(f"tokens have shape {shape}; this layout is for [B, {self.num_codebooks}, T].")
        length = self._lengths(tokens, tokens_len)
        width = tokens.shape[2]
        real = arange(width, tokens)[None, None] < length[:, None, None]
        if bool((real & ((tokens < 0) | (tokens >= self.codebook_size))).any()):
            raise TokensError(f"tokens lie outside [0, {self.codebook_size}).")
        if width == 0:  # indices need something to point at
            tokens = constant([0] * tokens.shape[0] * tokens.shape[1], tokens).reshape(*tokens.shape[:2], 1)
        steps = self._num_steps(length)
        longest = int(steps.max()) if len(steps) else 0
        # Position 0 is that of the first frame; BOS lies before it.
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
        """Restore tokens from ids, of `arrange` or of a sampler.

        A recording ends at the first frame that is not whole: at EOS, at padding, where the ids were cut off, or where
        an id is not one of its codebook.

        Args:
            ids: as `arrange` returns them.

        Returns:
            Tokens, int64, [B, C, T] and frames [B], as `Codec.decode` takes them; without B for one utterance. Tokens
            beyond an utterance's frames are 0.

        Raises:
            TokensError: for ids of another shape.
        """
        ids = as_integers(ids, "ids")
        dims = 2 if self._is_flat else 3
        batched = len(ids.shape) == dims
        ids = ids if batched else ids[None]
        if len(ids.shape) != dims or (dims == 3 and ids.shape[1] != self.num_streams):
            expected = "[B, L]" if self._is_flat else f"[B, {self.num_streams}, L]"
            raise TokensError(f"ids have shape {list(ids.shape)[not batched :]}; this layout is for {expected}.")
        ids = ids[:, None] if self._is_flat else ids
        ids = ids[:, :, int(self.bos) :]
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
        values = [int(count) for count in np.reshape(listed, -1)]
        if len(values) != batch or not all(0 <= count <= width for count in values):
            raise TokensError(f"tokens_len is {values[:8]}; pass {batch} numbers of frames between 0 and {width}.")
        return constant(values, tokens)

    def _offset(self, codebook: Any) -> Any:
        """Return what is added to the tokens of a codebook."""
        return 0

    def _is_start(self, at: Any, frame: Any) -> Any:
        """Return where BOS stands, for positions [1, 1, L] and what `_source` has there."""
        return at < 0

    def _is_end(self, at: Any, length: Any, steps: Any) -> Any:
        """Return where EOS stands, for positions [1, 1, L]."""
        return at == steps

    @abstractmethod
    def _num_steps(self, length: Any) -> Any:
        """Return the steps that hold tokens, of utterances of `length` frames, [B]."""

    @abstractmethod
    def _source(self, at: Any, length: Any) -> tuple[Any, Any]:
        """Return codebook and frame of positions [1, 1, L], given lengths [B, 1, 1]; both broadcast to [B, S, L]."""

    @abstractmethod
    def _most_frames(self, width: int) -> int:
        """Return the most frames that `width` steps can hold."""

    @abstractmethod
    def _target(self, codebook: Any, frame: Any, ids: Any) -> tuple[Any, Any]:
        """Return stream and step of each token [1, C, 1], [1, 1, T]; `ids` [B, S, L] are what is restored."""


class FlatLayout(Layout):
    """One token after the other in a single sequence.

    Args:
        num_codebooks: C.
        codebook_size: entries of one codebook.
        order: "frame" interleaves the codebooks, frame by frame; "codebook" has all frames of the first codebook, then
            those of the second, as coarse-to-fine models do. A sequence in the latter order that was cut off before
            its last codebook holds no whole frame.
        offsets: give each codebook ids of its own. Without them all codebooks share one range.
        bos: begin with BOS.
        eos: end with EOS.
        first_id: id of the first token.
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
            raise ConfigError("order 'codebook' needs offsets: without them nothing tells where a codebook ends.")
        self.order, self.offsets = order, offsets

    @property
    def num_token_ids(self) -> int:
        """Ids that stand for tokens."""
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
        # A frame that the first codebook does not have lies nowhere.
        step = where(frame < frames, codebook * frames + frame, ids.shape[2])
        return codebook * 0, step


class DelayLayout(Layout):
    """One sequence for each codebook, each delayed against the one before it (Copet et al., arXiv 2306.05284).

    With `delays` of 0 the codebooks are parallel.

    Args:
        num_codebooks: C, also the number of streams.
        codebook_size: entries of one codebook.
        delays: steps by which each codebook is late; 0, 1, 2 ... if not given.
        bos: begin with BOS; the steps before a delayed codebook's first token are BOS too.
        eos: end each codebook with EOS.
        first_id: id of the first token.
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
        self.num_streams = num_codebooks
        self.delays = tuple(range(num_codebooks)) if delays is None else tuple(delays)
        if len(self.delays) != num_codebooks or not all(
            isinstance(delay, int) and delay >= 0 for delay in self.delays
        ):
            raise ConfigError(f"delays are {list(self.delays)}; pass {num_codebooks} integers of at least 0.")

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
    """Several frames in one step: frames_per_step x C parallel sequences, as short as they get.

    Args:
        num_codebooks: C.
        codebook_size: entries of one codebook.
        frames_per_step: frames of one step; a last step that is not full is padded.
        bos: begin with BOS.
        eos: end with a step of EOS.
        first_id: id of the first token.
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
        if isinstance(frames_per_step, bool) or not isinstance(frames_per_step, int) or frames_per_step < 1:
            raise ConfigError(f"frames_per_step is {frames_per_step!r}; pass an integer of at least 1.")
        self.frames_per_step = frames_per_step
        self.num_streams = num_codebooks * frames_per_step

    def _num_steps(self, length: Any) -> Any:
        return -(-length // self.frames_per_step)

    def _source(self, at: Any, length: Any) -> tuple[Any, Any]:
        stream = arange(self.num_streams, at)[None, :, None]
        return stream % self.num_codebooks + at * 0, at * self.frames_per_step + stream // self.num_codebooks

    def _most_frames(self, width: int) -> int:
        return width * self.frames_per_step

    def _target(self, codebook: Any, frame: Any, ids: Any) -> tuple[Any, Any]:
        return frame % self.frames_per_step * self.num_codebooks + codebook, frame // self.frames_per_step
