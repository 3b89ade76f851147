"""Check that an ONNX file contains nothing except what the export writes.

ONNX can express more than a codec needs: weights in other files, loops, functions, operators of other libraries, and
tensors of any size. Files that contain any of these are refused before ONNX Runtime opens them. Otherwise, ONNX
Runtime might read other files in the working directory, or run a loop without end.

The reader below parses ONNX's protobuf messages itself, because the `onnx` package may not be installed. It refuses
all fields that the export does not write, skips weights without copying them, and gives up after `MAX_FIELDS` fields.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from nemo_lfr.errors import CheckpointError, quoted

MAX_FIELDS = 1 << 18  # a codec of the released size has about 15,000
MAX_INTEGER = 1 << 24  # the largest codebook; sizes and strides are far smaller

# The operators in the exports of all kinds of codecs, and those that other versions of torch's exporter may write in
# their place. None of them runs another graph. Only Range and Pad can create a tensor of any size.
OPERATORS = {
    "Add", "And", "Cast", "CastLike", "Clip", "Concat", "Constant", "Conv", "ConvTranspose", "Div", "Elu", "Equal",
    "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Less",
    "LessOrEqual", "Max", "Min", "Mod", "Mul", "Not", "Pad", "Pow", "Range", "Reciprocal", "ReduceMin", "ReduceSum",
    "Reshape", "Round", "Shape", "Sin", "Slice", "Split", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze",
    "Where",
}  # fmt: skip
_ITEM_BYTES = {1: 4, 6: 4, 7: 8, 9: 1}  # by the number of the type in ONNX: float32, int32, int64, bool
_INTEGERS: dict[int, np.dtype[Any]] = {6: np.dtype("<i4"), 7: np.dtype("<i8")}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protobuf


class _Field(NamedTuple):
    """Field of a message.

    A varint is decoded to `value`. The content of any other field is at [start, end) in the file.
    """

    number: int
    wire: int
    value: int
    start: int
    end: int


_Check = Callable[["_Reader", _Field], None]


def check_graph(data: bytes) -> None:
    """Check that an ONNX file contains only what `nemo-lfr export onnx` writes.

    Args:
        data: content of the file.

    Raises:
        CheckpointError: if the file contains anything else. The message has no subject, so the caller puts one, such
            as "the file", before it.
    """
    if data[4:8] == b"ORTM":  # ONNX Runtime would read it in its own format, whatever else the bytes mean
        raise CheckpointError("is in the format of ONNX Runtime, not in ONNX format")
    reader = _Reader(data)
    reader.message(_MODEL, "ModelProto", 0, len(data))


class _Reader:
    """Reader of protobuf messages that counts their fields."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._count = 0

    def message(self, checks: dict[int, _Check], name: str, start: int, end: int) -> None:
        """Check the fields of the message at [start, end).

        Args:
            checks: function that checks a field, for each allowed field number.
            name: type of the message, such as "ModelProto".
            start: start of the message in the file.
            end: end of the message in the file.

        Raises:
            CheckpointError: if the number of a field is not in `checks`, or the function for this number refuses it.
        """
        for field in self.fields(start, end):
            check = checks.get(field.number)
            if check is None:
                what = _NAMES.get((name, field.number), f"the field {field.number} of {name}")
                raise _unwritten(what)
            check(self, field)

    def fields(self, start: int, end: int) -> Iterator[_Field]:
        """Yield the fields of the message at [start, end)."""
        while start < end:
            self._step()
            key, start = self._varint(start, end)
            number, wire = key >> 3, key & 7
            value = 0
            if wire == _VARINT:
                value, after = self._varint(start, end)
            elif wire == _BYTES:
                length, start = self._varint(start, end)
                after = start + length
            elif wire in (_FIXED32, _FIXED64):
                after = start + (8 if wire == _FIXED64 else 4)
            else:
                raise _invalid()
            if not 0 < number < 1 << 29 or after > end:
                raise _invalid()
            yield _Field(number, wire, value, start, after)
            start = after

    def integers(self, field: _Field) -> Iterator[int]:
        """Yield the integers of a repeated field, which may be packed into one value."""
        if field.wire == _VARINT:
            yield _signed(field.value)
            return
        if field.wire != _BYTES:
            raise _invalid()
        start = field.start
        while start < field.end:
            self._step()
            value, start = self._varint(start, field.end)
            yield _signed(value)

    def text(self, field: _Field) -> str:
        """Return the first 100 bytes of a field as text."""
        if field.wire != _BYTES:
            raise _invalid()
        return self.data[field.start : min(field.end, field.start + 100)].decode("utf-8", "replace")

    def _step(self) -> None:
        self._count += 1
        if self._count > MAX_FIELDS:
            raise CheckpointError(f"has more than {MAX_FIELDS} fields, the limit")

    def _varint(self, start: int, end: int) -> tuple[int, int]:
        """Return the number at `start`, and where the next value starts."""
        value = 0
        for shift, position in enumerate(range(start, min(end, start + 10))):
            byte = self.data[position]
            value |= (byte & 127) << 7 * shift
            if byte < 128:
                return value & (1 << 64) - 1, position + 1
        raise _invalid()


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _invalid() -> CheckpointError:
    return CheckpointError("is not a valid ONNX file")


def _unwritten(what: str) -> CheckpointError:
    return CheckpointError(f"contains {what}, which nemo_lfr does not accept in ONNX files")


def _any(_: _Reader, __: _Field) -> None:
    """Accept any content: this field cannot do harm, or another function checks it."""


def _inside(checks: dict[int, _Check], name: str) -> _Check:
    """Return a function that checks a field whose content is a message; `checks` apply to this message's fields."""

    def check(reader: _Reader, field: _Field) -> None:
        if field.wire != _BYTES:
            raise _invalid()
        reader.message(checks, name, field.start, field.end)

    return check


def _domain(reader: _Reader, field: _Field) -> None:
    domain = reader.text(field)
    if domain:
        raise _unwritten(f"the operator domain {quoted(domain)}")


def _operator(reader: _Reader, field: _Field) -> None:
    operator = reader.text(field)
    if operator not in OPERATORS:
        raise _unwritten(f"the operator {quoted(operator)}")


def _small(reader: _Reader, field: _Field) -> None:
    for value in reader.integers(field):
        _check_size(value)


def _check_size(value: int) -> None:
    if abs(value) > MAX_INTEGER:
        raise _unwritten(f"the integer {value}")


def _embedded(reader: _Reader, field: _Field) -> None:
    # 0 means "in this file", and 1 "in another file". Other numbers are refused too, because readers disagree about
    # numbers of more than 32 bits.
    if field.wire != _VARINT or field.value != 0:
        raise _unwritten(_NAMES["TensorProto", 14])


def _tensor(reader: _Reader, field: _Field) -> None:
    """Check that the values of a tensor are in the file, match its shape, and are not huge integers."""
    _inside(_TENSOR, "TensorProto")(reader, field)
    dims: list[int] = []
    kinds, values = [], []
    for part in reader.fields(field.start, field.end):
        if part.number == 1:
            dims += reader.integers(part)
        elif part.number == 2:
            kinds.append(part.value if part.wire == _VARINT else 0)
        elif part.number == 9:
            values.append(part)
    if len(kinds) != 1 or kinds[0] not in _ITEM_BYTES:
        raise _unwritten(f"a tensor of the type {quoted(kinds[0] if len(kinds) == 1 else kinds)}")
    kind = kinds[0]
    size = sum(part.end - part.start for part in values)
    if len(values) > 1 or len(dims) > 8 or min(dims, default=0) < 0 or math.prod(dims) * _ITEM_BYTES[kind] != size:
        raise CheckpointError("contains a tensor whose values do not match its shape")
    if kind in _INTEGERS and size:
        integers = np.frombuffer(reader.data, _INTEGERS[kind], math.prod(dims), values[0].start)
        _check_size(int(integers.min()))
        _check_size(int(integers.max()))


# Fields that the export writes, by their numbers. Fields for comments (`doc_string`) are accepted too.
_TENSOR: dict[int, _Check] = {
    1: _any,  # dims
    2: _any,  # data_type
    8: _any,  # name
    9: _any,  # raw_data
    12: _any,  # doc_string
    14: _embedded,  # data_location
    16: _any,  # metadata_props
}
_ATTRIBUTE: dict[int, _Check] = {
    1: _any,  # name
    2: _any,  # f
    3: _small,  # i
    4: _any,  # s
    5: _tensor,  # t
    7: _any,  # floats
    8: _small,  # ints
    13: _any,  # doc_string
    20: _any,  # type
}
_NODE: dict[int, _Check] = {
    1: _any,  # input
    2: _any,  # output
    3: _any,  # name
    4: _operator,
    5: _inside(_ATTRIBUTE, "AttributeProto"),
    6: _any,  # doc_string
    7: _domain,
    9: _any,  # metadata_props
}
_GRAPH: dict[int, _Check] = {
    1: _inside(_NODE, "NodeProto"),
    2: _any,  # name
    5: _tensor,  # initializer
    10: _any,  # doc_string
    11: _any,  # input
    12: _any,  # output
    13: _any,  # value_info
    16: _any,  # metadata_props
}
_OPSET: dict[int, _Check] = {1: _domain, 2: _any}
_MODEL: dict[int, _Check] = {
    1: _any,  # ir_version
    2: _any,  # producer_name
    3: _any,  # producer_version
    4: _any,  # domain, of the model
    5: _any,  # model_version
    6: _any,  # doc_string
    7: _inside(_GRAPH, "GraphProto"),
    8: _inside(_OPSET, "OperatorSetIdProto"),
    14: _any,  # metadata_props
}
_NAMES = {
    ("ModelProto", 20): "training graphs",
    ("ModelProto", 25): "functions",
    ("GraphProto", 15): "sparse weights",
    ("AttributeProto", 6): "a graph inside an operator",
    ("AttributeProto", 11): "graphs inside an operator",
    ("TensorProto", 13): "weights in another file",
    ("TensorProto", 14): "weights in another file",
}
