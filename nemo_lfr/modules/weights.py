"""`weights_version`: whether the weights that something was derived from are still what they were.

PyTorch counts writes to a tensor, but not those through `.data`, a numpy view or another process. So the contents are
compared too, by a checksum that reads every byte once, as fast as memory gives it: 0.15 to 0.25 ms for a million fp32
weights on one CPU core, which is 1 to 4 % of the time to encode one second with them. The only uncounted change that
it misses, but for accidents of 2^-64, is an exchange of weights that lie a multiple of 4,072 bytes apart. Within
`one_look` the contents are read once, however many batches a call computes.
"""

import operator
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

# Columns of a checksum. It is prime so that a weight that moves by whole kernels or channels changes its column.
COLUMNS = 509
_FACTORS = np.random.default_rng(509).integers(0, 2**63, COLUMNS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
# Smaller tensors are read together: on a CPU each costs as much time as some thousand weights, on a GPU a launch.
SMALL = {"cpu": 1 << 16}
SMALL_ELSEWHERE = 1 << 24
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_SEEN: ContextVar[dict[Any, tuple[int, ...]] | None] = ContextVar("contents seen", default=None)


@contextmanager
def one_look() -> Iterator[None]:
    """Read the contents of the same weights once within the context: nobody is to change them meanwhile."""
    token = None if _SEEN.get() is not None else _SEEN.set({})
    try:
        yield
    finally:
        if token is not None:
            _SEEN.reset(token)


def weights_version(*modules: nn.Module) -> Callable[[], Any]:
    """Return a function whose result changes when any weight or buffer of `modules` does, or where one lies.

    It holds none of `modules`, but the tables that their children, parameters and buffers stand in.
    """
    found = [child for module in modules for child in module.modules()]
    children = [child._modules for child in found]
    tables = [
        cast(dict[str, torch.Tensor | None], table) for child in found for table in (child._parameters, child._buffers)
    ]
    del found

    def version() -> Any:
        tensors = [tensor for table in tables for tensor in table.values() if tensor is not None]
        places = (
            tuple(id(child) for table in children for child in table.values()),
            tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors),
        )
        seen = _SEEN.get()
        if seen is None:
            return places, _checksums(tensors)
        if places not in seen:
            seen[places] = _checksums(tensors)
        return places, seen[places]

    return version


Form = TypeVar("Form")


class DerivedForms(Generic[Form]):
    """What was derived from the weights of modules: built when first needed, and again after the weights changed.

    Forms are kept by module and key, and go with the module, of which they must not hold more than layers.
    """

    def __init__(self) -> None:
        self._forms: WeakKeyDictionary[nn.Module, dict[Hashable, _Entry[Form]]] = WeakKeyDictionary()

    def __len__(self) -> int:
        """Return the number of modules that something is derived from."""
        return len(self._forms)

    def get(self, module: nn.Module, key: Hashable, build: Callable[[], Form], *others: nn.Module) -> Form:
        """Return the form of a module as its weights are now.

        Args:
            module: what the form is derived from.
            key: tells forms of one module apart.
            build: returns a new form; what is written to the weights meanwhile is noticed the next time.
            others: modules that the form depends on too.
        """
        forms = self._forms.setdefault(module, {})
        entry = forms.get(key)
        if entry is not None and entry.is_current(others):
            return entry.form
        del entry
        forms.pop(key, None)  # before the new one takes memory
        now = weights_version(module, *others)
        version = now()
        forms[key] = entry = _Entry(build(), others, now, version)
        return entry.form

    def drop(self, module: nn.Module) -> None:
        """Forget all forms of a module."""
        self._forms.pop(module, None)


class _Entry(Generic[Form]):
    def __init__(self, form: Form, others: tuple[nn.Module, ...], now: Callable[[], Any], version: Any) -> None:
        self.form = form
        self._others, self._now, self._version = others, now, version

    def is_current(self, others: tuple[nn.Module, ...]) -> bool:
        same = len(others) == len(self._others) and all(map(operator.is_, others, self._others))
        return same and bool(self._now() == self._version)


@torch.no_grad()
def _checksums(tensors: list[torch.Tensor]) -> tuple[int, ...]:
    """Checksums that together change with any byte of `tensors`."""
    kinds: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() and not tensor.is_meta:
            kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach().reshape(-1))
    sums: list[int] = []
    for (device, _), members in kinds.items():
        flats = list(_joined(members, SMALL.get(device.type, SMALL_ELSEWHERE)))
        if device.type == "cpu":
            sums += [_checksum(flat.view(torch.uint8).numpy()) for flat in flats]
        else:
            sums += torch.stack([_device_checksum(flat) for flat in flats]).tolist()
    return tuple(sums)


def _joined(members: list[torch.Tensor], small: int) -> Iterator[torch.Tensor]:
    """The same numbers in few tensors: those of up to `small` elements together."""
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
    """Weighted sum of the columns of bytes [n] read as rows of `COLUMNS` integers, modulo 2^64.

    A factor is odd, so that a change of one integer always changes the sum.
    """
    row = COLUMNS * 8
    whole = len(data) // row * row
    columns = np.add.reduce(data[:whole].view(np.uint64).reshape(-1, COLUMNS), axis=0)
    if whole < len(data):
        rest = np.zeros(row, np.uint8)
        rest[: len(data) - whole] = data[whole:]
        columns = columns + rest.view(np.uint64)
    return int((columns * _FACTORS).sum())


def _device_checksum(flat: torch.Tensor) -> torch.Tensor:
    """The same idea on a GPU, where the result stays until it is asked for."""
    values = flat.view(_INTEGERS[flat.element_size()])
    factors = torch.from_numpy(_FACTORS.view(np.int64)).to(flat.device)
    whole = len(values) // COLUMNS * COLUMNS
    columns = values[:whole].view(-1, COLUMNS).sum(0, dtype=torch.int64)
    rest = values[whole:].to(torch.int64)
    return (columns * factors).sum() + (rest * factors[: len(rest)]).sum()
