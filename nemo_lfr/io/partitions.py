"""Read columns from the names of folders, such as the column `lang` from `lang=de/part-0.parquet`.

If a table is partitioned by a column, Spark, Hive and pandas store the values of the column only in folder names.
"""

from pathlib import Path
from urllib.parse import unquote

MISSING = "__HIVE_DEFAULT_PARTITION__"  # stands for a missing value in a folder name


def partition_of(file: Path, root: Path) -> dict[str, str]:
    """Return the columns that are stored in the names of a file's folders, with their values as text.

    Columns come from folders named `COLUMN=VALUE`. The search starts at the file's folder and goes up. Below `root`,
    folders with other names are skipped. At `root` and above, the first folder with another name ends the search. If
    `root` is `corpus/lang=de`, its files have the column `lang`. Missing and empty values are left out.

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
