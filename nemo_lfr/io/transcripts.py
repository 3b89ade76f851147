"""Read the transcripts of a speech corpus: text files beside recordings, and lists of texts."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from nemo_lfr.errors import ConfigError, NemoLfrError, printable, shorten
from nemo_lfr.io.folders import AUDIO_SUFFIXES, BROKEN
from nemo_lfr.io.locate import resolve
from nemo_lfr.io.text import decode, read_lines

# The numbers of the first and last sample, which precede the sentence in the text files of TIMIT
_TIMIT = re.compile(r"^0 \d{4,6} (?=\S)")
# Files that DVC, git-annex and the Hub's cache name after a hash of their content, which cannot be guessed
_NAMED_BY_CONTENT = re.compile(
    r"/(?:files/md5|\.dvc/cache)/[0-9a-f]{2}/[0-9a-f]{30}$"
    r"|--[^/]+/blobs/(?:[0-9a-f]{40}|[0-9a-f]{64})$"
    r"|/annex/objects/(?:[^/]+/){2}([A-Z0-9_]+-s\d+--[0-9a-f]{32,}[^/]*)/\1$"
)


def check_link(path: Path, corpus: Path, audio: Path | None = None) -> None:
    """Check that a text file or table of a corpus is not a link to a file elsewhere, which may be private.

    A link may lead to a file in the corpus, or to a file that is stored under the hash of its content. In a snapshot
    of the Hub's cache, a link may also lead to a blob of the same repository.

    If the recording is a link too, the text may link to the file with the same stem beside the recording's target. The
    text may also link to a file elsewhere if the relative path from the recording to the text equals the relative path
    between their targets.

    Args:
        path: the text file or table.
        corpus: folder of the corpus.
        audio: recording that the text belongs to; None for a file about several recordings, which are in its folder or
            below.

    Raises:
        ConfigError: if the link leads elsewhere.
        OSError: if the links form a loop.
    """
    if not path.is_symlink():
        return
    target, folder = resolve(path), resolve(path.parent)
    # The folder of blobs is not resolved, since it could be a link itself.
    blobs = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    if any(target.is_relative_to(allowed) for allowed in (resolve(corpus), *blobs)):
        return
    if _NAMED_BY_CONTENT.search(target.as_posix()) or _follows_audio(path, target, audio):
        return
    raise ConfigError(
        f"{path}: the file is a link that leads out of the corpus and is not followed; copy the file into the corpus."
    )


def _follows_audio(path: Path, target: Path, audio: Path | None) -> bool:
    """Return whether the links of a text and of a recording lead to files that belong together; see `check_link`."""
    recording = _first_audio(path.parent) if audio is None else audio
    if recording is None or not recording.is_symlink():
        return False
    source = resolve(recording)
    is_beside = audio is not None and target == source.with_suffix(target.suffix)
    return is_beside or target == Path(os.path.normpath(source / os.path.relpath(path, recording)))


def _first_audio(folder: Path) -> Path | None:
    """Return the first audio file in a folder or below it; None if there is none."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES:
                return Path(parent, name)
    return None


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
