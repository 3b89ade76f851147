"""Files of `torch.save`, which appear whole or not at all."""

from pathlib import Path
from typing import IO, Any

import torch

from nemo_lfr.io.atomic import replacing


def save_tensors(path: Path, value: Any) -> None:
    """Write a file that `torch.load` reads, in the place of an older one.

    Raises:
        OSError: naming `path`, as on a full disk; the older file is still there.
    """
    with replacing(path) as file:
        save_to_file(value, file)


def save_to_file(value: Any, file: IO[bytes]) -> None:
    """Call `torch.save`, and say why it failed.

    Raises:
        OSError: of the write that failed. PyTorch raises a RuntimeError on top of it, about positions in its archive.
    """
    try:
        torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
