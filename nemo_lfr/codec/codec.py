"""The codec as a user holds it: audio in, tokens out, and back; any length, any batch."""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nemo_lfr import frames
from nemo_lfr.audio import AudioReader, AudioWriter, check_peak, check_rate, resample
from nemo_lfr.codec.decoder import HiFiGANDecoder
from nemo_lfr.codec.encoder import HiFiGANEncoder
from nemo_lfr.codec.quantizer import FiniteScalarQuantizer, GroupFiniteScalarQuantizer
from nemo_lfr.errors import AudioError, NemoLfrError, TokensError, clip

if TYPE_CHECKING:
    from nemo_lfr.streaming import StreamDecoder, StreamEncoder

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# Frames computed at once. On a CPU long windows leave the cache; a GPU wants more work at a time.
CHUNK_FRAMES = 128
BATCH_FRAMES = {"cpu": 160, "cuda": 4096}


class Codec:
    """Encoder, quantizer and decoder, used for inference.

    Every call gives the tokens that each utterance has alone, in one piece: a batch is computed clip by clip or in
    groups of one length, and long audio in chunks that carry the context their frames depend on.

    Args:
        encoder: audio -> encoded frames.
        quantizer: encoded frames <-> tokens.
        decoder: dequantized frames -> audio.
        sample_rate: Hz.
        precision: "fp32", the tokens of record; "bf16" or "fp16" run the convolutions at that precision and change
            a few tokens in a hundred. FSQ is fp32 always.
        name: where the weights came from, for messages.
        chunk_frames: frames of one chunk of long audio; the result does not depend on it.

    Raises:
        NemoLfrError: for an unknown precision.
    """

    def __init__(
        self,
        encoder: HiFiGANEncoder,
        quantizer: FiniteScalarQuantizer | GroupFiniteScalarQuantizer,
        decoder: HiFiGANDecoder,
        sample_rate: int,
        *,
        precision: str = "fp32",
        name: str = "codec",
        chunk_frames: int = CHUNK_FRAMES,
    ) -> None:
        if precision not in PRECISIONS:
            raise NemoLfrError(f"precision {precision!r} is unknown; use one of {list(PRECISIONS)}.")
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.sample_rate = sample_rate
        self.precision = precision
        self.name = name
        self.chunk_frames = chunk_frames

    def __repr__(self) -> str:
        return (
            f"Codec({self.name!r}, {self.sample_rate} Hz, {self.frame_rate:.2f} frames/s x {self.num_codebooks} x "
            f"{self.codebook_size}, {self.bit_rate:.0f} bit/s, {self.device}, {self.precision})"
        )

    # What the tokens mean.

    @property
    def samples_per_frame(self) -> int:
        """Samples that one frame stands for."""
        return self.encoder.samples_per_frame

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.samples_per_frame

    @property
    def num_codebooks(self) -> int:
        """C: tokens of one frame."""
        return self.quantizer.num_codebooks

    @property
    def codebook_size(self) -> int:
        """Entries of one codebook; 0 <= token < codebook_size."""
        return self.quantizer.codebook_size

    @property
    def levels(self) -> tuple[int, ...]:
        """FSQ levels of one codebook."""
        return self.quantizer.levels

    @property
    def bit_rate(self) -> float:
        """Bits per second: frame_rate * num_codebooks * log2(codebook_size)."""
        return self.frame_rate * frames.bits_per_frame(self.levels, self.num_codebooks)

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    @functools.cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of a SHA-256 over the encoder's and decoder's weights: which codec made these tokens."""
        digest = hashlib.sha256()
        for part in (self.encoder, self.decoder):
            for name, parameter in sorted(plain_state(part).items()):
                digest.update(name.encode())
                digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    # Tensors.

    @torch.no_grad()
    def encode(
        self,
        audio: torch.Tensor | np.ndarray,
        audio_len: torch.Tensor | np.ndarray | list[int] | None = None,
        sample_rate: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
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
        """
        waves, lengths = check_audio(audio, audio_len)
        if sample_rate is not None:
            check_rate(sample_rate)
        if sample_rate is not None and sample_rate != self.sample_rate:
            clips = [
                resample(wave[:n].cpu().numpy(), sample_rate, self.sample_rate)
                for wave, n in zip(waves, lengths, strict=True)
            ]
            lengths = [len(clip) for clip in clips]
            waves = torch.zeros(len(clips), max(lengths))
            for wave, clip in zip(waves, clips, strict=True):
                wave[: len(clip)] = torch.from_numpy(clip)
        waves = waves.to(self.device)
        totals = [frames.num_frames(length, self.samples_per_frame) for length in lengths]
        tokens = torch.zeros(len(totals), self.num_codebooks, max(totals), dtype=torch.int32, device=self.device)
        for rows, windows, batch in self._batches(waves, lengths, totals, self.samples_per_frame, self.encoder):
            self._scatter(tokens, rows, windows, self._encode_frames(batch))
        return tokens, torch.tensor(totals, device=self.device)

    @torch.no_grad()
    def decode(
        self,
        tokens: torch.Tensor | np.ndarray,
        tokens_len: torch.Tensor | np.ndarray | list[int] | None = None,
        audio_len: torch.Tensor | np.ndarray | list[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens to audio.

        Args:
            tokens: integers, [C, T_encoded] or [B, C, T_encoded].
            tokens_len: frames of each utterance, [B]; all of them if not given.
            audio_len: samples to keep of each utterance, [B]: the length that was encoded. Whole frames if not given.

        Returns:
            Audio [B, T_audio] in [-1, 1], zero after an utterance's end, and samples per utterance [B].

        Raises:
            TokensError: for another shape or type, a token outside the codebook, or lengths that do not fit.
        """
        tokens, totals = self._check_tokens(tokens, tokens_len)
        samples = [total * self.samples_per_frame for total in totals]
        if audio_len is not None:
            wanted = _lengths(audio_len, len(totals), None, "audio_len", TokensError)
            for row, (want, whole) in enumerate(zip(wanted, samples, strict=True)):
                if frames.num_frames(want, self.samples_per_frame) * self.samples_per_frame != whole:
                    raise TokensError(
                        f"audio_len[{row}] is {want} samples, but its {totals[row]} frames hold {whole}."
                    )
            samples = wanted
        audio = torch.zeros(len(totals), max(samples), device=self.device)
        frame = self.samples_per_frame
        for rows, windows, batch in self._batches(tokens, totals, totals, 1, self.decoder):
            results = self._decode_frames(batch, [window.num_frames for window in windows])
            self._scatter(audio, rows, windows, results, frame, samples)
        return audio, torch.tensor(samples, device=self.device)

    # Streams: one recording of any length, in bounded memory.

    @torch.no_grad()
    def encode_blocks(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Encode one recording block by block.

        Args:
            blocks: consecutive float samples at the codec's rate, each [any length].

        Yields:
            Tokens [C, T] as int32 in order; together, exactly those of the whole recording.
        """
        frame = self.samples_per_frame
        for wave, window in _rolling(blocks, frame, self.chunk_frames, self.encoder.context):
            clip = torch.from_numpy(wave).to(self.device)
            padding = max(window.num_frames, self.encoder.min_frames) * frame - len(clip)
            tokens = self._encode_frames(F.pad(clip, (0, padding))[None])[0]
            yield tokens[:, window.kept].cpu().numpy()

    @torch.no_grad()
    def decode_blocks(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Decode one utterance block by block: tokens [C, any] in, float32 samples of whole frames out."""
        for piece, window in _rolling(blocks, 1, self.chunk_frames, self.decoder.context):
            tokens, num_frames = self._check_tokens(piece, None)
            tokens = F.pad(tokens, (0, max(0, self.decoder.min_frames - window.num_frames)))
            audio = self._decode_frames(tokens, num_frames)[0]
            kept = window.kept
            frame = self.samples_per_frame
            yield audio[kept.start * frame : kept.stop * frame].float().cpu().numpy()

    def stream_encoder(self, lookahead: int | None = None) -> "StreamEncoder":
        """A stream that takes one recording's samples as they come and gives its tokens.

        Args:
            lookahead: frames that a token may wait for; None for all that it depends on (`encoder.context.future`),
                with which the tokens are those of `encode`.

        Raises:
            NemoLfrError: if it is no number of frames.
        """
        from nemo_lfr.streaming import StreamEncoder

        return StreamEncoder(self, lookahead)

    def stream_decoder(self, lookahead: int | None = None) -> "StreamDecoder":
        """A stream that takes one recording's tokens as they come and gives its audio; see `stream_encoder`."""
        from nemo_lfr.streaming import StreamDecoder

        return StreamDecoder(self, lookahead)

    # Files.

    def encode_file(self, source: str | PathLike[str], target: str | PathLike[str], *, overwrite: bool = False) -> int:
        """Encode an audio file of any format and rate into a token file; returns the samples encoded.

        Raises:
            AudioError: if `source` cannot be read.
            NemoLfrError: if `target` exists and `overwrite` is not set.
        """
        from nemo_lfr.tokens.format import TokenWriter

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
            NemoLfrError: if `target` exists and `overwrite` is not set.
        """
        from nemo_lfr.tokens.format import TokenReader

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

    # One window each.

    def _autocast(self) -> Any:
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def _encode_frames(self, audio: torch.Tensor) -> torch.Tensor:
        """[b, T * samples_per_frame] -> tokens [b, C, T]."""
        with self._autocast():
            encoded = self.encoder.encode_frames(audio)
        return self.quantizer.encode(encoded.float()).transpose(0, 1)

    def _decode_frames(self, tokens: torch.Tensor, num_frames: list[int]) -> torch.Tensor:
        """[b, C, T], of which `num_frames` are meant, the rest being silence -> audio [b, T * samples_per_frame]."""
        silence = min(num_frames) < tokens.shape[-1]
        length = torch.tensor(num_frames, device=tokens.device) if silence else None
        codes = self.quantizer.decode(tokens.transpose(0, 1), length)
        with self._autocast():
            return self.decoder.decode_frames(codes).float()

    # Many windows: equal lengths run together.

    def _batches(
        self,
        inputs: torch.Tensor,
        lengths: list[int],
        totals: list[int],
        items_per_frame: int,
        part: HiFiGANEncoder | HiFiGANDecoder,
    ) -> Iterator[tuple[list[int], list[frames.Window], torch.Tensor]]:
        """Cut every row into windows and stack those of one length, zero-padded to whole and enough frames.

        Yields:
            Row and window of each example, and the batch [b, ..., T * items_per_frame].
        """
        jobs: dict[int, list[tuple[int, frames.Window]]] = {}
        for row, total in enumerate(totals):
            for window in frames.plan_windows(total, self.chunk_frames, part.context):
                jobs.setdefault(max(window.num_frames, part.min_frames), []).append((row, window))
        budget = BATCH_FRAMES.get(self.device.type, BATCH_FRAMES["cpu"])
        for size, group in jobs.items():
            step = max(1, budget // size)
            for begin in range(0, len(group), step):
                part_group = group[begin : begin + step]
                batch = inputs.new_zeros(len(part_group), *inputs.shape[1:-1], size * items_per_frame)
                for example, (row, window) in zip(batch, part_group, strict=True):
                    piece = inputs[row, ..., window.start * items_per_frame : lengths[row]]
                    piece = piece[..., : window.num_frames * items_per_frame]
                    example[..., : piece.shape[-1]] = piece
                rows, windows = zip(*part_group, strict=True)
                yield list(rows), list(windows), batch

    @staticmethod
    def _scatter(
        out: torch.Tensor,
        rows: list[int],
        windows: list[frames.Window],
        results: torch.Tensor,
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

    def _check_tokens(self, tokens: Any, tokens_len: Any) -> tuple[torch.Tensor, list[int]]:
        tokens = _tensor(tokens, "tokens", TokensError)
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TokensError(f"tokens are {tokens.dtype}; pass integers.")
        if tokens.dim() == 2:
            tokens = tokens[None]
        if tokens.dim() != 3 or tokens.shape[1] != self.num_codebooks or not tokens.shape[0]:
            raise TokensError(
                f"tokens have shape {list(tokens.shape)}; expected [B, {self.num_codebooks}, T] (or without B)."
            )
        totals = _lengths(tokens_len, tokens.shape[0], tokens.shape[2], "tokens_len", TokensError)
        tokens = tokens.to(self.device, torch.int64)
        for row, total in enumerate(totals):
            valid = tokens[row, :, :total]
            if valid.numel() and (int(valid.min()) < 0 or int(valid.max()) >= self.codebook_size):
                bad = int(valid.min()) if int(valid.min()) < 0 else int(valid.max())
                raise TokensError(f"token {bad} of utterance {row} is outside [0, {self.codebook_size}).")
        return tokens, totals


def plain_state(part: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by name with weight norm folded, the same for a part built with or without it."""
    state = {name: value for name, value in part.state_dict().items() if ".parametrizations." not in name}
    for name, module in part.named_modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            state[f"{name}.weight"] = module.weight
    return state


def check_audio(audio: Any, audio_len: Any) -> tuple[torch.Tensor, list[int]]:
    """Audio as float32 [B, T_audio] and a checked length per clip.

    Raises:
        AudioError: naming what came and what was expected.
    """
    audio = _tensor(audio, "audio", AudioError)
    if audio.dtype == torch.int16:
        audio = audio.float() / 32768
    elif not audio.is_floating_point():
        raise AudioError(f"audio is {audio.dtype}; pass floating point in [-1, 1], or int16.")
    if audio.dim() == 1:
        audio = audio[None]
    if audio.dim() != 2 or not audio.shape[0]:
        raise AudioError(f"audio has shape {list(audio.shape)}; expected [T_audio] or [B, T_audio], mono.")
    lengths = _lengths(audio_len, audio.shape[0], audio.shape[1], "audio_len", AudioError)
    audio = audio.detach().float()
    for row, length in enumerate(lengths):
        peak = float(audio[row, :length].abs().max()) if length else 0.0
        check_peak(peak, f"clip {row}")
    return audio, lengths


def _tensor(value: Any, name: str, error: type[NemoLfrError]) -> torch.Tensor:
    """What a caller passed, as a plain tensor.

    Raises:
        NemoLfrError: of the type given, if it is no array of numbers.
    """
    if isinstance(value, np.ndarray) and not value.flags.writeable:  # torch warns of such memory
        value = value.copy()
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as reason:
        what = " ".join(str(reason).split())
        raise error(f"{name} is {type(value).__name__}; pass a numpy array or a tensor ({clip(what)}).") from None
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise error(f"{name} is a sparse, quantized or meta tensor; pass a plain one.")
    return tensor


def _lengths(lengths: Any, batch: int, limit: int | None, name: str, error: type[NemoLfrError]) -> list[int]:
    """Lengths as Python integers in [0, limit], one per example."""
    if lengths is None:
        assert limit is not None
        return [limit] * batch
    values = _tensor(lengths, name, error)
    if values.is_floating_point() or values.dtype == torch.bool or values.shape != (batch,):
        raise error(f"{name} is {values.dtype} {list(values.shape)}; expected integers of shape [{batch}].")
    checked = [int(value) for value in values.tolist()]
    for row, value in enumerate(checked):
        if value < 0 or (limit is not None and value > limit):
            raise error(f"{name}[{row}] is {value}; it must lie between 0 and {limit}.")
    return checked


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
