"""Reader for a JSON-lines file of Lhotse cuts or recordings, and conversion of cuts to clips."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nemo_lfr.corpus.ids import UniqueIds, clean_id, numbered_id
from nemo_lfr.corpus.inventory import digest, list_digest
from nemo_lfr.corpus.records import METADATA, STATE
from nemo_lfr.corpus.sources.base import Clip, CorpusReader, OpenOptions, ShardSpec, repeat_number, unreadable
from nemo_lfr.errors import ConfigError, counted, shorten
from nemo_lfr.io.columns import LABEL_COLUMNS, OTHER_TOKENS, label_text, standard_labels
from nemo_lfr.io.cut_audio import read_cut, sources_of
from nemo_lfr.io.cut_files import CutFile, CutItem, explain, has_relative_paths, kind_of
from nemo_lfr.io.shortage import require
from nemo_lfr.io.supervisions import check_supervisions, refuse_list, supervisions_beside
from nemo_lfr.io.text import is_missing

logger = logging.getLogger(__name__)


class Cuts(CorpusReader):
    """Reader for a `.jsonl` or `.jsonl.gz` file of Lhotse cuts or recordings.

    Each cut or recording becomes one clip. Relative paths refer to the working directory, as in Lhotse.

    Args:
        path: the file.
        allow_url: whether to download audio that is at an http(s) URL.
    """

    base_advice = "run the command in {}"

    def __init__(self, path: Path, allow_url: bool = False) -> None:
        require("lhotse")
        self.path, self.allow_url = path, allow_url
        self._file = CutFile(path, allow_url)

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Return whether the path may be a JSON-lines file of Lhotse.

        Of a compressed file, only the name is checked; of any other file, the name and the content.
        """
        if not path.is_file() or not path.name.endswith((".jsonl", ".jsonl.gz", ".json.gz")):
            return False
        return path.suffix == ".gz" or kind_of(path) is not None

    @classmethod
    def open(cls, path: Path, options: OpenOptions) -> "Cuts":
        """Open the file."""
        kind = kind_of(path)
        if kind is None:
            refuse_list(path)
            raise ConfigError(
                f"{path}: no Lhotse cuts or recordings in this file; if it is a NeMo manifest, decompress it."
            )
        if kind not in ("cuts", "recordings"):
            raise ConfigError(
                f"{path}: the file contains Lhotse {kind}, which refer to no audio; pass cuts or recordings."
            )
        if options.relist:
            if kind == "recordings":
                check_supervisions(path)
            refuse_tokens(path, [path])
            cuts = [item.cut for item in CutFile(path, options.allow_url).read(0, 10) if item.cut is not None]
            sources = [source for cut in cuts for source in sources_of(cut.to_dict())]
            if sources and all(source.get("type") == "shar" for source in sources):
                raise ConfigError(
                    f"{path}: the audio of these cuts is in the other files of a Lhotse Shar; pass the folder of the "
                    "Shar instead of this file."
                )
        return cls(path, options.allow_url)

    @property
    def identity(self) -> str:
        """Return a hash of the files in `files`."""
        return list_digest(("", digest(path)) for path in self.files)

    def older_shards(self, identity: str, shards: list[ShardSpec], size: int) -> list[ShardSpec] | None:
        """Return `shards` if an older version computed the hash `identity` for this corpus, else None."""
        return shards if identity == list_digest((path.name, digest(path)) for path in self.files) else None

    @property
    def base(self) -> Path | None:
        """The working directory, which relative paths start from; None if all paths are absolute."""
        return Path.cwd() if has_relative_paths(self.path) else None

    @property
    def files(self) -> list[Path]:
        """Return the path of the cuts or recordings.

        If supervisions accompany the recordings, their path follows; see `supervisions_beside`.
        """
        beside = supervisions_beside(self.path) if kind_of(self.path) == "recordings" else None
        return [self.path] if beside is None else [self.path, beside]

    def shards(self, size: int) -> list[ShardSpec]:
        """Split the cuts into shards of `size` cuts."""
        total, repeats = number_cuts([self.path])[0]
        return [
            {
                "start": start,
                "count": min(size, total - start),
                "repeats": {
                    str(index - start): repeats[index] for index in range(start, start + size) if index in repeats
                },
            }
            for start in range(0, total, size)
        ]

    def read(self, shard: ShardSpec) -> Iterator[Clip]:
        """Yield the clips of a shard in order."""
        start = shard["start"]
        for number, item in enumerate(self._file.read(start, start + shard["count"])):
            yield item_to_clip(item, str(self.path), repeat_number(shard, number), self.allow_url)


def refuse_tokens(path: Path, cuts: Sequence[Path]) -> None:
    """Raise ConfigError if a corpus is an output of `tokenize` in which no cut refers to audio.

    Args:
        path: the file or folder that was passed as the corpus.
        cuts: files of cuts in the corpus.
    """
    parents = [
        folder for folder in (path, *path.parents[:2]) if (folder / METADATA).exists() or (folder / STATE).is_dir()
    ]
    if not parents:
        return
    found = (item.cut for file in cuts for item in CutFile(file).read() if item.cut is not None)
    if not any(cut.has_recording or cut.has_custom("target_audio") for cut in found):
        raise ConfigError(
            f"{path}: this is a part of the tokenized corpus {parents[0]}, which contains no audio; pass the corpus "
            "from which it was made."
        )


def cut_to_clip(cut: Any, origin: str, number: int = 1, allow_url: bool = False) -> Clip:
    """Convert a Lhotse cut to a clip.

    If the cut has the field `target_audio`, the recording in this field is used instead of the audio of the cut, as in
    NeMo's loaders. If the cut has several supervisions, their texts are joined in order of start time. All other
    labels come from the first supervision. Custom fields of the cut take precedence over those of the supervision.

    Args:
        cut: the cut.
        origin: name of the file, for messages.
        number: number that makes the id of the clip unique; see `numbered_id`.
        allow_url: whether to download audio that is at an http(s) URL.
    """
    supervisions = sorted(cut.supervisions, key=lambda supervision: supervision.start)
    labels: dict[str, Any] = {}
    if supervisions:
        texts = [label_text(item.text, "text", "text") for item in supervisions if not is_missing(item.text)]
        first = supervisions[0]
        labels = _plain_labels((first.custom or {}) | {"gender": first.gender})
        labels |= {"text": " ".join(texts) if texts else None, "speaker": first.speaker, "lang": first.language}
    labels |= _plain_labels(getattr(cut, "custom", None) or {})
    labels = standard_labels(labels)
    target = cut.target_audio if cut.has_custom("target_audio") else cut
    context = None
    if cut.has_custom("context_audio"):
        context = partial(read_cut, cut.context_audio, allow_url=allow_url)
    manifest = cut.to_dict()
    # These cuts are written with the tokens, so remove references to audio that is stored inside the input Shar.
    for place in (manifest, manifest.get("custom") or {}):
        for key in [key for key, value in place.items() if key != "supervisions" and _is_data(value)]:
            del place[key]
        for key in OTHER_TOKENS & place.keys():
            del place[key]
    if supervisions and manifest.get("supervisions"):
        manifest["supervisions"] = [_joined(supervisions, labels.get("text"))]
    return Clip(
        numbered_id(clean_id(str(cut.id)), number),
        f"{origin}, cut {cut.id}",
        partial(read_cut, target, allow_url=allow_url),
        context,
        labels,
        manifest if manifest.get("type") in ("MonoCut", "MultiCut") else None,  # other types have no supervisions
    )


def _plain_labels(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that can be labels, without those whose value is None.

    A field can be a label if its name is in `LABEL_COLUMNS`, or if its value is a string, number or boolean.
    """
    labels = {key: value for key, value in fields.items() if key in LABEL_COLUMNS or _is_plain(value)}
    return {key: value for key, value in labels.items() if value is not None}


def _joined(supervisions: Sequence[Any], text: str | None) -> dict[str, Any]:
    """Return the manifest of one supervision with the time span of all `supervisions` and the joined `text`.

    Its other values are those of the first supervision. The supervisions must be sorted by start time.
    """
    joined = {key: value for key, value in supervisions[0].to_dict().items() if not is_missing(value)}
    joined |= {} if text is None else {"text": text}
    if isinstance(joined.get("custom"), dict):
        joined["custom"] = {key: value for key, value in joined["custom"].items() if key not in OTHER_TOKENS}
    if len(supervisions) > 1:
        joined["duration"] = max(item.start + item.duration for item in supervisions) - supervisions[0].start
        joined.pop("alignment", None)  # belongs to the first supervision only
    return joined


def item_to_clip(item: CutItem, origin: str, number: int, allow_url: bool) -> Clip:
    """Convert a cut in a file to a clip.

    Args:
        item: the cut, or the reason why it is invalid.
        origin: path of the file, for messages.
        number: number that makes the id of the clip unique; see `numbered_id`.
        allow_url: whether to download audio that is at an http(s) URL.

    Returns:
        The clip. For an invalid cut, its `audio` function raises AudioError with the reason.
    """
    problem = item.problem
    if problem is None:
        try:
            return cut_to_clip(item.cut, origin, number, allow_url)
        except Exception as error:  # the fields of a cut may contain anything
            problem = f"not a Lhotse cut: {explain(error)}"
    place = f"{origin}, cut {shorten(item.id)}"
    return Clip(numbered_id(clean_id(item.id), number), place, unreadable(f"{place}: {problem}"))


def number_cuts(paths: Sequence[Path]) -> list[tuple[int, dict[int, int]]]:
    """Count the cuts in each file, and find repeated ids.

    Returns:
        For each file, the number of cuts, and a dictionary of the cuts whose id has occurred before. For example,
        {7: 2} means that the cut with index 7 is the second one with its id, see `numbered_id`.

    Raises:
        ConfigError: if a file does not contain Lhotse cuts.
    """
    ids = UniqueIds()
    counts = []
    num_joined = 0
    for path in paths:
        count, repeats = 0, {}
        for item in CutFile(path).read():
            if (number := ids.number(clean_id(item.id))) > 1:
                repeats[count] = number
            count += 1
            num_joined += item.cut is not None and len(item.cut.supervisions) > 1
        counts.append((count, repeats))
    if num_joined:
        text = "%s: several supervisions in %s; their texts are joined, and the first speaker is used."
        logger.warning(text, paths[0], counted(num_joined, "cut"))
    return counts


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _is_data(value: Any) -> bool:
    """Return whether a value is the manifest of a recording or array whose data is in memory or in a Shar."""
    if not isinstance(value, dict):
        return False
    sources = value.get("sources") or [value.get("array") or value]
    manifests = [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    kinds = [str(manifest.get("storage_type") or manifest.get("type")) for manifest in manifests]
    return any(kind == "shar" or kind.startswith("memory") for kind in kinds)
