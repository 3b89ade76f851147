"""`Codec`: encode and decode arrays, blocks, files and streams of any length with any backend.

Results are tensors or numpy arrays, depending on the backend. This module does not import torch.
"""

from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from nemo_lfr.codec import arguments
from nemo_lfr.codec.arrays import Array, to_numpy
from nemo_lfr.codec.backend import DecoderStream, EncoderStream, LatentBackend, StreamingBackend
from nemo_lfr.codec.clips import to_batch
from nemo_lfr.codec.compiling import outside_of_graphs
from nemo_lfr.codec.cpu.malloc import trim_between_windows
from nemo_lfr.codec.hub import HubMethods
from nemo_lfr.codec.windows import Cutter, place_windows, rolling_windows
from nemo_lfr.errors import AudioError, NemoLfrError, TokensError
from nemo_lfr.frames import num_frames
from nemo_lfr.io.atomic import check_distinct
from nemo_lfr.io.audio import AudioReader, AudioWriter
from nemo_lfr.io.entropy.find import model_to_write
from nemo_lfr.io.entropy.model import EntropyModel
from nemo_lfr.io.locate import expand_home
from nemo_lfr.io.token_file import TokenReader, TokenWriter


class Latents(NamedTuple):
    """Vectors of each frame before and after FSQ (the quantizer). After the end of a clip, all values are zero.

    Attributes:
        encoded: output of the encoder, float32 [B, D, T_encoded], where D = num_codebooks * len(levels).
        codes: `encoded` after FSQ, [B, D, T_encoded], rounded to a grid in [-1, 1]. This is the decoder's input.
        num_frames: frames in each clip, int64 [B].
    """

    encoded: Any
    codes: Any
    num_frames: Any


class Codec(HubMethods[Array]):
    """Speech codec: encodes audio to tokens and decodes tokens to audio, with any backend.

    Arguments may be numpy arrays or arrays of the backend (tensors with PyTorch). Results are arrays of the backend.
    `encode_blocks`, `decode_blocks` and streams return numpy arrays. Results do not depend on batching, or on the
    windows into which long audio is cut.

    Args:
        backend: backend that runs the encoder and the decoder.
        chunk_frames: frames in one window of long audio, not counting the context around them. Default: the
            backend's choice.

    Attributes:
        backend: backend that runs the encoder and the decoder.
    """

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name!r}, {self.sample_rate} Hz, {self.frame_rate:.2f} frames/s x "
            f"{self.num_codebooks} x {self.codebook_size}, {self.bit_rate:.0f} bit/s, {self.device}, {self.precision})"
        )

    @outside_of_graphs
    def encode(
        self,
        audio: object,
        audio_len: Array | np.ndarray | list[int] | None = None,
        sample_rate: int | None = None,
        num_codebooks: int | None = None,
    ) -> tuple[Array, Array]:
        """Encode audio to tokens.

        Args:
            audio: an array, floating point in [-1, 1] or int16, of shape [T_audio], [B, T_audio] or [B, 1, T_audio];
                or the path of an audio file; or an item from an audio column of `datasets`; or a list of clips in any
                of these forms, of any lengths. Files and `datasets` items with several channels are mixed to mono.
            audio_len: samples in each clip, [B]; later samples are ignored. Default: the full length.
            sample_rate: sample rate of `audio`, Hz. Audio at another rate than the codec's is resampled. Default: the
                declared rate of a file or `datasets` item, and the codec's rate for arrays.
            num_codebooks: number of codebooks to return, starting with the first. Useful if the codec was trained with
                codebook dropout. Default: all.

        Returns:
            Tokens [B, C, T_encoded] as int32, and the number of frames in each clip, [B] as int64. A clip has
            ceil(samples / samples_per_frame) frames. Tokens after the last frame of a clip are zero. A partial last
            frame is zero-padded, as are clips that are too short for the encoder.

        Raises:
            AudioError: for invalid audio (see `nemo_lfr.codec.arguments.check_audio`), or a file that cannot be read.
            NemoLfrError: if the encoder returns NaN or infinite values, or for an invalid `num_codebooks`.
        """
        with self.backend.computing():
            waves, lengths = self._at_own_rate(audio, audio_len, sample_rate)
            totals = [num_frames(length, self.samples_per_frame) for length in lengths]
            kept = arguments.check_num_codebooks(self.backend.spec, num_codebooks)
            tokens = self.backend.arrays.zeros((len(totals), kept, max(totals)), np.int32)
            for batch in self._audio_cutter().batches(waves, lengths, totals):
                results: Any = self._encode_frames(batch.inputs, batch.num_frames)
                place_windows(tokens, batch.places, results[:, :kept])
            self.check_encoded(tokens)
            return tokens, self._integers(totals)

    @outside_of_graphs
    def encode_latents(
        self,
        audio: object,
        audio_len: Array | np.ndarray | list[int] | None = None,
        sample_rate: int | None = None,
    ) -> Latents:
        """Encode audio to the vectors before and after FSQ, without gradients.

        The arguments are as in `encode`. In the result, dimensions [k * len(levels), (k + 1) * len(levels)) belong to
        codebook k.

        Raises:
            AudioError: for invalid audio (see `nemo_lfr.codec.arguments.check_audio`), or a file that cannot be read.
            NemoLfrError: if the encoder returns NaN or infinite values, or the backend only returns tokens.
        """
        backend, spec = self.backend, self.backend.spec
        if not isinstance(backend, LatentBackend):
            raise NemoLfrError(
                f"{self.name}: {type(backend).__name__} only returns tokens, not latents; load the checkpoint with "
                "PyTorch."
            )
        with backend.computing():
            waves, lengths = self._at_own_rate(audio, audio_len, sample_rate)
            totals = [num_frames(length, self.samples_per_frame) for length in lengths]
            shape = (len(totals), spec.num_codebooks * len(spec.levels), max(totals))
            encoded = backend.arrays.zeros(shape, np.float32)
            for batch in self._audio_cutter().batches(waves, lengths, totals):
                place_windows(encoded, batch.places, backend.encode_latents(batch.inputs, batch.num_frames))
            arguments.check_latents(encoded, spec, self.name)
            return Latents(encoded, backend.quantize_latents(encoded, totals), self._integers(totals))

    @outside_of_graphs
    def decode(
        self,
        tokens: Array | np.ndarray,
        tokens_len: Array | np.ndarray | list[int] | None = None,
        audio_len: Array | np.ndarray | list[int] | None = None,
        num_codebooks: int | None = None,
    ) -> tuple[Array, Array]:
        """Decode tokens to audio.

        Args:
            tokens: integers, [C, T_encoded] or [B, C, T_encoded].
            tokens_len: frames in each utterance, [B]; default: the full length.
            audio_len: samples to keep from each utterance, [B], usually the length of the encoded recording at the
                codec's sample rate. Default: all samples of all frames.
            num_codebooks: number of codebooks to decode, starting with the first; `tokens` may leave out the other
                codebooks. Default: all.

        Returns:
            Audio [B, T_audio] in [-1, 1], which is zero after the end of an utterance, and the number of samples in
            each utterance, [B].

        Raises:
            TokensError: for an unsupported shape or type, a token outside the codebook, lengths that do not fit the
                tokens, or an invalid `num_codebooks`.
            NemoLfrError: if the decoder returns NaN or infinite values.
        """
        frame, arrays = self.samples_per_frame, self.backend.arrays
        with self.backend.computing():
            ids, totals = arguments.check_tokens(arrays, self.backend.spec, tokens, tokens_len, num_codebooks)
            samples = [total * frame for total in totals]
            if audio_len is not None:
                samples = arguments.check_lengths(arrays, audio_len, len(totals), None, "audio_len", TokensError)
                arguments.check_kept_samples(samples, totals, frame)
            audio = arrays.zeros((len(totals), max(samples)), np.float32)
            for batch in self._token_cutter().batches(ids, totals, totals):
                results = self._decode_frames(batch.inputs, batch.num_frames)
                place_windows(audio, batch.places, results, frame, samples)
            self.check_decoded(audio)
            return audio, self._integers(samples)

    @outside_of_graphs
    def resample(
        self,
        audio: object,
        audio_len: Array | np.ndarray | list[int] | None = None,
        sample_rate: int | None = None,
    ) -> tuple[Array, Array]:
        """Resample clips to the codec's rate as `encode` does. Arguments and errors are as in `encode`.

        Returns:
            Audio [B, T_audio] as float32, and the number of samples in each clip, [B] as int64.
        """
        with self.backend.computing():
            waves, lengths = self._at_own_rate(audio, audio_len, sample_rate)
            return waves, self._integers(lengths)

    def encode_blocks(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Encode one recording block by block, in constant memory.

        Args:
            blocks: consecutive samples at the codec's rate, each of shape [n] with any n; floating point in [-1, 1],
                or int16.

        Yields:
            Consecutive tokens [C, k] as int32. Joined, they equal the tokens of the whole recording.

        Raises:
            AudioError: for an unsupported shape or type, or for samples that are NaN, infinite or far outside [-1, 1].
            NemoLfrError: if the encoder returns NaN or infinite values.
        """
        frame, cutter = self.samples_per_frame, self._audio_cutter()
        chunks = self.check_blocks(blocks, "samples", AudioError, self.check_chunk)
        for wave, window in trim_between_windows(
            rolling_windows(chunks, frame, self.chunk_frames, cutter.limits.context)
        ):
            padding = cutter.width(window.num_frames) * frame - len(wave)
            with self.backend.computing():  # ends before the `yield`, so that the caller's code has its own settings
                arrays = self.backend.arrays
                clips = arrays.cast(arrays.convert(np.pad(wave, (0, padding))[None], "audio", AudioError), np.float32)
                results: Any = self._encode_frames(clips, [window.num_frames])
                tokens = to_numpy(results[0][:, window.kept])
            self.check_encoded(tokens[None])
            yield tokens

    def decode_blocks(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Decode one recording block by block, in constant memory.

        Args:
            blocks: consecutive tokens, each of shape [C, k] with any k.

        Yields:
            Consecutive float32 samples of whole frames. Joined, they equal the decoded audio of the whole recording.

        Raises:
            TokensError: for an unsupported shape or type, or a token outside the codebook.
            NemoLfrError: if the decoder returns NaN or infinite values.
        """
        frame, cutter = self.samples_per_frame, self._token_cutter()
        chunks = self.check_blocks(blocks, "tokens", TokensError, self.check_token_chunk)
        for piece, window in trim_between_windows(
            rolling_windows(chunks, 1, self.chunk_frames, cutter.limits.context)
        ):
            missing = cutter.width(window.num_frames) - window.num_frames
            with self.backend.computing():
                tokens, _ = self.check_tokens(np.pad(piece, ((0, 0), (0, missing))))
                results: Any = self._decode_frames(tokens, [window.num_frames])
                audio = to_numpy(results[0][window.kept.start * frame : window.kept.stop * frame])
            self.check_decoded(audio[None])
            yield audio

    def stream_encoder(self, lookahead: int | None = None) -> EncoderStream:
        """Return a streaming encoder for one recording.

        Args:
            lookahead: number of later frames that a token may depend on. A smaller number reduces latency but changes
                tokens. Default: `encoder.context.future`, which gives the same tokens as `encode`.

        Raises:
            NemoLfrError: if `lookahead` is not an integer of at least 0, or the backend does not support streaming.
        """
        return self._streaming().stream_encoder(self, lookahead)

    def stream_decoder(self, lookahead: int | None = None, first_lookahead: int | None = None) -> DecoderStream:
        """Return a streaming decoder for one recording.

        Args:
            lookahead: number of later frames that the audio of a frame may depend on. A smaller number reduces latency
                at some cost in quality. Default: `decoder.context.future`, which gives the same audio as `decode`.
            first_lookahead: lookahead in frames for the start of the audio, at most `lookahead`. The audio then starts
                n = `lookahead - first_lookahead` frames sooner, but its first n frames are approximate. Playback has
                no gap if the tokens of the first n + `lookahead` + 1 frames arrive at twice the playback rate or
                faster. Default: `lookahead`.

        Raises:
            NemoLfrError: for an invalid `lookahead` or `first_lookahead`, or a backend that does not stream.
        """
        backend = self._streaming()
        if first_lookahead is None:
            return backend.stream_decoder(self, lookahead)
        return backend.stream_decoder(self, lookahead, first_lookahead)

    def _streaming(self) -> StreamingBackend:
        if isinstance(self.backend, StreamingBackend):
            return self.backend
        raise NemoLfrError(
            f"{self.name}: the backend of this codec does not support streaming; load the checkpoint with PyTorch."
        )

    def encode_file(
        self,
        source: str | PathLike[str],
        target: str | PathLike[str],
        *,
        overwrite: bool = False,
        compress: bool = False,
        entropy_model: EntropyModel | str | PathLike[str] | None = None,
    ) -> int:
        """Encode an audio file to a token file.

        Args:
            source: the audio file, at any sample rate.
            target: the `.lfr` token file to write.
            overwrite: replace an existing `target`.
            compress: make the token file about 25 % smaller, without loss.
            entropy_model: entropy model to compress with, or the path of its `.lfrm` file. Default: the model for the
                bundled codec. If a model is passed, the file is compressed even if `compress` is not set.

        Returns:
            Number of samples that were encoded, at the codec's sample rate.

        Raises:
            AudioError: if `source` cannot be read.
            EntropyModelError: if the file is to be compressed, but there is no readable entropy model for this codec.
            NemoLfrError: if `target` is the same file as `source`, or exists while `overwrite` is not set. Also if
                the encoder returns NaN or infinite values.
        """
        source, target = expand_home(source), expand_home(target)
        check_distinct(source, target)
        self.backend.load("encode")  # first, so that the fingerprint hashes weights in memory, not in the checkpoint
        model = model_to_write(self, compress, entropy_model)
        with (
            AudioReader(source, self.sample_rate) as reader,
            TokenWriter.for_codec(target, self, overwrite, model) as writer,
        ):
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
        entropy_model: EntropyModel | str | PathLike[str] | None = None,
    ) -> int:
        """Decode a token file, or a segment of it, to an audio file.

        A decoded segment equals the same slice of the complete decoded file.

        Args:
            source: the `.lfr` token file.
            target: the audio file to write, 16-bit mono. Its suffix selects the format: .wav or .flac. Missing folders
                are created.
            start: start of the segment in seconds. Only the frames that the segment needs are read.
            duration: length of the segment in seconds, cut at the end of the recording. Default: up to the end.
            overwrite: replace an existing `target`.
            recover: decode the part of a damaged `source` before the damage, and log the duration of this part.
            entropy_model: entropy model that `source` was compressed with, or the path of its `.lfrm` file. Not
                needed if this model is bundled, or is in the folder of `source` or in a folder above it.

        Returns:
            Number of samples that were written.

        Raises:
            TokenFileError: if `source` is from another codec or damaged (with `recover`: if no block of it is intact),
                or `start` or `duration` is invalid.
            NemoLfrError: if `target` is the same file as `source`, has a suffix other than .wav and .flac, or exists
                while `overwrite` is not set. Also if the decoder returns NaN or infinite values.
            AudioError: if the format of `target` does not support the codec's sample rate.
        """
        source, target = expand_home(source), expand_home(target)
        check_distinct(source, target)
        with TokenReader(source, recover, entropy_model) as reader:
            reader.check_codec(self)
            reader.check_recovered()
            first, last = reader.samples_between(start, duration)
            frame, context = self.samples_per_frame, self.backend.decoder.context
            begin = max(0, first // frame - context.past)
            end = min(reader.num_frames, num_frames(last, frame) + context.future)
            skip = first - begin * frame
            with AudioWriter(target, self.sample_rate, overwrite=overwrite) as writer:
                remaining = last - first
                for audio in self.decode_blocks(reader.blocks(begin, end)):
                    piece = audio[skip : skip + remaining]
                    skip = max(0, skip - len(audio))
                    writer.write(piece)
                    remaining -= len(piece)
        return last - first

    def _audio_cutter(self) -> Cutter:
        backend = self.backend
        return Cutter(
            backend.arrays, backend.encoder, backend.batching, self.chunk_frames, self.samples_per_frame, np.float32
        )

    def _token_cutter(self) -> Cutter:
        backend = self.backend
        return Cutter(backend.arrays, backend.decoder, backend.batching, self.chunk_frames, 1, np.int64)

    def _at_own_rate(self, audio: object, audio_len: object, sample_rate: int | None) -> tuple[Array, list[int]]:
        """Convert audio in any supported form to float32 [B, T_audio] at the codec's rate; also return the lengths."""
        return to_batch(self.backend.arrays, audio, audio_len, sample_rate, self.sample_rate)

    def _integers(self, values: list[int]) -> Array:
        arrays = self.backend.arrays
        return arrays.cast(arrays.convert(values, "lengths", NemoLfrError), np.int64)
