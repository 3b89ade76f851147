"""Print the values of a JSON result as a human-readable table."""

from collections.abc import Mapping
from typing import Any

from nemo_lfr.cli.session import print_line
from nemo_lfr.errors import printable

# Unit for each ending of a key.
UNITS = {"_s": "s", "_hz": "Hz", "_bps": "bit/s", "_bytes": "bytes", "_db": "dB"}
NAMES = {"pesq wb": "PESQ-WB", "estoi": "ESTOI", "si sdr": "SI-SDR", "num codebooks": "codebooks"}


def print_table(values: Mapping[str, Any]) -> None:
    """Print names and values in two columns on stdout, with units; print nothing with --json.

    A value of None is left out.

    Args:
        values: values by their keys in the JSON output. The key "bit_rate_bps", for example, is printed as "bit rate",
            and its value in bit/s.
    """
    rows = dict(_rows(values))
    width = max(map(len, rows))
    for name, text in rows.items():
        print_line(printable(f"{name:<{width}}  {text}"))


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        ending = next((ending for ending in UNITS if key.endswith(ending)), "")
        name = key.removesuffix(ending).replace("_", " ")
        for plain, proper in NAMES.items():
            name = name.replace(plain, proper)
        if isinstance(value, Mapping):
            rows += _rows(value)
        elif value is not None:
            text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            text = {"True": "yes", "False": "no"}.get(text, text)
            rows.append((name, f"{text} {UNITS.get(ending, '')}".rstrip()))
    return rows
