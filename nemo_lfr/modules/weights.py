"""Detect changed weights, and cache objects that are derived from weights, such as packed weights.

PyTorch counts most writes to a tensor, but not writes through `.data`, a numpy view or another process. Therefore the
values are also compared, by a checksum that reads every byte once. On one CPU core this takes 0.15 to 0.25 ms for a
million fp32 weights.

The checksum reads the weights as rows of 509 integers, adds up each column of a block of rows, and combines the sums.
Changes that leave every sum unchanged, such as a swap of two values in one column of a block, are not detected. Other
changes are missed with a probability of about 2^-60.
"""

import operator
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Generic, TypeVar, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

# Number of columns of a checksum. It is prime, so a weight that moves by whole kernels or channels changes its column.
COLUMNS = 509
# Number of rows of a block on a CPU. Longer blocks are not faster, and miss more changes.
ROWS = 128
# Factors for the sums of the columns on a GPU. With odd factors, a change of a single sum always changes the checksum.
_FACTORS = np.random.default_rng(509).integers(0, 2**63, COLUMNS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
# Tensors of up to this many elements are concatenated, because each checksum has a fixed cost. On a GPU, this cost is
# a kernel launch; on a CPU, it is as high as the cost of reading thousands of weights.
SMALL = {"cpu": 1 << 16}
SMALL_ELSEWHERE = 1 << 24
# Attributes of layers that packed weights and other derived objects depend on.
SETTINGS = (
    "stride",
    "dilation",
    "groups",
    "pad",
    "_pad_mode",
    "padding_mode",
    "span",
    "first_sample",
    "negative_slope",
    "alpha",
    "eps",
)
# Integer type for the sums on a GPU, by element size in bytes. Elements of 8 bytes are read as two integers: sums of
# 4-byte integers do not overflow, but in sums of 8-byte integers, two changes of the highest bit would cancel.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}

_SEEN: ContextVar[dict[Any, tuple[int, ...]] | None] = ContextVar("weight_checksums", default=None)
_CHECKED: ContextVar[dict[Hashable, nn.Module] | None] = ContextVar("checked_networks", default=None)


@contextmanager
def checksum_once() -> Iterator[None]:
    """Compute the checksum of each weight only once while a `with` block runs. The block must not change weights."""
    token = None if _SEEN.get() is not None else _SEEN.set({})
    try:
        yield
    finally:
        if token is not None:
            _SEEN.reset(token)


@contextmanager
def unchanged_networks() -> Iterator[None]:
    """Skip `check_once` checks that have already succeeded inside this `with` block.

    The block must not change networks.
    """
    token = _CHECKED.set({})
    try:
        yield
    finally:
        _CHECKED.reset(token)


def check_once(network: nn.Module, key: Hashable, check: Callable[[], bool]) -> bool:
    """Run a check of a network, unless the same check has succeeded before in the same `unchanged_networks` block.

    Args:
        network: encoder or decoder.
        key: key of the check; a network may have several checks.
        check: function that returns whether the network passes the check, or raises an error.

    Returns:
        Whether the network passes the check.
    """
    checked = _CHECKED.get()
    if checked is None:
        return check()
    if (id(network), key) not in checked:
        if not check():
            return False
        checked[id(network), key] = network  # the reference keeps the id from being used again
    return True


def contiguous_values(parameter: torch.Tensor) -> torch.Tensor:
    """Return the values of a parameter in contiguous memory, detached; a contiguous parameter is not copied.

    Kernels that read memory by pointer, such as oneDNN's convolutions and Triton's, ignore the strides of a view.
    """
    values = parameter.detach() if parameter.layout is torch.strided else parameter.detach().to_dense()
    return values.resolve_neg().contiguous()


def current_value(module: nn.Module, name: str) -> Any:
    """Return a parameter of a module.

    A parametrized parameter is computed again, even if `torch.nn.utils.parametrize.cached` has an older value.
    """
    if parametrize.is_parametrized(module, name):
        return module.parametrizations[name]()  # type: ignore[index, operator]
    return getattr(module, name)


def weights_version(*modules: nn.Module) -> Callable[[], Any]:
    """Return a function whose result changes if a submodule, weight or buffer is replaced, moved or written to.

    The result also changes with the settings of layers, such as the slope of an activation. The function does not keep
    `modules` alive.
    """
    found = [child for module in modules for child in module.modules()]
    children = [child._modules for child in found]
    tables = [
        cast(dict[str, torch.Tensor | None], table) for child in found for table in (child._parameters, child._buffers)
    ]
    settings = [
        (operator.itemgetter(*names), child.__dict__)
        for child in found
        if (names := [name for name in SETTINGS if name in child.__dict__])
    ]
    del found

    def version() -> Any:
        tensors = [tensor for table in tables for tensor in table.values() if tensor is not None]
        places = (
            tuple(id(child) for table in children for child in table.values()),
            tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors),
            tuple(read(attributes) for read, attributes in settings),
        )
        seen = _SEEN.get()
        if seen is None:
            return places, checksums(tensors)
        if places not in seen:
            seen[places] = checksums(tensors)
        return places, seen[places]

    return version


Form = TypeVar("Form")


class DerivedForms(Generic[Form]):
    """Cache of objects that are derived from modules, such as packed weights. These objects are called forms.

    A form is built again when the weights of its module change, and is dropped together with the module. A form may
    reference the module's layers, but not the module itself, because the module would then never be freed.
    """

    def __init__(self) -> None:
        self._forms: WeakKeyDictionary[nn.Module, dict[Hashable, _Entry[Form]]] = WeakKeyDictionary()

    def __len__(self) -> int:
        """Return the number of modules with cached forms (see the class)."""
        return len(self._forms)

    def get(self, module: nn.Module, key: Hashable, build: Callable[[], Form], *others: nn.Module) -> Form:
        """Return a cached form of a module (see the class). Build it if it is missing or the weights have changed.

        Args:
            module: module that the form is derived from.
            key: key of the form; a module may have several forms.
            build: function that returns a new form. If weights change while it runs, the next `get` builds again.
            others: other modules that the form depends on.
        """
        forms = self._forms.setdefault(module, {})
        entry = forms.get(key)
        if entry is not None and check_once(module, (id(self), key), partial(entry.is_current, others)):
            return entry.form
        del entry
        forms.pop(key, None)  # free the old form before the new one needs memory
        now = weights_version(module, *others)
        version = now()
        forms[key] = entry = _Entry(build(), others, now, version)
        return entry.form

    def drop(self, module: nn.Module) -> None:
        """Remove all forms of a module (see the class) from the cache."""
        self._forms.pop(module, None)


class _Entry(Generic[Form]):
    def __init__(self, form: Form, others: tuple[nn.Module, ...], now: Callable[[], Any], version: Any) -> None:
        self.form = form
        self._others, self._now, self._version = others, now, version

    def is_current(self, others: tuple[nn.Module, ...]) -> bool:
        same = len(others) == len(self._others) and all(map(operator.is_, others, self._others))
        return same and bool(self._now() == self._version)


@torch.no_grad()
def checksums(tensors: list[torch.Tensor]) -> tuple[int, ...]:
    """Return checksums of `tensors`; if a single byte changes, at least one checksum changes."""
    kinds: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() and not tensor.is_meta:
            kinds.setdefault((tensor.device, tensor.dtype), []).append(contiguous_values(tensor).view(-1))
    sums: list[int] = []
    for (device, _), members in kinds.items():
        flats = list(_joined(members, SMALL.get(device.type, SMALL_ELSEWHERE)))
        if device.type == "cpu":
            sums += [_checksum(flat.view(torch.uint8).numpy()) for flat in flats]
        else:
            sums += torch.stack([_device_checksum(flat) for flat in flats]).tolist()
    return tuple(sums)


def _joined(members: list[torch.Tensor], small: int) -> Iterator[torch.Tensor]:
    """Join tensors into groups of at most `small` elements each; yield larger tensors unchanged."""
    group: list[torch.Tensor] = []
    total = 0
    for member in members:
        if member.numel() > small:
            yield member
            continue
        if total + member.numel() > small and group:
            yield torch.cat(group)
            group, total = [], 0
        group.append(member)
        total += member.numel()
    if group:
        yield torch.cat(group)


def _checksum(data: np.ndarray) -> int:
    """Return a checksum of bytes [n], computed from sums of 64-bit integers modulo 2^64."""
    whole = len(data) // (COLUMNS * 8) * COLUMNS * 8
    rows = data[:whole].view(np.uint64).reshape(-1, COLUMNS)
    checksum = 0
    for start in range(0, len(rows), ROWS):
        sums = np.add.reduce(rows[start : start + ROWS], axis=0)
        checksum = hash((checksum, sums.tobytes()))
    return hash((checksum, data[whole:].tobytes()))


def _device_checksum(flat: torch.Tensor) -> torch.Tensor:
    """Return a checksum of elements [n] as a tensor on their device."""
    values = flat.view(_INTEGERS[flat.element_size()])
    factors = torch.from_numpy(_FACTORS.view(np.int64)).to(flat.device)
    whole = len(values) // COLUMNS * COLUMNS
    sums = values[:whole].view(-1, COLUMNS).sum(0, dtype=torch.int64)
    rest = values[whole:]
    sums[: len(rest)] += rest
    return (sums * factors).sum()
