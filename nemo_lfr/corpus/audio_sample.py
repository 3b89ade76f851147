"""Hash a sample of a corpus's audio files, to recognize the audio after the corpus was moved.

The list of files does not suffice: the clean and the noisy version of a corpus may have equal lists. Only a sample is
hashed, because it would take long to read all audio files.
"""

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from nemo_lfr.corpus.inventory import sampled_digest
from nemo_lfr.corpus.sources.base import Clip, CorpusReader, ShardSpec
from nemo_lfr.io.cut_audio import sources_of

SHARDS, FILES = 8, 8  # number of shards, evenly spaced, and of files per shard
SEARCHED = 1000  # maximum number of clips to read per shard
WITHOUT_FILE = 16  # maximum number of clips without a file per shard; a table may contain their audio, which is large


def sample_audio(corpus: CorpusReader, shards: list[ShardSpec], base: Path | None) -> dict[str, tuple[Path, str]]:
    """Hash a sample of a corpus's audio files that are in the folder `base`.

    Args:
        corpus: reader of the corpus.
        shards: shards of the corpus.
        base: folder that relative paths start from, as in `corpus.base`. If it is None, the result is empty.

    Returns:
        Dictionary with one entry for each file in the sample. The key is the id of a clip that uses the file, and
        the value is (file, hash). Files that cannot be read are left out.
    """
    found: dict[str, tuple[Path, str]] = {}
    if base is None:
        return found
    hashed: set[Path] = set()
    for shard in shards[:: max(1, -(-len(shards) // SHARDS))]:
        with suppress(Exception):  # an error of the reader is raised again when the shard is tokenized
            found.update(islice(_hashes(corpus, shard, base, hashed), FILES))
    return found


def _hashes(
    corpus: CorpusReader, shard: ShardSpec, base: Path, hashed: set[Path]
) -> Iterator[tuple[str, tuple[Path, str]]]:
    """Yield (clip id, (file, hash)) for the audio files of the first clips of a shard.

    Files outside the folder `base` and files in `hashed` are skipped. Each hashed file is added to `hashed`.
    """
    without_file = 0
    for clip in islice(corpus.read(shard), SEARCHED):
        file = _file_of(clip)
        if file is None:
            without_file += 1
            if without_file == WITHOUT_FILE:
                return
        elif file not in hashed and (not file.is_absolute() or file.is_relative_to(base)) and file.is_file():
            hashed.add(file)  # other clips may be segments of the same file
            with suppress(OSError):
                yield clip.id, (file, sampled_digest(file))


def _file_of(clip: Clip) -> Path | None:
    if clip.path is not None or clip.cut is None:
        return clip.path
    sources = (source["source"] for source in sources_of(clip.cut) if source.get("type") == "file")
    return next(map(Path, sources), None)
