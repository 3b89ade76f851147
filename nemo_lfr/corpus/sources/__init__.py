"""Readers for the corpora that `tokenize` accepts, with one module for each kind of corpus.

To add a kind of corpus, define a subclass of `CorpusReader`. Then register the class in one of three ways: with
`register_source`, in the list `SOURCES`, or as an entry point of a package in the group `nemo_lfr.sources`.
"""

import logging
from pathlib import Path

from nemo_lfr.corpus.sources.base import CorpusReader, OpenOptions
from nemo_lfr.corpus.sources.cuts import Cuts
from nemo_lfr.corpus.sources.folder import Folder
from nemo_lfr.corpus.sources.manifest import Manifest
from nemo_lfr.corpus.sources.parquet import Parquet
from nemo_lfr.corpus.sources.saved_dataset import SavedDataset
from nemo_lfr.corpus.sources.shar import Shar
from nemo_lfr.corpus.sources.text_table import TextTable
from nemo_lfr.errors import ConfigError, NemoLfrError
from nemo_lfr.io.regular import open_regular
from nemo_lfr.plugins import load_plugin, naming_extension, plugin_names

logger = logging.getLogger(__name__)

__all__ = ["READER", "SOURCES", "find_source", "open_corpus", "register_source"]

ENTRY_POINTS = "nemo_lfr.sources"
READER = "corpus reader"  # noun for messages about the errors of other packages' readers
# A corpus is read by the first class that accepts its path. `Manifest` accepts any file, and `Folder` any folder.
SOURCES: list[type[CorpusReader]] = [Cuts, Shar, SavedDataset, Parquet, TextTable, Manifest, Folder]


def register_source(source: type[CorpusReader]) -> type[CorpusReader]:
    """Register a corpus reader. It takes precedence over all readers that were registered before.

    This function can be used as a class decorator. Define the class in a module that worker processes can import.
    """
    if source not in SOURCES:
        SOURCES.insert(0, source)
    return source


def find_source(path: Path) -> type[CorpusReader]:
    """Return the class of the reader for a file or folder.

    Raises:
        NemoLfrError: if the path does not exist or is neither a file nor a folder, or if the corpus reader of an
            installed package cannot be imported.
    """
    if not path.exists():
        raise NemoLfrError(f"{path}: no such file or folder.")
    if not path.is_dir() and not path.is_file():
        open_regular(path, ConfigError).close()  # raises an error that says what kind of file the path is
    for name in plugin_names(ENTRY_POINTS):
        register_source(load_plugin(ENTRY_POINTS, name))
    return next(source for source in SOURCES if _accepts(source, path))


def open_corpus(
    path: Path, audio_dir: Path | None, listing: Path, relist: bool = True, allow_url: bool = False
) -> CorpusReader:
    """Open a corpus with the reader that accepts its path.

    Args:
        path: file or folder.
        audio_dir: folder that relative paths in a manifest or table start from; None for the folder of the manifest
            or table.
        listing: path of the list of clips, a file that the readers of audio folders and of text tables write.
        relist: whether to write `listing`; otherwise, an existing list is read.
        allow_url: whether to download audio from http(s) URLs in Lhotse manifests.

    Raises:
        NemoLfrError: if the corpus cannot be read.
    """
    source = find_source(path)
    if relist and audio_dir is not None and "--audio-dir" not in source.base_advice:
        advice = source.base_advice.format(audio_dir)
        logger.warning("%s: --audio-dir is not used for this kind of corpus; %s instead.", path, advice)
    with naming_extension(source, READER):
        return source.open(path, OpenOptions(audio_dir, listing, relist, allow_url))


def _accepts(source: type[CorpusReader], path: Path) -> bool:
    with naming_extension(source, READER):
        return source.accepts(path)
