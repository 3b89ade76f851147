"""Read the `.pt` token tensors that a NeMo manifest lists, without executing code from the files.

`torch.load(weights_only=True)` has the same purpose. However, several versions of it had bugs through which a file
could execute code, and an environment variable can disable its check.
"""

import os
from pathlib import Path

import torch

from nemo_lfr.checkpoint.source import MemorySource
from nemo_lfr.checkpoint.tensors import SINGLE, Tensors
from nemo_lfr.errors import CheckpointError, TokenFileError, shorten
from nemo_lfr.io.regular import open_regular

# Enough for 12 hours of int64 tokens of the released codec, and the overhead of the zip archive.
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
        raise TokenFileError(
            f"{path}: file is larger than {MAX_BYTES} bytes, the limit for the tokens of one utterance."
        )
    try:
        tokens = Tensors(path, MemorySource(raw), single=True)[SINGLE]
    except CheckpointError as error:
        raise TokenFileError(str(error)) from error
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TokenFileError(
            f"{path}: found a {str(tokens.dtype).removeprefix('torch.')} tensor with shape {list(tokens.shape)}; "
            "expected integer tokens [C, T]."
        )
    return tokens.long().clone()
