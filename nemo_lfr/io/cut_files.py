"""Read cuts from Lhotse manifests and Shar folders, even if some cuts are malformed.

Lhotse's own readers stop at the first cut that they cannot read, and end without an error if a file of a Shar is
truncated.
"""

import json
import logging
import os
import re
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_lfr.errors import AudioError, ConfigError, counted, shorten
from nemo_lfr.io.bounded import member_bytes, open_tar
from nemo_lfr.io.cut_audio import check_cut, sources_of
from nemo_lfr.io.json_lines import LineRanges, json_lines
from nemo_lfr.io.manifests import NOT_A_LINE, describe, line_id
from nemo_lfr.io.supervisions import read_supervisions, supervisions_beside

logger = logging.getLogger(__name__)

CUT_TYPES = ("MonoCut", "MultiCut", "MixedCut", "PaddingCut", "Cut")
# Attributes of Lhotse's cut classes that a field of a Shar may set. Other fields are custom data.
CUT_FIELDS = ("recording", "features")
# Maximum number of lines that are read to find the kind of a file.
FIRST_LINES = 100
# A source that is not empty and does not begin with a slash
_RELATIVE = re.compile(rb'"source"\s*:\s*"[^/"]')


@dataclass(frozen=True)
class CutItem:
    """A cut in a file, or the reason why the cut is invalid.

    Attributes:
        id: id of the cut; if it cannot be read, an id derived from the line.
        cut: the Lhotse cut; None if there is a problem.
        problem: reason why the cut is invalid; None if it is valid.
    """

    id: str
    cut: Any = None
    problem: str | None = None


def kind_of(path: Path) -> str | None:
    """Return the kind of a Lhotse JSON-lines file.

    Returns:
        "cuts", "recordings", "supervisions" or "features"; None for other files.
    """
    for _, line in zip(range(FIRST_LINES), json_lines(path), strict=False):
        try:
            item = json.loads(line)
        except NOT_A_LINE:
            continue
        if not isinstance(item, dict):
            continue
        if item.get("type") in CUT_TYPES:
            return "cuts"
        if "audio_filepath" in item:  # a NeMo manifest, regardless of its other lines
            return None
        if "sources" in item and "sampling_rate" in item:
            return "recordings"
        if "num_features" in item:
            return "features"
        if "recording_id" in item and "start" in item:
            return "supervisions"
    return None


def has_relative_paths(path: Path) -> bool:
    """Return whether a file of cuts or recordings contains a relative path of an audio file."""
    for line in json_lines(path):
        if not _RELATIVE.search(line):  # parsing millions of cuts would take long
            continue
        try:
            sources = list(sources_of(json.loads(line)))
            if any(source.get("type") == "file" and not os.path.isabs(source["source"]) for source in sources):
                return True
        except NOT_A_LINE:
            continue
    return False


class CutFile:
    """File of cuts or recordings. If ranges of cuts are read in order, the file is read only once.

    Supervisions of recordings are read from the accompanying file, if it exists (see `supervisions_beside`).

    Args:
        path: file of cuts or recordings in JSON lines.
        allow_url: whether cuts may refer to http(s) URLs, see `check_cut`.
    """

    def __init__(self, path: Path, allow_url: bool = False) -> None:
        self.path, self.allow_url = path, allow_url
        self._lines = LineRanges(path)

    @cached_property
    def _supervisions(self) -> dict[str, list[bytes]] | None:
        """Manifest lines of supervisions by recording id; None for a file of cuts."""
        return read_supervisions(self.path) if kind_of(self.path) == "recordings" else None

    def read(self, start: int = 0, stop: int = sys.maxsize) -> Iterator[CutItem]:
        """Yield cuts, or one cut for each recording in a file of recordings.

        Args:
            start: index of the first item to yield; earlier items are not parsed.
            stop: index after the last item to yield.

        Yields:
            Each cut, or the reason why it is invalid.

        Raises:
            ConfigError: if the file cannot be read.
        """
        supervisions = self._supervisions
        listed = set()
        for line in self._lines.read(start, stop):
            try:
                manifest = json.loads(line)
                if supervisions is not None:
                    manifest = _cut_of(manifest, supervisions)
                    listed.add(manifest["id"])
                yield _item(manifest, self.allow_url)
            except NOT_A_LINE as error:
                yield CutItem(
                    line_id(line),
                    problem=f"not a Lhotse cut: {describe(error)}: {shorten(line.decode(errors='replace').strip())}",
                )
        if supervisions is None or (start, stop) != (0, sys.maxsize):
            return
        if unlisted := sum(len(items) for key, items in supervisions.items() if key not in listed):
            text = "%s: skipped %s of recordings that are not listed in %s."
            logger.warning(text, supervisions_beside(self.path), counted(unlisted, "supervision"), self.path.name)


def check_fields(folder: Path, fields: Iterable[str]) -> None:
    """Check that each field of a Shar has a valid name, and does not replace an attribute or method of a cut.

    Args:
        folder: folder of the Shar, for messages.
        fields: names of the fields.

    Raises:
        ConfigError: if a field has a reserved or invalid name.
    """
    from lhotse import MonoCut, MultiCut

    for name in fields:
        own = name in MonoCut.__dataclass_fields__ or hasattr(MonoCut, name) or hasattr(MultiCut, name)
        if name != "cuts" and (not name.isidentifier() or (own and name not in CUT_FIELDS)):
            raise ConfigError(
                f"{folder}: {shorten(name)!r} is the name of a field of this Shar, but is not a valid name for custom "
                "data of a cut; rename the field's files, or move them to another folder."
            )


def is_shar_file(path: Path) -> bool:
    """Return whether a `.jsonl` or `.tar` file belongs to a Shar, according to its content.

    A tar file that cannot be read is accepted, so that the reader of the Shar reports the reason.
    """
    if not path.is_file():
        return False
    if ".jsonl" in path.suffixes:
        try:
            line = next(json_lines(path), None)
            is_cuts = path.name.startswith("cuts.") and kind_of(path) == "cuts"
            return line is None or is_cuts or "cut_id" in json.loads(line)
        except NOT_A_LINE:
            return False
    try:
        with open_tar(path) as tar:
            names = [member.name for member in islice(tar, 2)]  # data, and its manifest
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError):
        return True
    return not names or names[-1].endswith((".json", ".nometa"))


def read_shar(cuts: Path, fields: Mapping[str, Path], allow_url: bool = False) -> Iterator[CutItem]:
    """Yield the cuts in one shard of a Lhotse Shar, with their data from the other fields of the Shar.

    Args:
        cuts: `cuts.*.jsonl` or `cuts.*.jsonl.gz` file of the shard.
        fields: a dict from the name of each field to its `.tar` or `.jsonl` file, which may be compressed with gzip.
        allow_url: whether cuts may refer to http(s) URLs, see `check_cut`.

    Yields:
        Each cut, or the reason why it is invalid.

    Raises:
        ConfigError: if the file `cuts` cannot be read. A damaged file of a field makes cuts invalid instead.
    """
    readers = {name: _field(path, name) for name, path in fields.items()}
    broken: dict[str, str] = {}
    for line in json_lines(cuts):
        values: dict[str, tuple[str, Any]] = {}
        for name, reader in readers.items():
            if name not in broken:
                try:
                    values[name] = next(reader)
                except StopIteration:
                    broken[name] = f"{fields[name].name} is truncated: it ends before this cut"
                except Exception as error:  # raised by tarfile, gzip or JSON
                    reason = shorten(str(error) or type(error).__name__, 200)
                    broken[name] = f"{fields[name].name} is truncated or malformed ({reason})"
        try:
            manifest = json.loads(line)
            item = _item(manifest, allow_url)
        except NOT_A_LINE as error:
            yield CutItem(line_id(line), problem=f"not a Lhotse cut: {describe(error)}")
            continue
        if item.problem is None and broken:
            item = CutItem(item.id, problem=next(iter(broken.values())) + ".")
        if item.problem is None:
            item = _attach(item, values, allow_url)
        yield item
    for name, reader in readers.items():
        if name in broken:
            continue
        try:
            more = next(reader, None)
        except Exception:  # the end of the file is damaged, but all cuts have been read
            continue
        if more is not None:
            problem = f"{fields[name].name} has more items than {cuts.name} has cuts; create the Shar again."
            yield CutItem(more[0], problem=problem)
            return


def _attach(item: CutItem, values: Mapping[str, tuple[str, Any]], allow_url: bool) -> CutItem:
    from lhotse.serialization import deserialize_item
    from lhotse.shar.utils import fill_shar_placeholder

    try:
        for name, (of, value) in values.items():
            if of != item.id:
                raise AudioError(
                    f"the field {name} has the data of the cut {shorten(of)!r} where the data of this cut should be; "
                    "an item is missing or out of order, so create the Shar again."
                )
            if value is None:
                continue
            manifest, data, member = value
            if manifest is None:
                raise AudioError(
                    f"in the tar file of the field {name}, the manifest of this cut is not JSON; create the Shar "
                    "again."
                )
            if isinstance(manifest, dict):
                check_cut(manifest, allow_url)
                if member is not None or _is_manifest(manifest):
                    manifest = deserialize_item(manifest)
            if member is not None:
                fill_shar_placeholder(manifest=manifest, data=data, tarpath=member)
            setattr(item.cut, name, manifest)
    except Exception as error:  # Lhotse classes may raise anything
        return CutItem(item.id, problem=explain(error))
    return item


def explain(error: Exception) -> str:
    """Return one line that explains why a cut is invalid."""
    if isinstance(error, AudioError):
        return shorten(error, 300)
    if isinstance(error, KeyError):
        return f"the cut has no key {shorten(error)}"
    return shorten(f"{type(error).__name__}: {' '.join(str(error).split())}", 300)


def _is_manifest(value: Mapping[str, Any]) -> bool:
    return "sources" in value or "storage_type" in value or "array" in value


def _field(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the items in the file of one field of a Shar.

    Each item is a pair (id of the cut, value). The value is a tuple (manifest, data, name of the tar member), or None
    if the cut has no value for this field.
    """
    if not re.search(r"\.tar(\.gz)?$", path.name):
        for line in json_lines(path):
            item = json.loads(line)
            yield str(item["cut_id"]), (item[name], None, None) if name in item else None
        return
    with open_tar(path) as tar:
        members = iter(tar)
        for first in members:
            data = None if first.name.endswith(".nodata") else member_bytes(tar, first)
            second = next(members, None)
            if second is None:
                raise AudioError("the file ends after the data of an item, without its manifest")
            of = first.name.rpartition(".")[0]
            if data is None or second.name.endswith(".nometa"):
                yield of, None
            else:
                yield of, (_parse(member_bytes(tar, second)), data, Path(first.name))


def _parse(data: bytes) -> Any:
    """Parse a manifest in a tar file; return None if it is malformed, so that other cuts can still be read."""
    try:
        return json.loads(data)
    except NOT_A_LINE:
        return None


def _item(manifest: Any, allow_url: bool) -> CutItem:
    from lhotse.cut.set import deserialize_cut

    if not isinstance(manifest, dict) or manifest.get("type") not in CUT_TYPES:
        raise ValueError("the line is not an object of the type MonoCut, MultiCut or MixedCut")
    name = str(manifest["id"])
    try:
        check_cut(manifest, allow_url)
    except AudioError as error:
        return CutItem(name, problem=str(error))
    try:
        if manifest["type"] == "PaddingCut":
            return CutItem(name, problem="the cut is a PaddingCut, which contains no audio.")
        return CutItem(name, deserialize_cut(manifest))
    except Exception as error:  # Lhotse classes may raise anything
        return CutItem(name, problem=f"not a Lhotse cut: {explain(error)}")


def _cut_of(recording: Any, supervisions: Mapping[str, Sequence[bytes]]) -> dict[str, Any]:
    """Return the manifest of a cut that consists of an entire recording and its supervisions."""
    channels = recording.get("channel_ids")
    if channels is None:
        channels = sorted(channel for source in recording["sources"] for channel in source["channels"])
    return {
        "id": str(recording["id"]),
        "start": 0.0,
        "duration": recording["duration"],
        "channel": channels[0] if len(channels) == 1 else channels,
        "supervisions": [json.loads(line) for line in supervisions.get(str(recording["id"]), ())],
        "recording": recording,
        "type": "MonoCut" if len(channels) == 1 else "MultiCut",
    }
