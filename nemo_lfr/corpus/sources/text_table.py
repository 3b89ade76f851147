"""CSV and TSV tables, and AudioFolder's `metadata.jsonl`."""

import json
from pathlib import Path

from nemo_lfr.corpus.sources.base import OpenOptions
from nemo_lfr.corpus.sources.folder import Folder
from nemo_lfr.errors import ConfigError
from nemo_lfr.io.journal import write_text
from nemo_lfr.io.tables import is_table, read_table


class TextTable(Folder):
    """A table that names audio files, listed in a manifest that this package writes."""

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Return whether the path is a table."""
        return is_table(path)

    @classmethod
    def open(cls, path: Path, options: OpenOptions) -> "TextTable":
        """Open the stored list of the table, or read the table again.

        Raises:
            ConfigError: if the table cannot be read or has no rows.
        """
        audio_dir = options.audio_dir or path.parent
        if options.relist:
            lines = []
            for row in read_table(path):
                entry = row.values or {"audio_filepath": f"{path.name}, line {row.line}", "problem": row.problem}
                lines.append(json.dumps(entry, ensure_ascii=False))
            if not lines:
                raise ConfigError(f"{path}: a table without rows.")
            write_text(options.listing, "\n".join(lines) + "\n")
        return cls(options.listing, audio_dir)
