"""Reader for CSV, TSV and JSON-lines tables, such as the `metadata.jsonl` of an AudioFolder."""

import json
from pathlib import Path
from typing import Any

from nemo_lfr.corpus.sources.base import OpenOptions
from nemo_lfr.corpus.sources.folder import Folder, unusable
from nemo_lfr.corpus.sources.manifest import Manifest, entry_clip
from nemo_lfr.errors import ConfigError
from nemo_lfr.io.journal import write_text
from nemo_lfr.io.manifests import NOT_A_LINE, describe
from nemo_lfr.io.tables import is_table, read_table


class TextTable(Folder):
    """Reader for a table of audio files. The rows are first written to a manifest, and then read from it."""

    base_advice = Manifest.base_advice

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Return whether the path is a table; see `is_table`."""
        return is_table(path)

    @classmethod
    def open(cls, path: Path, options: OpenOptions) -> "TextTable":
        """Write the rows to a manifest and open it. If `options.relist` is False, open the existing manifest.

        Raises:
            ConfigError: if the table cannot be read or has no rows.
        """
        audio_dir = options.audio_dir or path.parent
        if options.relist:
            lines = []
            for row in read_table(path, audio_dir):
                problem = row.problem or _problem(row.values, audio_dir)
                entry = unusable(f"{path.name}, line {row.line}", problem) if problem else row.values
                lines.append(json.dumps(entry, ensure_ascii=False))
            if not lines:
                raise ConfigError(f"{path}: the table has no rows; add a row for each audio file.")
            write_text(options.listing, "\n".join(lines) + "\n")
        return cls(options.listing, audio_dir, path.parent)


def _problem(values: dict[str, Any], audio_dir: Path) -> str | None:
    """Return the reason why a row does not describe a clip; None if it does."""
    try:
        entry_clip("", values, audio_dir)
    except NOT_A_LINE as error:
        return describe(error)
    return None
