"""Checks and masks of the tokens and values that a quantizer receives or returns."""

import torch

from nemo_lfr.errors import TokensError


def mask(values: torch.Tensor, length: torch.Tensor | None) -> torch.Tensor:
    """Return values [B, ..., T] with zeros after the end of each example.

    `length` [B] has the numbers of valid frames; None if all frames are valid.
    """
    if length is None or bool((length == values.shape[-1]).all()):
        return values
    valid = torch.arange(values.shape[-1], device=values.device) < length.to(values.device)[:, None]
    return values * valid.reshape(valid.shape[0], *[1] * (values.dim() - 2), -1)


def check_tokens(
    tokens: torch.Tensor, values: torch.Tensor, codebook_size: int, length: torch.Tensor | None, name: str, remedy: str
) -> None:
    """Raise an error if a token is outside the codebook, or was made from NaN or infinite values.

    The values are checked too, because NaN may have become a valid token. The check synchronizes a GPU. Nothing is
    checked while a graph is traced or captured.

    Args:
        tokens: the tokens, in any shape.
        values: values that the tokens were made from, [B, D, T].
        codebook_size: number of entries.
        length: frames in each example, [B]; None for all frames.
        name: name of `values` in messages.
        remedy: end of the message.
    """
    if not has_values(tokens):
        return
    is_outside = (tokens < 0) | (tokens >= codebook_size)
    is_bad = ~values.isfinite().all(dim=1)
    if length is not None:
        is_bad = is_bad & (torch.arange(values.shape[-1], device=values.device) < length.to(values.device)[:, None])
    if bool(is_outside.any() | is_bad.any()):
        raise TokensError(
            f"some {name} are NaN, infinite or out of range, and cannot be converted to tokens of a codebook of "
            f"{codebook_size} entries; {remedy}."
        )


def check_indices(indices: torch.Tensor, num_codebooks: int, codebook_size: int, length: torch.Tensor | None) -> None:
    """Raise an error if tokens to decode have the wrong shape or are outside the codebook.

    Checking the values synchronizes a GPU. The values are not checked while a graph is traced or captured.

    Args:
        indices: tokens, which should be [C, B, T].
        num_codebooks: number of codebooks C.
        codebook_size: number of entries.
        length: frames in each example, [B]; later tokens may have any value. None for all frames.
    """
    check_shape(indices, num_codebooks)
    if not has_values(indices):
        return
    is_bad = ~((indices >= 0) & (indices < codebook_size))  # also for NaN
    if length is not None:
        is_bad = is_bad & (torch.arange(indices.shape[-1], device=indices.device) < length.to(indices.device)[:, None])
    if bool(is_bad.any()):
        token = indices[is_bad][0].item()
        raise TokensError(f"the token {token} is outside [0, {codebook_size}); pass tokens of this codec.")


def check_shape(indices: torch.Tensor, num_codebooks: int) -> None:
    """Raise an error unless tokens have the shape [num_codebooks, B, T]."""
    if indices.dim() != 3 or indices.shape[0] != num_codebooks:
        raise TokensError(f"tokens have shape {list(indices.shape)}; this quantizer takes [{num_codebooks}, B, T].")


def check_dimensions(values: torch.Tensor, dim: int) -> None:
    """Raise an error unless codes or encoded frames have the shape [B, dim, T]."""
    if values.dim() != 3 or values.shape[1] != dim:
        raise TokensError(f"the values have shape {list(values.shape)}; this quantizer takes [B, {dim}, T].")


def has_values(tokens: torch.Tensor) -> bool:
    """Return whether a tensor has values that can be read. It has none while a graph is traced or captured."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    is_plain = type(tokens) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tokens)
    is_captured = tokens.is_cuda and torch.cuda.is_current_stream_capturing()
    return is_plain and not is_captured and not tokens.is_meta and tokens.numel() > 0
