"""Reject Arrow streams that would expand to an implausible size.

A file of a few bytes can declare compressed buffers, or columns of nulls, that fill the memory when they are read.
"""

import struct
from pathlib import Path
from typing import Any

from nemo_lfr.errors import NemoLfrError, shorten
from nemo_lfr.io.bounded import is_implausible
from nemo_lfr.io.shortage import require

# Slot numbers of fields in Arrow's flatbuffers tables: one line for each of Message, RecordBatch and DictionaryBatch.
HEADER_TYPE, HEADER = 1, 2
LENGTH, BUFFERS, COMPRESSION = 0, 2, 3
DATA = 1
# Values of the field HEADER_TYPE.
DICTIONARY_BATCH, RECORD_BATCH = 2, 3
# Markers for the end of a stream: in the current format, and in the format before Arrow 0.15.
END_MARKS = (b"\xff\xff\xff\xff\x00\x00\x00\x00", b"\x00\x00\x00\x00")


def check_stream(path: Path) -> None:
    """Check that an Arrow stream is complete, and that it does not expand to an implausible size.

    `datasets` and pyarrow do not report a truncated stream if its last batch is complete. Only headers and declared
    sizes are read.

    Args:
        path: file in Arrow's streaming format.

    Raises:
        NemoLfrError: if the file cannot be read or is damaged, or if its batches declare an implausible number of rows
            or bytes.
    """
    arrow = require("pyarrow")
    rows = expanded = 0
    try:
        size = path.stat().st_size
        with arrow.memory_map(str(path)) as file:
            end = 0
            for message in arrow.ipc.MessageReader.open_stream(file):
                end = file.tell()
                batch_rows, batch_bytes = _claims(message)
                rows, expanded = rows + batch_rows, expanded + batch_bytes
            file.seek(end)
            rest = file.read(max(map(len, END_MARKS)) + 1)
    except PermissionError as error:
        raise NemoLfrError(
            f"{path}: the Arrow file cannot be read ({error.strerror}); change its permissions."
        ) from error
    except (OSError, ValueError, EOFError, struct.error, IndexError) as error:
        raise NemoLfrError(f"{path}: the Arrow file is damaged ({shorten(error, 200)}); save it again.") from error
    if is_implausible(rows, expanded, size):
        raise NemoLfrError(
            f"{path}: the file declares {rows} rows and {expanded} decompressed bytes, but has only {size} bytes; the "
            "file is damaged or malicious."
        )
    if rest not in END_MARKS:
        if rest.startswith(END_MARKS):
            raise NemoLfrError(f"{path}: other data follows the end of the rows in this Arrow file; save it again.")
        raise NemoLfrError(f"{path}: the Arrow file is truncated: it has no end marker; copy or save it again.")


def _claims(message: Any) -> tuple[int, int]:
    """Return the declared numbers of rows and decompressed bytes in an Arrow message.

    Both are 0 if the message contains no batch. The size is also 0 if the batch is not compressed.
    """
    data = bytes(message.metadata)
    root = _follow(data, 0)
    kind = _field(data, root, HEADER_TYPE)
    header = _field(data, root, HEADER)
    if kind is None or header is None or data[kind] not in (DICTIONARY_BATCH, RECORD_BATCH):
        return 0, 0
    batch = _follow(data, header)
    if data[kind] == DICTIONARY_BATCH:
        inner = _field(data, batch, DATA)
        batch = batch if inner is None else _follow(data, inner)
    length = _field(data, batch, LENGTH)
    rows = 0 if length is None else int(struct.unpack_from("<q", data, length)[0])
    buffers = _field(data, batch, BUFFERS)
    if _field(data, batch, COMPRESSION) is None or buffers is None:
        return rows, 0
    start = _follow(data, buffers)
    expanded = 0
    for index in range(struct.unpack_from("<I", data, start)[0]):
        offset, stored = struct.unpack_from("<qq", data, start + 4 + 16 * index)
        if stored >= 8:  # a buffer begins with its decompressed size, or with -1 if it is not compressed
            expanded += max(0, struct.unpack_from("<q", message.body, offset)[0])
    return rows, expanded


def _follow(data: bytes, position: int) -> int:
    """Read the 32-bit offset at `position`, and return the position that it points to."""
    return position + int(struct.unpack_from("<I", data, position)[0])


def _field(data: bytes, table: int, slot: int) -> int | None:
    """Return the position of the field in a slot of a flatbuffers table; None if the table omits the field."""
    layout = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * slot >= struct.unpack_from("<H", data, layout)[0]:
        return None
    offset = struct.unpack_from("<H", data, layout + 4 + 2 * slot)[0]
    return table + offset if offset else None
