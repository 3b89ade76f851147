r"""Output of `--json`: one TypedDict for each command.

Keys are in snake_case. A key whose value has a unit ends in the unit: `_s` seconds, `_hz` hertz, `_bps` bits per
second, `_bytes` bytes, `_db` decibels. Numbers are JSON numbers, and paths are strings, in which each byte that is not
valid UTF-8 is written as `\x` and two hex digits. Every output has the key `failures`: a list of `Failure` records,
empty on success. If a command fails before it has a result, the output has only this key. `serve` prints its output
when a signal stops it. Other commands that a signal stops print no output.
"""

from typing import Literal, TypedDict

from nemo_lfr.errors import Failure


class Result(TypedDict):
    """Base class of all outputs, with the key `failures`, which every output has."""

    failures: list[Failure]


class Quality(TypedDict):
    """Measured quality. A metric is None if it was not measured, for example because its package is not installed.

    Attributes:
        pesq_wb: wideband PESQ (ITU-T P.862.2), on the MOS scale.
        estoi: ESTOI, at most 1.
        si_sdr_db: SI-SDR in dB.
    """

    pesq_wb: float | None
    estoi: float | None
    si_sdr_db: float | None


class FileFigures(TypedDict):
    """One file that `encode` or `decode` wrote.

    Attributes:
        input: path of the input.
        output: path of the output.
        duration_s: duration of the recording.
        samples: number of samples in the recording at the codec's sample rate.
        token_file_bytes: size of the token file, which is the output of `encode` and the input of `decode`.
        bit_rate_bps: bits per second of audio, counting the whole token file.
        times_real_time: seconds of audio per second of processing.
    """

    input: str
    output: str
    duration_s: float
    samples: int
    token_file_bytes: int
    bit_rate_bps: float
    times_real_time: float


class FilesResult(Result):
    """Output of `encode` and `decode`. Files that already existed and were kept are not in `files`."""

    files: list[FileFigures]


class CodecFigures(TypedDict):
    """A checkpoint, a folder of ONNX files, or the bundled codec, as described by `info`.

    Attributes:
        encoder_context_frames: how many frames before and after a frame influence its tokens, as [before, after].
        decoder_context_frames: how many frames before and after a frame influence its audio, as [before, after].
        encoder_parameters: number of parameters; None for ONNX files.
        decoder_parameters: number of parameters; None for ONNX files.
        file_bytes: size of the checkpoint; None for ONNX files.
        bundled_pesq_wb: measured PESQ-WB of the bundled codec; None for other codecs.
        bundled_estoi: measured ESTOI of the bundled codec; None for other codecs.
    """

    kind: Literal["codec"]
    format: Literal["checkpoint", "onnx"]
    name: str
    path: str
    file_bytes: int | None
    encoder_parameters: int | None
    decoder_parameters: int | None
    sample_rate_hz: int
    samples_per_frame: int
    frame_rate_hz: float
    num_codebooks: int
    codebook_size: int
    levels: list[int]
    bit_rate_bps: float
    encoder_context_frames: list[int]
    decoder_context_frames: list[int]
    fingerprint: str
    bundled_pesq_wb: float | None
    bundled_estoi: float | None


class TokenFileFigures(TypedDict):
    """A token file, as described by `info`.

    Attributes:
        bit_rate_bps: bits per second of audio, counting the whole file.
        payload_bit_rate_bps: bits per second of audio, counting only the packed or compressed tokens, without header,
            lengths and checksums.
        payload_bits_per_frame: bits per frame, counting only the packed or compressed tokens.
        entropy_model: hash of the entropy model that the file was compressed with; None if it is not compressed.
    """

    kind: Literal["tokens"]
    path: str
    compressed: bool
    duration_s: float
    samples: int
    frames: int
    file_bytes: int
    bit_rate_bps: float
    payload_bit_rate_bps: float
    payload_bits_per_frame: float
    entropy_model: str | None
    sample_rate_hz: int
    samples_per_frame: int
    num_codebooks: int
    levels: list[int]
    codec_fingerprint: str
    precision: str
    written_by: str


class EntropyModelFigures(TypedDict):
    """An entropy model, as described by `info`. For its settings, see `nemo_lfr.io.entropy.model`."""

    kind: Literal["entropy_model"]
    path: str
    entropy_model: str
    file_bytes: int
    num_codebooks: int
    levels: list[int]
    codec_fingerprint: str
    past_frames: int
    averages: list[int]
    spreads: list[int]
    hidden_units: list[int]
    written_by: str
    use: str


class AudioFigures(TypedDict):
    """An audio file, as described by `info`.

    Attributes:
        duration_s: duration of the audio.
        sample_rate_hz: sample rate of the file.
        use: text that says which command accepts the file.
    """

    kind: Literal["audio"]
    path: str
    duration_s: float
    sample_rate_hz: int
    channels: int
    file_bytes: int
    use: str


class OtherFigures(TypedDict):
    """Result of `info` for a corpus, for the output of `tokenize`, or for an evaluation.

    Attributes:
        description: text that says what the file or folder is.
        use: text that says which command accepts the file or folder.
    """

    kind: Literal["corpus", "corpus_tokens", "unfinished_tokens", "evaluation"]
    path: str
    description: str
    use: str


class FolderFigures(TypedDict):
    """A folder of audio files and token files, as described by `info`.

    Attributes:
        description: text that says what the folder is.
        use: text that says which commands accept the folder.
        audio_files: number of audio files in the folder and its subfolders.
        token_files: number of token files in the folder and its subfolders.
    """

    kind: Literal["files"]
    path: str
    description: str
    use: str
    audio_files: int
    token_files: int


InfoFigures = CodecFigures | TokenFileFigures | EntropyModelFigures | AudioFigures | OtherFigures | FolderFigures


class InfoResult(Result):
    """Output of `info`.

    Attributes:
        items: one description for each argument, in order; without arguments, the description of the bundled codec.
            If there is one argument or none, the keys of the description are also at the top level of the output.
    """

    items: list[InfoFigures]


class DemoResult(Result):
    """Output of `demo`.

    Attributes:
        original_bytes: size that the recording has as 16-bit samples.
        token_file_bytes: size of the token file.
        bit_rate_bps: bits per second of audio, counting the whole token file.
        codec_bit_rate_bps: bits per second of audio, counting only the tokens.
        encode_s: time that encoding took.
        decode_s: time that decoding took.
        spectrograms: path of the picture; None if matplotlib is not installed.
        quality: measured quality of the decoded audio.
        encode_times_real_time: seconds of audio per second of encoding.
        decode_times_real_time: seconds of audio per second of decoding.
    """

    codec: str
    original: str
    tokens: str
    decoded: str
    spectrograms: str | None
    duration_s: float
    original_bytes: int
    token_file_bytes: int
    bit_rate_bps: float
    codec_bit_rate_bps: float
    encode_s: float
    decode_s: float
    encode_times_real_time: float
    decode_times_real_time: float
    quality: Quality


class ExportResult(Result):
    """Output of `export`: the files that were written."""

    files: list[str]


class SplitFigures(TypedDict):
    """One manifest that `prepare` wrote."""

    manifest: str
    utterances: int
    speakers: int
    duration_s: float


class PrepareResult(Result):
    """Output of `prepare`.

    Attributes:
        splits: dict from the name of each split (train, valid or test) to the figures of its manifest.
        failures_file: path of failures.jsonl; None if nothing failed.
        held_out_by: kind of group that was held out for validation: "speaker", "folder" or "file". Several kinds are
            joined by "or". Empty if nothing was held out.
        audio_dir: absolute path of the folder that contains the audio files.
    """

    splits: dict[str, SplitFigures]
    failures_file: str | None
    held_out_by: str
    audio_dir: str


class TokenizeResult(Result):
    """Output of `tokenize`. The file tokens.json in the output folder has more information.

    With --shard-of, several processes share a run. While shards of other processes are missing, `metadata` and
    `failures_file` are None, and the counts are those of this process.

    Attributes:
        output: the output folder.
        metadata: path of tokens.json.
        failures_file: path of failures.jsonl, which is empty if nothing failed.
        missing_shards: number of shards that other processes have not completed yet.
    """

    output: str
    metadata: str | None
    failures_file: str | None
    missing_shards: int
    format: str
    shards: int
    clips: int
    frames: int
    duration_s: float


class DetokenizeResult(Result):
    """Output of `detokenize`.

    Attributes:
        files: the audio files, including those that already existed.
        kept: number of files that already existed and were kept.
    """

    files: list[str]
    kept: int


class EvaluateResult(Result):
    """Output of `evaluate`.

    Attributes:
        files: paths of the report in all formats; the CSV files contain the measured values.
        recordings: number of recordings.
        codecs: names of the compared codecs.
    """

    files: list[str]
    recordings: int
    codecs: list[str]


class EntropyFitResult(Result):
    """Output of `entropy fit`.

    Attributes:
        utterances: number of utterances that the model was fitted on.
        frames: number of frames in these utterances.
        held_out_frames: number of frames in the held-out utterances, on which the model was evaluated.
        entropy_model: hash of the model.
        bits_per_frame: mean number of bits per frame that the model needs, measured on the held-out utterances,
            without the overhead of the coder and the file.
        uniform_bits_per_frame: number of bits per frame without a model: num_codebooks * log2(codebook_size).
        saved_share: 1 - bits_per_frame / uniform_bits_per_frame.
    """

    output: str
    entropy_model: str
    file_bytes: int
    utterances: int
    frames: int
    held_out_frames: int
    bits_per_frame: float
    uniform_bits_per_frame: float
    saved_share: float


class ServeResult(Result):
    """Output of `serve`, printed when the server stops.

    Attributes:
        url: address of the server.
        num_streams: number of streams that were opened, including streams for posted files.
    """

    url: str
    num_streams: int
