"""Entropy model (`.lfrm` file): a small network with integer weights that predicts the tokens of the next frame.

The network predicts FSQ values, called digits in the code. The FSQ value of a token in an FSQ dimension is the index
of its level in this dimension. `docs/concepts/lfr-compressed.md` specifies the file and the arithmetic.

All values are integers, but are computed in float32. This is exact in any order of summation, because a model whose
sums of absolute values could reach 2^24 is rejected.
"""

import hashlib
import json
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from nemo_lfr._version import __version__
from nemo_lfr.errors import EntropyModelError, shorten
from nemo_lfr.io.locate import expand_home
from nemo_lfr.io.regular import open_regular

MAGIC, VERSION = b"LFRM", 1
SUFFIX = ".lfrm"
MAX_METADATA_BYTES = 65536
MAX_FILE_BYTES = 1 << 26
HASH_DIGITS = 16
HASH = re.compile(f"[0-9a-f]{{{HASH_DIGITS}}}")

INPUT_MAX = 127  # maximum absolute value of a feature
HIDDEN_MAX = 255  # maximum value of a hidden unit
EXACT_LIMIT = 1 << 24  # integers up to this limit are exact in float32
AVERAGE_BITS = 8  # fractional bits of a running average

MAX_LEVELS, MAX_DIGITS, MAX_PAST, MAX_AVERAGES, MAX_HIDDEN, MAX_SHIFT = 64, 512, 16, 4, 1024, 20


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of an entropy model, and the fingerprint of the codec whose tokens it was fitted to.

    Attributes:
        levels: number of levels in each FSQ dimension of a codebook, from 2 to 64.
        num_codebooks: number of codebooks C; a frame has `C * len(levels)` FSQ values.
        past: number of past frames whose FSQ values are features.
        averages: time constants of running averages of the FSQ values; k means 2^k frames.
        spreads: time constants of running averages of each FSQ value's distance from the middle level of its
            dimension; k means 2^k frames.
        hidden: number of units in the first and the second hidden layer.
        shifts: right shifts after the first layer, the second layer and the output layer, in bits.
        fingerprint: fingerprint of the codec whose tokens were fitted.
        written_by: name and version of the program that wrote the model; informational.
    """

    levels: tuple[int, ...]
    num_codebooks: int
    past: int
    averages: tuple[int, ...]
    spreads: tuple[int, ...]
    hidden: tuple[int, int]
    shifts: tuple[int, int, int]
    fingerprint: str = ""
    written_by: str = f"nemo_lfr {__version__}"

    @property
    def digit_levels(self) -> tuple[int, ...]:
        """Return the number of levels in each FSQ dimension of a frame, codebook by codebook."""
        return self.levels * self.num_codebooks

    @property
    def num_digits(self) -> int:
        """Return the number D of FSQ dimensions in a frame."""
        return len(self.levels) * self.num_codebooks

    @property
    def num_features(self) -> int:
        """Return the number of features F."""
        return self.past * (self.num_digits + 1) + len(self.averages + self.spreads) * self.num_digits

    @classmethod
    def from_json(cls, text: bytes) -> "ModelSpec":
        """Parse untrusted metadata.

        Raises:
            ValueError: if a value is invalid.
            TypeError: if a value has a wrong type, or if a number is missing.
            KeyError: if a list is missing.
        """
        values = json.loads(text)
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        for name in ("levels", "averages", "spreads", "hidden", "shifts"):
            known[name] = tuple(known[name])
        spec = cls(**known)
        spec.check()
        return spec

    def check(self) -> None:
        """Raise ValueError if a value is out of range."""
        for name, low, high, at_least, at_most in (
            ("levels", 2, MAX_LEVELS, 1, 16),
            ("averages", 1, 8, 0, MAX_AVERAGES),
            ("spreads", 1, 8, 0, MAX_AVERAGES),
            ("hidden", 1, MAX_HIDDEN, 2, 2),
            ("shifts", 0, MAX_SHIFT, 3, 3),
        ):
            values = getattr(self, name)
            if not at_least <= len(values) <= at_most or not all(
                type(value) is int and low <= value <= high for value in values
            ):
                count = at_least if at_least == at_most else f"{at_least} to {at_most}"
                raise ValueError(
                    f'"{name}" is {shorten(repr(values))}; expected a list of {count} whole numbers from {low} to '
                    f"{high}"
                )
        for name, low, high in (("num_codebooks", 1, 256), ("past", 1, MAX_PAST)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} is {shorten(repr(value))}; expected a whole number from {low} to {high}")
        if self.num_digits > MAX_DIGITS:
            raise ValueError(f"a frame has {self.num_digits} FSQ dimensions; the limit is {MAX_DIGITS}")
        for name in ("fingerprint", "written_by"):
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
                raise ValueError(
                    f"{name} is {shorten(repr(value))}; expected a string of at most 200 printable characters"
                )

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Yield the name, dtype and shape of each tensor, in their order in the file."""
        first, second = self.hidden
        rows = sum(self.digit_levels)
        yield "input_weight", "<i1", (first, self.num_features)
        yield "input_bias", "<i4", (first,)
        yield "hidden_weight", "<i1", (second, first + self.num_features)
        yield "hidden_bias", "<i4", (second,)
        yield "digit_weight", "<i2", (rows, second)
        yield "output_weight", "<i1", (rows, second)
        yield "output_bias", "<i4", (rows,)


@dataclass(frozen=True, eq=False)
class EntropyModel:
    """Entropy model with integer weights; `docs/concepts/lfr-compressed.md` describes each tensor.

    Args:
        spec: sizes of the model.
        weights: dict from the name of each tensor to its values. `ModelSpec.tensors` lists the names.

    Raises:
        ValueError: if `spec` is invalid, if a tensor does not have the shape and dtype that `spec` requires, or if the
            sums in a layer could reach 2^24.
        KeyError: if a tensor is missing.
    """

    spec: ModelSpec
    weights: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        self.spec.check()
        for name, dtype, shape in self.spec.tensors():
            tensor = self.weights[name]
            if tensor.shape != shape or tensor.dtype != np.dtype(dtype):
                raise ValueError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {np.dtype(dtype)} {list(shape)}"
                )
        self._prove_exact()

    def _prove_exact(self) -> None:
        """Raise ValueError unless every partial sum of every layer stays below 2^24.

        The bound holds for any order of summation.
        """
        size = {name: np.abs(tensor.astype(np.int64)) for name, tensor in self.weights.items()}
        first = self.spec.hidden[0]
        digits = [part.max(axis=0) for part in np.split(size["digit_weight"], self.offsets[1:-1])]
        bounds = {
            "first": size["input_weight"].sum(axis=1) * INPUT_MAX + size["input_bias"],
            "second": size["hidden_weight"][:, :first].sum(axis=1) * HIDDEN_MAX
            + size["hidden_weight"][:, first:].sum(axis=1) * INPUT_MAX
            + size["hidden_bias"]
            + np.sum(digits, axis=0),
            "output": size["output_weight"].sum(axis=1) * HIDDEN_MAX + size["output_bias"],
        }
        for layer, bound in bounds.items():
            if bound.max() >= EXACT_LIMIT:
                raise ValueError(
                    f"sums of the {layer} layer may reach {bound.max()}, which is too large for exact float32 sums"
                )

    @cached_property
    def offsets(self) -> list[int]:
        """Return the index of each FSQ dimension's first row in `digit_weight`, and then the number of rows.

        `digit_weight` has one row for each level: first the levels of the frame's dimension 0, then those of dimension
        1, and so on. The rows of `output_weight` and `output_bias` are in the same order.
        """
        return [0, *np.cumsum(self.spec.digit_levels).tolist()]

    def to_bytes(self) -> bytes:
        """Return the content of the `.lfrm` file; equal models give equal bytes."""
        text = json.dumps(asdict(self.spec), separators=(",", ":")).encode()
        head = MAGIC + struct.pack("<I", len(text) << 8 | VERSION) + text
        data = head + b"".join(self.weights[name].astype(dtype).tobytes() for name, dtype, _ in self.spec.tensors())
        return data + struct.pack("<I", zlib.crc32(data))

    @cached_property
    def hash(self) -> str:
        """Return the id of this model in token files: the first 16 hex digits of the `.lfrm` file's SHA-256 hash."""
        return model_hash(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes, name: str | os.PathLike[str]) -> "EntropyModel":
        """Parse the bytes of a `.lfrm` file.

        Args:
            data: content of the file.
            name: name of the file, for messages.

        Raises:
            EntropyModelError: if the file is damaged or is not an entropy model.
        """

        def fail(reason: str) -> EntropyModelError:
            """Return an error that names the file and the reason."""
            return EntropyModelError(f"{name}: {reason}; the file is damaged or truncated.")

        if data[:4] != MAGIC:
            raise EntropyModelError(f"{name}: not an entropy model ({SUFFIX}).")
        if len(data) < 8:
            raise fail("the data ends too early")
        if data[4] != VERSION:
            raise EntropyModelError(
                f"{name}: the entropy model has format version {data[4]}, but this nemo_lfr reads version {VERSION}; "
                "install a newer nemo_lfr."
            )
        length = int.from_bytes(data[5:8], "little")
        if length > MAX_METADATA_BYTES:
            raise fail(f"its metadata length is {length} bytes; the limit is {MAX_METADATA_BYTES}")
        if len(data) < 12 + length:
            raise fail("the data ends too early")
        if struct.pack("<I", zlib.crc32(data[:-4])) != data[-4:]:
            raise fail("its checksum is wrong")
        try:
            spec = ModelSpec.from_json(data[8 : 8 + length])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise EntropyModelError(f"{name}: its metadata is invalid ({shorten(error, 200)}).") from error
        sizes = {tensor: np.dtype(dtype).itemsize * math.prod(shape) for tensor, dtype, shape in spec.tensors()}
        if len(data) != 8 + length + sum(sizes.values()) + 4:
            raise fail(f"its size ({len(data)} bytes) does not match its metadata")
        weights: dict[str, np.ndarray] = {}
        position = 8 + length
        for tensor, dtype, shape in spec.tensors():
            part = data[position : position + sizes[tensor]]
            weights[tensor] = np.frombuffer(part, dtype).reshape(shape)
            position += sizes[tensor]
        try:
            return cls(spec, weights)
        except ValueError as error:
            raise EntropyModelError(f"{name}: {shorten(error, 200)}.") from error

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "EntropyModel":
        """Read a `.lfrm` file.

        Raises:
            EntropyModelError: if the file cannot be read or is damaged.
        """
        path = Path(expand_home(path))
        try:
            with open_regular(path, EntropyModelError) as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise EntropyModelError(f"{path}: {error.strerror or error}.") from error
        if len(data) > MAX_FILE_BYTES:
            raise EntropyModelError(
                f"{path}: the file is larger than {MAX_FILE_BYTES} bytes, the limit for an entropy model."
            )
        return cls.from_bytes(data, path)

    @cached_property
    def layers(self) -> "Layers":
        """Return the tensors in float32, in the layout for inference."""
        return Layers(self)


class Layers:
    """Weights of a model in float32, laid out for matrix multiplication.

    The last row of `first`, of `second` and of each matrix in `outputs` is the bias. Its input is always 1.

    Attributes:
        first: weights of the first layer [F + 1, H1].
        second: weights of the second layer [H1 + F + 1, H2].
        digits: for each FSQ dimension of a frame, one vector for each level, [levels, H2]. Once the FSQ value of a
            dimension is known, its vector is added to the sums of the second layer.
        outputs: for each FSQ dimension, the weights of the output layer [H2 + 1, levels].
        scales: 2^-shift for each of the three layers; multiplication by a power of two is exact.
    """

    def __init__(self, model: EntropyModel) -> None:
        weights = {name: tensor.astype(np.float32) for name, tensor in model.weights.items()}
        self.first = _with_bias(weights["input_weight"], weights["input_bias"])
        self.second = _with_bias(weights["hidden_weight"], weights["hidden_bias"])
        rows = [slice(*pair) for pair in zip(model.offsets, model.offsets[1:], strict=False)]
        self.digits = [np.ascontiguousarray(weights["digit_weight"][row]) for row in rows]
        self.outputs = [_with_bias(weights["output_weight"][row], weights["output_bias"][row]) for row in rows]
        self.scales = tuple(np.float32(2.0**-shift) for shift in model.spec.shifts)


def _with_bias(weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.vstack([weight.T, bias]))


def model_hash(data: bytes) -> str:
    """Return the hash that identifies a model: 16 hex digits of the SHA-256 of its file."""
    return hashlib.sha256(data).hexdigest()[:HASH_DIGITS]


def write_model(model: EntropyModel, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write a `.lfrm` file atomically.

    Args:
        model: model to write.
        path: output file.
        overwrite: whether to replace an existing file.

    Raises:
        OutputExistsError: if the file exists and `overwrite` is not set.
        OSError: if the file cannot be written.
    """
    from nemo_lfr.io.atomic import check_overwrite, write_bytes

    path = expand_home(path)
    check_overwrite(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, model.to_bytes(), overwrite)
