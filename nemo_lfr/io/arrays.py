"""Convert function arguments to numpy arrays, and reject unsuitable ones."""

import numpy as np

from nemo_lfr.errors import NemoLfrError, shorten


def numeric_array(value: object, name: str, error: type[NemoLfrError]) -> np.ndarray:
    """Return `numpy.asarray(value)`, in the machine's native byte order.

    Args:
        value: the argument.
        name: name of the argument, for messages.
        error: exception class to raise.

    Raises:
        NemoLfrError: of class `error`, if the value is neither numeric nor boolean, or has masked elements.
    """
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise error(f"{name} is a masked array with {int(np.sum(value.mask))} masked values; fill them first.")
    try:
        array = np.asarray(value)
    except Exception as reason:  # the `__array__` method of any class may raise any exception
        what = " ".join(str(reason).split())
        raise error(f"{name} has type {type(value).__name__}; pass a numpy array ({shorten(what)}).") from None
    if not np.issubdtype(array.dtype, np.number) and array.dtype != bool:
        raise error(f"{name} has type {type(value).__name__} and dtype {array.dtype}; pass an array of numbers.")
    return array.astype(array.dtype.newbyteorder("="), copy=False)
