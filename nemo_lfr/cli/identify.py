"""Identify files by their first bytes, and folders by the files in them."""

import os
from pathlib import Path
from typing import NamedTuple

from nemo_lfr.errors import NemoLfrError, counted
from nemo_lfr.io.folders import AUDIO_SUFFIXES, find_files
from nemo_lfr.io.locate import CONFIG_MEMBER, ONNX_ENCODER, PART_NAMES, SAFETENSORS, SAFETENSORS_INDEX
from nemo_lfr.io.regular import open_regular
from nemo_lfr.io.tables import SAVE_AS_CSV, SPREADSHEETS, table_suffix

TOKEN_SUFFIX = ".lfr"
CHECKPOINT_SUFFIXES = frozenset({".nemo", ".ckpt", ".pt", ".pth"})
STATE = ".tokenize"  # as in nemo_lfr.corpus.records, which is imported only where it is needed
HEAD_BYTES = 512
GZIP_MAGIC = b"\x1f\x8b"


class Identity(NamedTuple):
    """Kind of a file or folder.

    Attributes:
        kind: identifier, such as "audio", "tokens" or "checkpoint".
        text: description for messages, such as "an audio file".
        advice: clause that names the command or option that accepts the file or folder.
        counts: pairs (key, number of files) for a folder. `info --json` prints each number under its key.
    """

    kind: str
    text: str
    advice: str
    counts: tuple[tuple[str, int], ...] = ()


AUDIO = Identity("audio", "an audio file", "nemo-lfr encode reads it")
TOKENS = Identity("tokens", "a token file", "nemo-lfr decode reads it")
CHECKPOINT = Identity("checkpoint", "a checkpoint", "pass it as --model")
ENTROPY_MODEL = Identity("entropy_model", "an entropy model", "pass it as --entropy-model")
TABLE = Identity(
    "corpus", "a CSV or TSV table", "pass a table of audio files to nemo-lfr tokenize, evaluate or prepare table"
)
UNKNOWN = Identity("unknown", "not a token file, checkpoint, audio file or manifest", "nemo-lfr does not read it")
ANY_RATE = 22050  # sample rate in Hz for an `AudioReader` that only reads headers; it has no effect
# Offset and value of the bytes that identify a file, and the kind of file.
MAGIC = (
    (0, b"LFRT", TOKENS),
    (0, b"LFRM", ENTROPY_MODEL),
    (0, b"RIFF", AUDIO),
    (0, b"RIFX", AUDIO),
    (0, b"RF64", AUDIO),
    (0, b"fLaC", AUDIO),
    (0, b"OggS", AUDIO),
    (0, b"ID3", AUDIO),
    (0, b"FORM", AUDIO),
    (0, b".snd", AUDIO),
    (0, b"caff", AUDIO),
    (0, b"NIST_1A", AUDIO),
    (0, b"#!AMR", AUDIO),
    (0, b"riff.\x91\xcf\x11", AUDIO),
    (4, b"ftyp", AUDIO),
    (0, b"\x1aE\xdf\xa3", AUDIO),
    (0, b"PAR1", Identity("corpus", "a Parquet table", "nemo-lfr tokenize reads it")),
    (257, b"ustar", CHECKPOINT),
    (0, b"PK\x03\x04", CHECKPOINT),
    (0, b"\x80\x02", CHECKPOINT),  # pickle, the format of torch.save before PyTorch 1.6
)
# Names of files that identify a folder, and the kind of folder. The first match decides.
MEMBERS = (
    (ONNX_ENCODER, Identity("onnx", "a folder of ONNX files", "pass it as --model")),
    (CONFIG_MEMBER, Identity("checkpoint", "an unpacked checkpoint", "pass it as --model")),
    (SAFETENSORS, Identity("checkpoint", "a folder with a safetensors file", "pass it as --model")),
    (SAFETENSORS_INDEX, Identity("checkpoint", "a folder with safetensors files", "pass it as --model")),
    ("tokens.json", Identity("corpus_tokens", "a tokenized corpus", "nemo-lfr detokenize reads it")),
    ("recordings.json", Identity("evaluation", "the folder of an evaluation", "open its report.html")),
    ("state.json", Identity("corpus", "a saved Hugging Face dataset", "nemo-lfr tokenize reads it")),
    ("dataset_dict.json", Identity("corpus", "a saved Hugging Face dataset", "nemo-lfr tokenize reads it")),
)
SAFETENSORS_SUFFIX = ".safetensors"


def refuse_other_kind(path: Path, wanted: str) -> None:
    """Raise an error if an input is an audio file, a token file or an entropy model.

    Args:
        path: input from the command line; it need not exist.
        wanted: description of the expected input, for the message.

    Raises:
        NemoLfrError: if the file has one of these kinds. The message names the command or option that reads it.
    """
    identity = identify_content(path) if path.is_file() else None
    if identity in (AUDIO, TOKENS, ENTROPY_MODEL):
        raise NemoLfrError(f"{path}: this is {identity.text}, not {wanted}; {identity.advice}.")


def identify_suffix(path: Path) -> Identity:
    """Return the kind of file to which the suffix of a path belongs; `UNKNOWN` for an unknown suffix."""
    suffix = path.suffix.lower()
    if suffix in CHECKPOINT_SUFFIXES:
        return CHECKPOINT
    return TOKENS if suffix == TOKEN_SUFFIX else AUDIO if suffix in AUDIO_SUFFIXES else UNKNOWN


def identify_content(path: Path) -> Identity | None:
    """Identify a folder by its files, or a file by its first bytes.

    Args:
        path: existing file or folder.

    Returns:
        The kind of file or folder; None if the first bytes do not identify a file, as for some MP3 files.

    Raises:
        NemoLfrError: for a pipe, a device or a socket, because reading from it could block forever.
        OSError: if the file or folder cannot be read.
    """
    if path.is_dir():
        return _folder(path)
    with open_regular(path) as file:
        head = file.read(HEAD_BYTES)
    suffix = path.suffix.lower()
    if path.name in PART_NAMES and (folder := _by_names(path.parent)) and folder.kind in (CHECKPOINT.kind, "onnx"):
        return Identity("codec_part", "a part of a codec", f"pass its folder as --model: {path.parent}")
    if suffix in SPREADSHEETS:
        return Identity(UNKNOWN.kind, "a spreadsheet", SAVE_AS_CSV)
    for offset, magic, identity in MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return identity
    if suffix in CHECKPOINT_SUFFIXES and head.startswith(GZIP_MAGIC):
        return CHECKPOINT
    if suffix == SAFETENSORS_SUFFIX and head[8:9] == b"{":
        advice = "nemo-lfr does not read it; a codec is a folder that also contains config.json"
        return Identity("tensors", "a safetensors file with tensors only, such as golden vectors", advice)
    is_text = head.strip() and (b"\0" not in head or head.startswith(GZIP_MAGIC))
    if table_suffix(path) is not None and is_text:
        return TABLE
    starts = {".json": (b"{", b"["), ".jsonl": (b"{", b"["), ".gz": (GZIP_MAGIC,)}.get(suffix, (b'{"',))
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(starts):
        return Identity("corpus", "a manifest or other JSON", "nemo-lfr tokenize reads manifests and cuts")
    return None


def _describe_unfinished(path: Path) -> Identity | None:
    from nemo_lfr.corpus.records import RESUME, describe_unfinished

    text = describe_unfinished(path)
    return None if text is None else Identity("unfinished_tokens", f"an unfinished tokenize run: {text}", RESUME)


def _by_names(path: Path) -> Identity | None:
    """Identify a folder by the names of its files, without a search in its subfolders; None if no name is known."""
    names = set(os.listdir(path))
    for member, identity in MEMBERS:
        if member in names:
            return identity
    if STATE in names and (unfinished := _describe_unfinished(path)) is not None:
        return unfinished
    if any(name.startswith("cuts.") for name in names):
        return Identity("corpus", "a folder of Lhotse cuts", "nemo-lfr tokenize reads it")
    if any(name.endswith(".nemo") for name in names):
        return Identity("checkpoint", "a folder with a checkpoint", "pass it as --model")
    return None


def _folder(path: Path) -> Identity:
    if (named := _by_names(path)) is not None:
        return named
    unread: list[OSError] = []
    found = find_files(path, AUDIO_SUFFIXES | {TOKEN_SUFFIX}, report=lambda _: None, unread=unread)
    tokens = sum(file.suffix.lower() == TOKEN_SUFFIX for file in found)
    count = len(found) - tokens
    if count or tokens:
        readers = ["nemo-lfr encode, tokenize and prepare read the audio files"] if count else []
        readers += ["nemo-lfr decode reads the token files"] if tokens else []
        text = f"a folder of {counted(count, 'audio file')} and {counted(tokens, 'token file')}"
        text += f" ({counted(len(unread), 'subfolder')} cannot be read)" if unread else ""
        return Identity("files", text, "; ".join(readers), (("audio_files", count), ("token_files", tokens)))
    return Identity(
        "unknown", "a folder without audio, token files, checkpoint or ONNX files", "nemo-lfr does not read it"
    )
