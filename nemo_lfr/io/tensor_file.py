"""Write files with `torch.save` atomically."""

from pathlib import Path
from typing import IO, Any

import torch

from nemo_lfr.io.atomic import replacing


def save_tensors(path: Path, value: Any) -> None:
    """Write a value with `torch.save`, atomically. An existing file is replaced.

    Args:
        path: the file.
        value: tensor, or any other value that `torch.save` accepts.

    Raises:
        OSError: if the file cannot be written, for instance on a full disk. The error names `path`, and an existing
            file is kept.
    """
    with replacing(path) as file:
        save_to_file(value, file)


def save_to_file(value: Any, file: IO[bytes]) -> None:
    """Call `torch.save`, and raise the original OSError if a write fails."""
    try:
        torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
