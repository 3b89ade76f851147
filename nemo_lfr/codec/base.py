"""What every backend of the codec shares: its vocabulary, any length, any batch, files.

Arrays are the backend's own, tensors or numpy's; nothing here imports torch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from nemo_lfr import frames
from nemo_lfr.audio import AudioReader, AudioWriter, check_peak, check_rate, refuse_itself, resample
from nemo_lfr.errors import AudioError, NemoLfrError, TokensError
from nemo_lfr.heap import flat
from nemo_lfr.locate import expand_home
from nemo_lfr.spec import CodecSpec

# Frames computed at once. On a CPU long windows leave the cache; a GPU wants more work at a time. With their context
# chunks of the released config are 144 frames wide to encode and 158 to decode.
CHUNK_FRAMES = 132
BATCH_FRAMES = 160


class Part(Protocol):
    """Encoder or decoder, as far as cutting recordings into windows goes."""

    @property
    def context(self) -> frames.Context: ...

    @property
    def min_frames(self) -> int: ...


Array = TypeVar("Array")


class BaseCodec(ABC, Generic[Array]):
    """Every call gives the tokens that each utterance has alone, in one piece: a batch is computed clip by clip or in
    groups of one length, and long audio in chunks that carry the context their frames depend on.

    Attributes:
        sample_rate: Hz.
        precision: that the network runs at; "fp32" gives the tokens of record.
        name: where the weights came from, for messages.
        chunk_frames: frames of one chunk of long audio; the result does not depend on it.
    """

    sample_rate: int
    precision: str
    name: str
    chunk_frames: int = CHUNK_FRAMES
    fingerprint: Any  # str: 16 hex digits of a hash of the weights and settings
    weights_fingerprint: Any  # str: of the weights alone, which older files carry
    encoder: Any
    decoder: Any

    @property
    @abstractmethod
    def samples_per_frame(self) -> int:
        """Samples that one frame stands for."""

    @property
    @abstractmethod
    def num_codebooks(self) -> int:
        """C: tokens of one frame."""

    @property
    @abstractmethod
    def levels(self) -> tuple[int, ...]:
        """FSQ levels of one codebook."""

    @property
    @abstractmethod
    def device(self) -> Any:
        """Where the network runs."""

    @property
    def batch_frames(self) -> int:
        """Frames of a batch of equal windows."""
        return BATCH_FRAMES

    def stream_encoder(self, lookahead: int | None = None) -> Any:
        """See `Codec.stream_encoder`; only PyTorch's codec streams."""
        raise NemoLfrError(f"{self.name}: {type(self).__name__} does not stream; load the checkpoint with PyTorch.")

    def stream_decoder(self, lookahead: int | None = None) -> Any:
        return self.stream_encoder(lookahead)

    @property
    def width_step(self) -> int:
        """Windows are computed in memory of a multiple of so many frames."""
        return 1

    @property
    def spec(self) -> CodecSpec:
        """What the codec's tokens are: the record that its files carry."""
        return CodecSpec(
            self.sample_rate,
            self.samples_per_frame,
            self.levels,
            self.num_codebooks,
            self.fingerprint,
            self.precision,
        )

    def made(self, fingerprint: str) -> bool:
        """Return whether tokens that carry this fingerprint, of today's kind or the older one, are this codec's."""
        return bool(fingerprint == self.fingerprint or fingerprint == self.weights_fingerprint)

    def computing(self) -> AbstractContextManager[None]:
        """Keep the caller's settings away from what is computed within."""
        return nullcontext()

    # The backend's arrays.

    @abstractmethod
    def _array(self, value: Any, name: str, error: type[NemoLfrError]) -> Any:
        """What a caller passed, as an array where it is; raises `error`, naming the argument."""

    @abstractmethod
    def _zeros(self, shape: Sequence[int], dtype: str) -> Any:
        """On the codec's device."""

    @abstractmethod
    def _cast(self, array: Any, dtype: str) -> Any:
        """The same values as `dtype`, on the codec's device."""

    @abstractmethod
    def _encode_frames(self, audio: Any, num_frames: list[int]) -> Any:
        """Audio [b, T * samples_per_frame], of which `num_frames` are meant and zeros follow -> tokens [b, C, T].

        What comes out after `num_frames` means nothing.
        """

    @abstractmethod
    def _decode_frames(self, tokens: Any, num_frames: list[int]) -> Any:
        """Tokens [b, C, T], of which `num_frames` are meant -> audio [b, T * samples_per_frame]."""

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name!r}, {self.sample_rate} Hz, {self.frame_rate:.2f} frames/s x "
            f"{self.num_codebooks} x {self.codebook_size}, {self.bit_rate:.0f} bit/s, {self.device}, {self.precision})"
        )

    # What the tokens mean.

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.samples_per_frame

    @property
    def codebook_size(self) -> int:
        """Entries of one codebook; 0 <= token < codebook_size."""
        return math.prod(self.levels)

    @property
    def bit_rate(self) -> float:
        """Bits per second: frame_rate * num_codebooks * log2(codebook_size)."""
        return self.frame_rate * frames.bits_per_frame(self.levels, self.num_codebooks)

    # Arrays.

    def encode(
        self,
        audio: Array | np.ndarray,
        audio_len: Array | np.ndarray | list[int] | None = None,
        sample_rate: int | None = None,
    ) -> tuple[Array, Array]:
        """Audio to tokens.

        Args:
            audio: floating point in [-1, 1], or int16; [T_audio] or [B, T_audio]. What lies after a clip's length is
                ignored.
            audio_len: samples of each clip, [B]; all of them if not given.
            sample_rate: Hz of `audio`; other rates than the codec's are resampled.

        Returns:
            Tokens [B, C, T_encoded] as int32, zero after a clip's end, and frames per clip [B] as int64:
            ceil(samples / samples_per_frame). A last partial frame, and a clip shorter than the network can see, is
            completed with silence.

        Raises:
            AudioError: for another shape, type or length, or a NaN.
            NemoLfrError: if the encoder gives NaN or infinite values.
        """
        with self.computing():
            return self._encode(audio, audio_len, sample_rate)

    def _encode(self, audio: Any, audio_len: Any, sample_rate: int | None) -> tuple[Any, Any]:
        waves, lengths = self._at_own_rate(audio, audio_len, sample_rate)
        totals = [frames.num_frames(length, self.samples_per_frame) for length in lengths]
        tokens = self._zeros((len(totals), self.num_codebooks, max(totals)), "int32")
        for rows, windows, batch in self._batches(waves, lengths, totals, self.samples_per_frame, self.encoder):
            results = self._encode_frames(batch, [window.num_frames for window in windows])
            self._scatter(tokens, rows, windows, results)
        self.check_encoded(tokens)
        return tokens, self._integers(totals)

    def decode(
        self,
        tokens: Array | np.ndarray,
        tokens_len: Array | np.ndarray | list[int] | None = None,
        audio_len: Array | np.ndarray | list[int] | None = None,
    ) -> tuple[Array, Array]:
        """Tokens to audio.

        Args:
            tokens: integers, [C, T_encoded] or [B, C, T_encoded].
            tokens_len: frames of each utterance, [B]; all of them if not given.
            audio_len: samples to keep of each utterance, [B]: the length that was encoded. Whole frames if not given.

        Returns:
            Audio [B, T_audio] in [-1, 1], zero after an utterance's end, and samples per utterance [B].

        Raises:
            TokensError: for another shape or type, a token outside the codebook, or lengths that do not fit.
            NemoLfrError: if the decoder gives NaN or infinite values.
        """
        with self.computing():
            return self._decode(tokens, tokens_len, audio_len)

    def _decode(self, tokens: Any, tokens_len: Any, audio_len: Any) -> tuple[Any, Any]:
        tokens, totals = self.check_tokens(tokens, tokens_len)
        samples = [total * self.samples_per_frame for total in totals]
        if audio_len is not None:
            wanted = self._lengths(audio_len, len(totals), None, "audio_len", TokensError)
            for row, (want, whole) in enumerate(zip(wanted, samples, strict=True)):
                if frames.num_frames(want, self.samples_per_frame) * self.samples_per_frame != whole:
                    raise TokensError(
                        f"audio_len[{row}] is {want} samples, but its {totals[row]} frames hold {whole}."
                    )
            samples = wanted
        audio = self._zeros((len(totals), max(samples)), "float32")
        frame = self.samples_per_frame
        for rows, windows, batch in self._batches(tokens, totals, totals, 1, self.decoder):
            results = self._decode_frames(batch, [window.num_frames for window in windows])
            self._scatter(audio, rows, windows, results, frame, samples)
        self.check_decoded(audio)
        return audio, self._integers(samples)

    def resample(
        self,
        audio: Array | np.ndarray,
        audio_len: Array | np.ndarray | list[int] | None = None,
        sample_rate: int | None = None,
    ) -> tuple[Array, Array]:
        """Resample clips to the codec's rate, as `encode` does; arguments and errors are those of `encode`.

        Returns:
            Audio [B, T_audio] as float32, and samples of each clip [B] as int64.
        """
        with self.computing():
            waves, lengths = self._at_own_rate(audio, audio_len, sample_rate)
            return waves, self._integers(lengths)

    # Streams: one recording of any length, in bounded memory.

    def encode_blocks(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Encode one recording block by block.

        Args:
            blocks: consecutive float samples at the codec's rate, each [any length].

        Yields:
            Tokens [C, T] as int32 in order; together, exactly those of the whole recording.
        """
        frame = self.samples_per_frame
        for wave, window in flat(_rolling(blocks, frame, self.chunk_frames, self.encoder.context)):
            padding = self._width(window.num_frames, self.encoder) * frame - len(wave)
            with self.computing():  # not while the caller has the block
                clip = self._cast(self._array(np.pad(wave, (0, padding)), "audio", AudioError), "float32")
                tokens = to_numpy(self._encode_frames(clip[None], [window.num_frames])[0][:, window.kept])
            self.check_encoded(tokens[None])
            yield tokens

    def decode_blocks(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Decode one utterance block by block: tokens [C, any] in, float32 samples of whole frames out."""
        frame = self.samples_per_frame
        for piece, window in flat(_rolling(blocks, 1, self.chunk_frames, self.decoder.context)):
            missing = self._width(window.num_frames, self.decoder) - window.num_frames
            with self.computing():
                tokens, _ = self.check_tokens(np.pad(piece, ((0, 0), (0, missing))), None)
                audio = self._decode_frames(tokens, [window.num_frames])[0]
                kept = to_numpy(audio[window.kept.start * frame : window.kept.stop * frame])
            self.check_decoded(kept[None])
            yield kept

    # Files.

    def encode_file(self, source: str | PathLike[str], target: str | PathLike[str], *, overwrite: bool = False) -> int:
        """Encode an audio file of any format and rate into a token file; returns the samples encoded.

        Raises:
            AudioError: if `source` cannot be read.
            NemoLfrError: if `target` exists and `overwrite` is not set, or is `source`.
        """
        from nemo_lfr.tokens.format import TokenWriter

        source, target = expand_home(source), expand_home(target)
        refuse_itself(source, target)
        _ = self.encoder.context  # read now, else the fingerprint would read it too
        with AudioReader(source, self.sample_rate) as reader, TokenWriter.for_codec(target, self, overwrite) as writer:
            for tokens in self.encode_blocks(reader.blocks()):
                writer.write(tokens)
            writer.finish(reader.samples_read)
            return reader.samples_read

    def decode_file(
        self,
        source: str | PathLike[str],
        target: str | PathLike[str],
        *,
        start: float = 0.0,
        duration: float | None = None,
        overwrite: bool = False,
        recover: bool = False,
    ) -> int:
        """Decode a token file, or a part of it, into an audio file; returns the samples written.

        Args:
            source: the `.lfr` file.
            target: the audio file.
            start: second to start at; only the frames that are needed are read.
            duration: seconds; up to the original end if not given. The part is sample for sample that of the whole.
            overwrite: replace `target`.
            recover: take what is whole of a damaged `source`.

        Raises:
            TokenFileError: if `source` is damaged or another codec's, or `start` lies after its end.
            NemoLfrError: if `target` exists and `overwrite` is not set, or is `source`.
        """
        from nemo_lfr.tokens.format import TokenReader

        source, target = expand_home(source), expand_home(target)
        refuse_itself(source, target)
        with TokenReader(source, recover) as reader:
            reader.check_codec(self)
            first, last = reader.samples_between(start, duration)
            frame, context = self.samples_per_frame, self.decoder.context
            begin = max(0, first // frame - context.past)
            end = min(reader.num_frames, frames.num_frames(last, frame) + context.future)
            skip = first - begin * frame
            with AudioWriter(target, self.sample_rate, overwrite=overwrite) as writer:
                left = last - first
                for audio in self.decode_blocks(reader.blocks(begin, end)):
                    piece = audio[skip : skip + left]
                    skip = max(0, skip - len(audio))
                    writer.write(piece)
                    left -= len(piece)
        return last - first

    # Many windows: equal lengths run together.

    def _batches(
        self,
        inputs: Any,
        lengths: list[int],
        totals: list[int],
        items_per_frame: int,
        part: Part,
    ) -> Iterator[tuple[list[int], list[frames.Window], Any]]:
        """Cut every row into windows and stack those of one width, zero-padded to whole and enough frames.

        Yields:
            Row and window of each example, and the batch [b, ..., T * items_per_frame].
        """
        jobs: dict[int, list[tuple[int, frames.Window]]] = {}
        for row, total in enumerate(totals):
            for window in frames.plan_windows(total, self.chunk_frames, part.context):
                jobs.setdefault(self._width(window.num_frames, part), []).append((row, window))
        for size, group in self._grouped(jobs):
            # Batches of 1, 2, 4 ... examples: few shapes, for which kernels are at hand.
            while group:
                count = min(len(group), max(1, self.batch_frames // size))
                count = 1 << (count.bit_length() - 1)
                part_group, group = group[:count], group[count:]
                size = max(self._width(window.num_frames, part) for _, window in part_group)
                dtype = str(inputs.dtype).removeprefix("torch.")
                batch = self._zeros((len(part_group), *inputs.shape[1:-1], size * items_per_frame), dtype)
                for example, (row, window) in zip(batch, part_group, strict=True):
                    piece = inputs[row, ..., window.start * items_per_frame : lengths[row]]
                    piece = piece[..., : window.num_frames * items_per_frame]
                    example[..., : piece.shape[-1]] = piece
                rows, windows = zip(*part_group, strict=True)
                yield list(rows), list(windows), batch

    def _grouped(self, jobs: dict[int, list[Any]]) -> Iterable[tuple[int, list[Any]]]:
        """Windows that may share a batch, with the most that one is wide, from those of each width."""
        return jobs.items()

    def _peaks(self, audio: Any, lengths: list[int]) -> list[float]:
        """Largest magnitude of each clip [B, T_audio]; 0 of an empty one."""
        return [float(abs(row[:length]).max()) if length else 0.0 for row, length in zip(audio, lengths, strict=True)]

    def _width(self, num_frames: int, part: Part) -> int:
        """Frames of memory that a window is computed in."""
        return -(-max(num_frames, part.min_frames) // self.width_step) * self.width_step

    @staticmethod
    def _scatter(
        out: Any,
        rows: list[int],
        windows: list[frames.Window],
        results: Any,
        items_per_frame: int = 1,
        limits: list[int] | None = None,
    ) -> None:
        """Put the exact frames of each window in their place, cut at the row's limit."""
        for row, window, result in zip(rows, windows, results, strict=True):
            start, stop = (edge * items_per_frame for edge in (window.keep_start, window.keep_stop))
            if limits is not None:
                stop = min(stop, limits[row])
            first = window.kept.start * items_per_frame
            out[row, ..., start:stop] = result[..., first : first + stop - start]

    # What the network gives.

    def check_encoded(self, tokens: Any) -> None:
        """Raise NemoLfrError where the encoder gave no tokens, [B, C, T]."""
        if not math.prod(tokens.shape) or (int(tokens.min()) >= 0 and int(tokens.max()) < self.codebook_size):
            return
        row = next(row for row, own in enumerate(tokens) if int(own.min()) < 0 or int(own.max()) >= self.codebook_size)
        raise self._not_finite("encoder", f"clip {row}")

    def check_decoded(self, audio: Any) -> None:
        """Raise NemoLfrError where the decoder gave NaN, [B, T_audio]."""
        if not math.prod(audio.shape) or not math.isnan(float(audio.max())):
            return
        row = next(row for row, own in enumerate(audio) if math.isnan(float(own.max())))
        raise self._not_finite("decoder", f"utterance {row}")

    def _not_finite(self, part: str, what: str) -> NemoLfrError:
        is_half = self.precision == "fp16"
        advice = 'use precision="fp32" or "bf16"' if is_half else "load the checkpoint again, or use another"
        return NemoLfrError(
            f"{self.name}: the {part} gives NaN or infinite values for {what}; its weights are damaged, or too large "
            f"for {self.precision}: {advice}."
        )

    # What callers pass.

    def check_audio(self, audio: Any, audio_len: Any) -> tuple[Any, list[int]]:
        """Audio as float32 [B, T_audio] and a checked length per clip.

        Raises:
            AudioError: naming what came and what was expected.
        """
        audio = self._array(audio, "audio", AudioError)
        kind = str(audio.dtype).removeprefix("torch.")
        if kind != "int16" and not kind.startswith(("float", "bfloat")):
            raise AudioError(f"audio is {audio.dtype}; pass floating point in [-1, 1], or int16.")
        audio = self._cast(audio, "float32")
        if kind == "int16":
            audio = audio / 32768
        if audio.ndim == 1:
            audio = audio[None]
        if audio.ndim != 2 or not audio.shape[0]:
            raise AudioError(f"audio has shape {list(audio.shape)}; expected [T_audio] or [B, T_audio], mono.")
        if audio.shape[0] > 1000 and audio.shape[1] <= 8:
            raise AudioError(
                f"audio has shape {list(audio.shape)}, as of {audio.shape[1]} channels side by side; pass one, "
                "[T_audio], or several clips, [B, T_audio]."
            )
        lengths = self._lengths(audio_len, audio.shape[0], audio.shape[1], "audio_len", AudioError)
        for row, peak in enumerate(self._peaks(audio, lengths)):
            check_peak(peak, f"clip {row}")
        return audio, lengths

    def check_tokens(self, tokens: Any, tokens_len: Any) -> tuple[Any, list[int]]:
        """Tokens as int64 [B, C, T] and a checked number of frames per utterance.

        Raises:
            TokensError: naming what came and what was expected.
        """
        tokens = self._array(tokens, "tokens", TokensError)
        if "int" not in str(tokens.dtype):
            raise TokensError(f"tokens are {tokens.dtype}; pass integers.")
        if tokens.ndim == 2:
            tokens = tokens[None]
        if tokens.ndim != 3 or tokens.shape[1] != self.num_codebooks or not tokens.shape[0]:
            raise TokensError(
                f"tokens have shape {list(tokens.shape)}; expected [B, {self.num_codebooks}, T] (or without B)."
            )
        totals = self._lengths(tokens_len, tokens.shape[0], tokens.shape[2], "tokens_len", TokensError)
        tokens = self._cast(tokens, "int64")
        if totals and tokens.shape[2] and int(tokens.min()) >= 0 and int(tokens.max()) < self.codebook_size:
            return tokens, totals  # at once, as a GPU's answers are waited for
        for row, total in enumerate(totals):
            valid = tokens[row, :, :total]
            low, high = (int(valid.min()), int(valid.max())) if total else (0, 0)
            if low < 0 or high >= self.codebook_size:
                bad = low if low < 0 else high
                raise TokensError(f"token {bad} of utterance {row} is outside [0, {self.codebook_size}).")
        return tokens, totals

    def _lengths(self, lengths: Any, batch: int, limit: int | None, name: str, error: type[NemoLfrError]) -> list[int]:
        """Lengths as Python integers in [0, limit], one per example."""
        if lengths is None:
            assert limit is not None
            return [limit] * batch
        values = self._array(lengths, name, error)
        if "int" not in str(values.dtype) or tuple(values.shape) != (batch,):
            raise error(f"{name} is {values.dtype} {list(values.shape)}; expected integers of shape [{batch}].")
        checked = [int(value) for value in values.tolist()]
        for row, value in enumerate(checked):
            if value < 0 or (limit is not None and value > limit):
                wanted = "not be negative" if limit is None else f"lie between 0 and {limit}"
                raise error(f"{name}[{row}] is {value}; it must {wanted}.")
        return checked

    def _at_own_rate(self, audio: Any, audio_len: Any, sample_rate: int | None) -> tuple[Any, list[int]]:
        """Check clips and resample them to the codec's rate: float32 [B, T_audio], and samples of each clip."""
        waves, lengths = self.check_audio(audio, audio_len)
        if sample_rate is None:
            return waves, lengths
        check_rate(sample_rate)
        if sample_rate == self.sample_rate:
            return waves, lengths
        clips = [
            resample(to_numpy(wave[:length]), sample_rate, self.sample_rate)
            for wave, length in zip(waves, lengths, strict=True)
        ]
        padded = np.zeros((len(clips), max(map(len, clips))), np.float32)
        for row, clip in zip(padded, clips, strict=True):
            row[: len(clip)] = clip
        return self._cast(self._array(padded, "audio", AudioError), "float32"), [len(clip) for clip in clips]

    def _integers(self, values: list[int]) -> Any:
        return self._cast(self._array(values, "lengths", NemoLfrError), "int64")


def to_numpy(array: Any) -> np.ndarray:
    """An array of any backend, on the CPU."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def _rolling(
    blocks: Iterable[np.ndarray], items_per_frame: int, chunk: int, context: frames.Context
) -> Iterator[tuple[np.ndarray, frames.Window]]:
    """`frames.plan_windows` over a stream whose end is not known: (items of the window, window) as they come in."""
    held: list[np.ndarray] = []  # items from frame `first` on
    num_held, first, done = 0, 0, 0

    def take(window: frames.Window) -> np.ndarray:
        nonlocal held
        held = [np.concatenate(held, axis=-1)]
        return held[0][..., : (window.stop - first) * items_per_frame]

    for block in blocks:
        if not block.shape[-1]:
            continue
        held.append(block)
        num_held += block.shape[-1]
        # A window is ready once something is known to come after its context.
        while num_held > (done + chunk + context.future - first) * items_per_frame:
            window = frames.Window(first, done + chunk + context.future, done, done + chunk)
            yield take(window), window
            done += chunk
            drop = max(0, done - context.past) - first
            held = [held[0][..., drop * items_per_frame :]]
            first += drop
            num_held = held[0].shape[-1]
    total = first + frames.num_frames(num_held, items_per_frame)
    if total > done:
        window = frames.Window(first, total, done, total)
        yield take(window), window
