"""Read the transcripts of a speech corpus: text files beside recordings, and lists of texts."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from nemo_lfr.errors import ConfigError, NemoLfrError, printable, shorten
from nemo_lfr.io.folders import BROKEN
from nemo_lfr.io.locate import resolve
from nemo_lfr.io.text import decode, read_lines

# The numbers of the first and last sample, which precede the sentence in the text files of TIMIT
_TIMIT = re.compile(r"^0 \d{4,6} (?=\S)")


def check_link(path: Path, corpus: Path, audio: Path | None = None) -> None:
    """Check that a text file or table of a corpus is not a link to a file elsewhere, which may be private.

    A link may lead to a file in the corpus, from a snapshot in the Hub's cache to a blob of the same repository, or to
    the text file beside the target of a linked recording.

    Args:
        path: the text file or table.
        corpus: folder of the corpus.
        audio: recording that the text belongs to; None for a file about several recordings.

    Raises:
        ConfigError: if the link leads elsewhere.
        OSError: if the links form a loop.
    """
    if not path.is_symlink():
        return
    target, folder = resolve(path), resolve(path.parent)
    # The folder of blobs is not resolved, since it could be a link itself.
    blobs = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    is_inside = any(target.is_relative_to(allowed) for allowed in (resolve(corpus), *blobs))
    if not is_inside and not (audio and audio.is_symlink() and target == resolve(audio).with_suffix(target.suffix)):
        raise ConfigError(
            f"{path}: the file is a link that leads out of the corpus and is not followed; copy the file into the "
            "corpus."
        )


def text_of(*transcripts: Path, corpus: Path, audio: Path) -> tuple[dict[str, str], str | None]:
    """Read the text file of a recording.

    Args:
        transcripts: possible paths of the text file. The first one that exists is read.
        corpus: folder of the corpus.
        audio: the recording.

    Returns:
        The labels, and an error message. The labels are {"text": ...} if the file was read, otherwise empty. The
        message says why an existing file cannot be read; otherwise it is None.
    """
    for transcript in transcripts:
        try:
            os.lstat(transcript)  # a broken link counts as an unreadable transcript
        except PermissionError:
            continue  # the folder cannot be entered, so the recording cannot be read either
        except OSError:
            pass  # `read_lines` raises it again
        try:
            check_link(transcript, corpus, audio)
            lines = [decode(line) for line in read_lines(transcript)]
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in BROKEN and not os.path.lexists(transcript):
                continue
            return {}, f"the transcript {transcript.name}: {why_unreadable(error, transcript)}"
        return {"text": _TIMIT.sub("", " ".join(line for line in lines if line.strip()))}, None
    return {}, None


def transcript_lines(path: Path, corpus: Path, separator: bytes) -> Iterator[tuple[str | None, str, str | None]]:
    """Yield (name, text, error message or None) for each line of a transcript.

    In each line, `separator` follows the name. If the file cannot be read, yield only (None, path relative to
    `corpus`, error message).
    """
    try:
        check_link(path, corpus)
        lines = read_lines(path)
    except (OSError, ValueError) as error:
        yield None, str(path.relative_to(corpus)), why_unreadable(error, path)
        return
    for line in lines:
        if not line.strip():
            continue
        name, _, text = line.partition(separator)
        try:
            yield decode(name), decode(text), None
        except ValueError as error:
            yield shorten(name.decode(errors="replace")), "", f"the line in {path.name}: {error}"


def why_unreadable(error: Exception, path: Path) -> str:
    """Return the reason why a text file cannot be used, without the path of the file."""
    if isinstance(error, NemoLfrError):  # the message already names the file
        return str(error).removeprefix(f"{printable(str(path))}: ").rstrip(".")
    return f"the file cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
