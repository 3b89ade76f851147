"""Write files of `torch.save` atomically."""

from pathlib import Path
from typing import IO, Any

import torch

from nemo_lfr.io.atomic import replacing


def save_tensors(path: Path, value: Any) -> None:
    """Write a file that `torch.load` reads; an existing file is replaced.

    Raises:
        OSError: if it cannot be written, as on a full disk; the error names `path`, and an existing file is kept.
    """
    with replacing(path) as file:
        save_to_file(value, file)


def save_to_file(value: Any, file: IO[bytes]) -> None:
    """Call `torch.save`, and raise the original OSError if a write fails.

    Raises:
        OSError: the failed write. PyTorch hides it behind a RuntimeError about positions in its archive.
    """
    try:
        torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
