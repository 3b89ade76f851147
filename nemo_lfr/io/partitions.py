"""Columns that the names of folders stand for, such as `lang=de/part-0.parquet`.

Spark, Hive, pandas and polars store the columns by which a table is partitioned only in such names.
"""

from pathlib import Path
from urllib.parse import unquote

MISSING = "__HIVE_DEFAULT_PARTITION__"  # value of rows without a value


def partition_of(file: Path, root: Path) -> dict[str, str]:
    """Return the columns that the folders of a file stand for, as text.

    They are the folders between a table's folder and the file, and the folders directly above them, so that a
    partition that is read by itself keeps its columns.

    Args:
        file: the file.
        root: folder of the table, or the file itself.
    """
    absolute = file.absolute()
    inside = len(file.relative_to(root).parts) - 1 if file != root else 0
    parts = absolute.parts[:-1]
    found: dict[str, str] = {}
    for number, part in enumerate(reversed(parts)):
        key, sign, value = part.partition("=")
        if key and sign:
            value = unquote(value)
            found.setdefault(unquote(key), "" if value == MISSING else value)
        elif number >= inside:
            break
    return {key: value for key, value in found.items() if value}
