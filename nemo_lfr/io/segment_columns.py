"""Refuse lists in which columns such as "start" and "end" select segments of files.

The values may be in seconds, milliseconds or samples, or refer to a longer recording, so they cannot be used. If
several rows with a start have the same file, reading the whole file for each row would pair audio with wrong texts.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from nemo_lfr.errors import ConfigError, shorten
from nemo_lfr.io.text import is_missing

logger = logging.getLogger(__name__)

_START = re.compile(
    r"((segment|seg|utterance|utt|clip|audio|timestamp)[_ ]?)?(start|begin|onset)"
    r"([_ ]?(time|timestamp|at|s|secs?|seconds|ms|milliseconds|samples?|frames?)){0,2}|offset(_ms|_samples?)?",
    re.IGNORECASE,
)
ADVICE = (
    "to select parts, use the columns (or keys) audio_filepath for the path, offset for the start and duration for "
    "the length, in seconds"
)


class SegmentsNotReadError(ConfigError):
    """Error for a list whose rows select segments of files, but not with the keys `offset` and `duration`."""


def start_column(columns: Iterable[str]) -> str | None:
    """Return the first column that may contain the start of a segment; None if there is none.

    Args:
        columns: names of the columns. A caller that reads the column `offset` leaves out this name.
    """
    return next((name for name in columns if isinstance(name, str) and _START.fullmatch(name)), None)


class SegmentCheck:
    """Check that rows do not select segments of files. Call `add` for each row, and `finish` after the last one."""

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._first = ""  # the warning about the first row that has a start

    def add(self, place: str, file: str, values: Mapping[str, Any]) -> None:
        """Check a row whose audio file is read as a whole.

        Args:
            place: location of the row, for messages.
            file: path of the audio file.
            values: dict from the name of each column to its value in the row; a value may be missing or empty.

        Raises:
            SegmentsNotReadError: if the row has a column like `start`, and an earlier row with such a column has the
                same file.
        """
        column = start_column(key for key, value in values.items() if not is_missing(value) and value != "")
        if column is None:
            return
        if file in self._files:
            raise SegmentsNotReadError(
                f"{place}: {shorten(file)!r} is listed again, but {shorten(column)!r} does not select a part of the "
                f"file; {ADVICE}. If each entry is a whole file, rename {shorten(column)!r}."
            )
        self._files.add(file)
        self._first = self._first or f"{place}: {shorten(repr(column))} does not select a part of the file; {ADVICE}."

    def finish(self) -> None:
        """Log a warning about the first row with a column like `start`, if there was one."""
        if self._first:
            logger.warning("%s", self._first)
