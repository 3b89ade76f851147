"""Search folders for files, and report which files were skipped."""

import errno
import logging
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Callable, Collection
from pathlib import Path

from nemo_lfr.errors import NemoLfrError, counted, shorten

logger = logging.getLogger(__name__)

# Suffixes of files that libsndfile reads without other packages. .raw is not among them, since such files have no
# sample rate. Neither is .mat, since such files are rarely audio.
SOUND_SUFFIXES = frozenset(
    {
        ".wav",
        ".wave",
        ".wavex",
        ".bwf",
        ".rf64",
        ".w64",
        ".flac",
        ".mp3",
        ".mp2",
        ".mp1",
        ".mpga",
        ".mpa",
        ".ogg",
        ".oga",
        ".opus",
        ".aiff",
        ".aif",
        ".aifc",
        ".au",
        ".snd",
        ".caf",
        ".sph",
        ".nist",
        ".avr",
        ".htk",
        ".sf",
        ".ircam",
        ".gsm",
        ".paf",
        ".pvf",
        ".sds",
        ".svx",
        ".8svx",
        ".iff",
        ".voc",
        ".wve",
        ".xi",
    }
)
# Suffixes of files that need the extra `media`. Without it, reading such a file raises an error with the command that
# installs it. .ts is not among them, since such files are often source code.
MEDIA_SUFFIXES = frozenset(
    {
        *(".m4a", ".m4b", ".m4r", ".mp4", ".m4v", ".mov", ".3gp", ".3ga", ".3g2", ".webm", ".weba", ".mka", ".mkv"),
        *(".aac", ".adts", ".wma", ".wmv", ".asf", ".amr", ".awb", ".avi", ".flv", ".ac3", ".eac3", ".ec3", ".dts"),
        *(".wv", ".tta", ".ape", ".mpc", ".tak", ".thd", ".mlp", ".latm", ".loas", ".ra", ".rm", ".spx", ".ogv"),
        *(".ogx", ".mts", ".m2ts", ".mpg", ".mpeg", ".vob", ".sox"),
        # Formats that cannot be read. The error message says how to convert the file.
        *(".dsf", ".dff", ".qcp", ".shn", ".nut", ".oma", ".aa3"),
    }
)
AUDIO_SUFFIXES = SOUND_SUFFIXES | MEDIA_SUFFIXES
WRITABLE_FORMATS = ("wav", "flac")  # lossless formats that keep the number of samples; the first is the default
WRITABLE_SUFFIXES = tuple(f".{name}" for name in WRITABLE_FORMATS)
COMPRESSED = (".json.gz", ".jsonl.gz", ".csv.gz", ".tsv.gz")  # suffixes of lists that are compressed
# How to read files with certain suffixes, for messages about a folder without files of the wanted kind.
ADVICE = (
    (
        frozenset({".tar", ".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".rar"}),
        "unpack archives (such as the shards of WebDataset) into a folder, and pass the folder",
    ),
    (
        frozenset({".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", *COMPRESSED}),
        "pass a manifest, a table or a file of cuts itself to nemo-lfr tokenize",
    ),
    (frozenset({".lfr"}), "nemo-lfr decode reads .lfr files"),
    (AUDIO_SUFFIXES, "nemo-lfr encode and tokenize read audio files"),
)
# Paths of transcripts of published corpora, and the KIND of `nemo-lfr prepare` that reads them
TRANSCRIPTS = (
    (re.compile(r"\.trans\.txt$"), "librispeech"),
    (re.compile(r"\.normalized\.txt$"), "lhotse:libritts"),
    (re.compile(r"[/\\]transcripts\.txt$"), "mls"),
    (re.compile(r"[/\\]txt[/\\](?P<speaker>[ps]\d+)[/\\](?P=speaker)_\d+\.txt$"), "vctk"),
    (re.compile(r"[/\\](train|dev|test|ss-corpus-[^/\\]+)\.tsv$"), "commonvoice"),
)
# Names of folders that operating systems, network drives and notebooks create, in lower case.
SYSTEM_FOLDERS = frozenset(
    {
        "__macosx",
        "@eadir",
        "@recycle",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "recycler",
        "system volume information",
        "lost+found",
        "__pycache__",
        "network trash folder",
        "temporary items",
    }
)
# Maximum length of a file name in bytes on the file systems of Linux, macOS and Windows.
MAX_NAME = 255
# Reasons for skipping files, in the singular and in the plural. Other reasons are suffixes.
PLURALS = {
    "hidden file": "hidden files",
    "hidden or system folder": "hidden or system folders",
    "folder found twice": "folders found twice",
    "link to a folder that was already read": "links to folders that were already read",
    "pipe, socket or device": "pipes, sockets or devices",
}
# Error numbers for a link whose target does not exist, or is not a folder.
BROKEN = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG))
NAMED = 5  # maximum number of reasons, and of unreadable folders, that the report lists


def find_files(
    root: Path,
    suffixes: Collection[str],
    *,
    companion_suffixes: Collection[str] = (),
    companions: set[Path] | None = None,
    known: Collection[str] = (),
    report: Callable[[str], None] = logger.warning,
    unread: list[OSError] | None = None,
) -> list[Path]:
    """Find files with certain suffixes in a folder and its subfolders.

    Hidden files and folders and system files (`._*`, `__MACOSX`, `@eaDir` ...) are skipped. Links are followed, but no
    folder is read twice. Broken links are returned too.

    Args:
        root: folder to search; it may itself be hidden.
        suffixes: suffixes in lower case, with the dot; the comparison ignores case.
        companion_suffixes: suffixes of companion files, such as ".txt" of transcripts; the comparison does not ignore
            case. If `a.wav` is found, its companion file `a.txt` in the same folder is not reported as skipped.
        companions: set to which the path of everything with a companion suffix is added, including folders and broken
            links.
        known: names of files that the caller reads itself, so they are neither found nor reported as skipped.
        report: function that is called at most once, with one line that says how many files were skipped and why.
        unread: list to which the error of each unreadable folder below `root` is added. If it is None, the first of
            these errors is raised.

    Returns:
        The sorted paths.

    Raises:
        NemoLfrError: if `root` is not a folder.
        OSError: if `root` or, with `unread` None, a folder below `root` cannot be read.
    """
    if not root.is_dir():
        raise NemoLfrError(f"{root}: {'not a folder' if os.path.lexists(root) else 'no such folder'}.")
    walk = _Walk(root, frozenset(suffixes), frozenset(companion_suffixes), frozenset(known))
    if walk.unread and unread is None:
        raise walk.unread[0]
    if text := walk.passed_over():
        report(text)
    if unread is not None:
        unread += walk.unread
    if companions is not None:
        companions |= walk.companions
    return sorted(walk.found)


def find_named(root: Path, pattern: str, unread: list[OSError] | None = None) -> list[Path]:
    """Find files in a folder and its subfolders by a pattern such as "clips/*.mp3" (see `Path.match`).

    See `find_files` for the other arguments and the errors. Skipped files are not reported.
    """
    suffix = pattern[pattern.rindex(".") :]
    found = find_files(root, {suffix}, report=lambda _: None, unread=unread)
    return [path for path in found if path.match(pattern)]


def describe_contents(root: Path, wanted: Collection[str]) -> str:
    """Return text to append to an error message about a folder that has no files of the wanted kind.

    Args:
        root: the folder.
        wanted: suffixes that were searched for.

    Returns:
        Text that says which other files the folder contains and how to read them, such as " (2 skipped: 2 .tar);
        unpack archives ...". The text is empty if there are no other files.
    """
    walk = _Walk(root, frozenset(wanted), frozenset(), frozenset())
    report = walk.passed_over()
    if not report:
        return ""
    kinds = {path.suffix.lower() for path in walk.found} | walk.passed.keys()
    advice = [text for suffixes, text in ADVICE if kinds & suffixes]
    return f" ({report.partition('found; ')[2]})" + "".join(f"; {text}" for text in advice)


class _Walk:
    """State of one recursive search."""

    def __init__(
        self, root: Path, suffixes: frozenset[str], companion_suffixes: frozenset[str], known: frozenset[str]
    ) -> None:
        self.root = os.fspath(root)
        self.suffixes = suffixes
        self.companion_suffixes, self.known = companion_suffixes, known
        self.found: list[Path] = []
        self.companions: set[Path] = set()
        self.passed: Counter[str] = Counter()
        self.corpora: set[str] = set()  # kinds of corpora whose transcripts were skipped
        self.unread: list[OSError] = []
        self._seen = {file_identity(os.stat(root))}
        self._folders = [self.root]
        # Links are followed last. If a folder can also be reached without a link, its files get the path without one.
        self._links: deque[str] = deque()
        while self._folders or self._links:
            if self._folders:
                self._read(self._folders.pop())
            else:
                self._follow(self._links.popleft())

    def _follow(self, link: str) -> None:
        try:
            identity = file_identity(os.stat(link))
        except OSError as error:
            self.unread.append(error)
            return
        if identity in self._seen:
            self.passed["link to a folder that was already read"] += 1
        else:
            self._seen.add(identity)
            self._read(link)

    def _read(self, folder: str) -> None:
        try:
            with os.scandir(folder) as entries:
                shown = (entry for entry in entries if entry.name not in self.known or entry.is_dir())
                children = sorted(shown, key=lambda entry: entry.name)
        except OSError as error:
            if folder == self.root:
                raise
            self.unread.append(error)
            return
        number = len(self.found)
        if self.companion_suffixes:
            named = (entry for entry in children if os.path.splitext(entry.name)[1] in self.companion_suffixes)
            self.companions.update(Path(entry.path) for entry in named)
        companions = [entry for entry in children if not self._take(entry)]
        if companions:
            stems = {path.stem for path in self.found[number:]}
            for entry in companions:
                stem, suffix = os.path.splitext(entry.name)
                if stem not in stems:
                    self._skip(entry, suffix.lower())

    def _take(self, entry: "os.DirEntry[str]") -> bool:
        """Record an entry of a folder, and return True. For a companion file, only return False."""
        ending = os.path.splitext(entry.name)[1]
        suffix = ending.lower()
        hidden = entry.name.startswith(".")
        status = None
        try:
            # The folder listing contains the type of each entry, so regular files need no `stat` call.
            if not (is_file := entry.is_file(follow_symlinks=False)):
                status = entry.stat()
                is_file = stat.S_ISREG(status.st_mode)
        except OSError as error:
            if not hidden and suffix in self.suffixes:  # mostly a broken link
                self.found.append(Path(entry.path))
            elif hidden or error.errno in BROKEN:
                self.passed[f"unreadable ({error.strerror})"] += 1
            else:  # a folder on a network drive that is not available, for instance
                self.unread.append(error)
            return True
        is_folder = status is not None and stat.S_ISDIR(status.st_mode)
        if hidden or (is_folder and entry.name.lower() in SYSTEM_FOLDERS):
            self.passed["hidden or system folder" if is_folder else "hidden file"] += 1
        elif is_folder:
            self._enter(entry)
        elif suffix not in self.suffixes:
            if ending in self.companion_suffixes:
                return False
            suffix = next((end for end in COMPRESSED if entry.name.lower().endswith(end)), suffix)
            self._skip(entry, shorten(suffix, 16) if suffix else "without a suffix")
        elif is_file:
            self.found.append(Path(entry.path))
        else:
            self.passed["pipe, socket or device"] += 1
        return True

    def _skip(self, entry: "os.DirEntry[str]", reason: str) -> None:
        self.passed[reason] += 1
        if self.companion_suffixes:  # the caller reads transcripts
            self.corpora.update(kind for pattern, kind in TRANSCRIPTS if pattern.search(entry.path))

    def _enter(self, entry: "os.DirEntry[str]") -> None:
        if entry.is_symlink():
            self._links.append(entry.path)
            return
        identity = file_identity(os.stat(entry.path))  # on Windows the inode of a directory entry is always 0
        if identity in self._seen:
            self.passed["folder found twice"] += 1
        else:
            self._seen.add(identity)
            self._folders.append(entry.path)

    def passed_over(self) -> str:
        """Return one line about the skipped files and unreadable folders, or an empty string if there are none."""
        if not self.passed and not self.unread:
            return ""
        order = sorted(self.passed.items(), key=lambda item: (-item[1], item[0]))
        kinds = [counted(count, kind, PLURALS.get(kind, kind)) for kind, count in order]
        if len(kinds) > NAMED:
            kinds[NAMED:] = [counted(len(kinds) - NAMED, "other kind")]
        total = sum(self.passed.values())
        parts = [f"{total} skipped: {', '.join(kinds)}"] if total else []
        if self.unread:
            named = ", ".join(
                f"{shorten(os.path.relpath(error.filename, self.root))} ({error.strerror})"
                for error in self.unread[:NAMED]
            ) + (", ..." if len(self.unread) > NAMED else "")
            parts.append(f"{counted(len(self.unread), 'folder')} cannot be read: {named}")
        if self.corpora:
            parts.append(f"nemo-lfr prepare may read their texts (KIND {' or '.join(sorted(self.corpora))})")
        return f"{shorten(self.root, 200)}: {counted(len(self.found), 'file')} found; {'; '.join(parts)}"


def file_identity(status: os.stat_result) -> tuple[int, int]:
    """Return a key that is the same for two paths of one file or folder."""
    return status.st_dev, status.st_ino
