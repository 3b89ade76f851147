"""Reader for `.pt` token tensors of a NeMo manifest that executes no code.

`torch.load(weights_only=True)` has the same purpose, but several of its versions could be made to run code, and an
environment variable disables its check.
"""

import os
from pathlib import Path

import torch

from nemo_lfr.checkpoint.source import MemorySource
from nemo_lfr.checkpoint.tensors import SINGLE, Tensors
from nemo_lfr.errors import CheckpointError, TokenFileError, shorten
from nemo_lfr.io.regular import open_regular

# 12 hours of the released codec in int64, and the overhead of the zip archive.
MAX_BYTES = 64 << 20


def read_token_tensor(path: str | os.PathLike[str]) -> torch.Tensor:
    """Read a tensor of tokens that `torch.save` wrote.

    Args:
        path: the `.pt` file.

    Returns:
        Tokens [C, T] as int64.

    Raises:
        TokenFileError: if the file cannot be read, is damaged, or is not a tensor of integers [C, T].
    """
    path = Path(path)
    try:
        with open_regular(path, TokenFileError) as file:
            raw = file.read(MAX_BYTES + 1)
    except TokenFileError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TokenFileError(f"{path}: {shorten(reason)}.") from error
    if len(raw) > MAX_BYTES:
        raise TokenFileError(f"{path}: is larger than {MAX_BYTES} bytes; the tokens of one utterance are not.")
    try:
        tokens = Tensors(path, MemorySource(raw), single=True)[SINGLE]
    except CheckpointError as error:
        raise TokenFileError(str(error)) from error
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TokenFileError(
            f"{path}: a tensor of {str(tokens.dtype).removeprefix('torch.')} with shape {list(tokens.shape)}; "
            "expected tokens, integers [C, T]."
        )
    return tokens.long().clone()
