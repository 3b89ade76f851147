"""Conversion between FSQ tokens, per-dimension codes and other groupings.

A token is a mixed-radix number. Its digits are the codes of the FSQ dimensions, and the first dimension is the least
significant digit, as in NeMo's `FiniteScalarQuantizer`. Eight codebooks with levels [8, 7, 6, 6] therefore have 32
digits, which can be regrouped losslessly into 4 codebooks of 8 dimensions or 16 codebooks of 2, without a codec.
"""

import math
from collections.abc import Sequence
from typing import Any

from nemo_lfr.errors import TokensError
from nemo_lfr.lm.arrays import as_integers, constant

Levels = Sequence[int] | Sequence[Sequence[int]]


def unfold(tokens: Any, levels: Levels) -> Any:
    """Split tokens into one code per FSQ dimension.

    Args:
        tokens: ids in [0, codebook_size), shape [..., C, T].
        levels: FSQ levels of one codebook, such as `codec.levels`, or one sequence for each codebook.

    Returns:
        Codes, int64, shape [..., D, T]. D is the total number of dimensions, which is 32 for 8 x [8, 7, 6, 6]. The
        codes of a dimension are in [0, number of levels).

    Raises:
        TokensError: if tokens are outside their codebook, or `levels` is for another number of codebooks.
    """
    tokens = as_integers(tokens, "tokens")
    groups = _groups(tokens, levels, "tokens")
    sizes = constant([math.prod(group) for group in groups], tokens)[:, None]
    if bool(((tokens < 0) | (tokens >= sizes)).any()):
        raise TokensError(
            f"tokens range from {int(tokens.min())} to {int(tokens.max())}; the codebooks have "
            f"{', '.join(map(str, dict.fromkeys(math.prod(group) for group in groups)))} entries."
        )
    codebooks = [index for index, group in enumerate(groups) for _ in group]
    bases = constant([math.prod(group[:index]) for group in groups for index in range(len(group))], tokens)
    radices = constant([level for group in groups for level in group], tokens)
    return tokens[..., codebooks, :] // bases[:, None] % radices[:, None]


def fold(codes: Any, levels: Levels) -> Any:
    """Join per-dimension codes into tokens, as the inverse of `unfold`.

    Args:
        codes: integers in [0, number of levels) of each dimension, shape [..., D, T].
        levels: as in `unfold`; a single sequence is used for D / len(levels) codebooks.

    Returns:
        Tokens, int64, shape [..., C, T].

    Raises:
        TokensError: if codes are outside their levels, or `levels` has another number of dimensions.
    """
    codes = as_integers(codes, "codes")
    if len(codes.shape) < 2:
        raise TokensError(f"codes have shape {list(codes.shape)}; pass [..., D, T].")
    groups = _as_groups(levels)
    if not _is_nested(levels):
        count, rest = divmod(codes.shape[-2], len(groups[0]))
        if rest or not count:
            raise TokensError(
                f"codes have {codes.shape[-2]} dimensions, which is not a multiple of the {len(levels)} dimensions of "
                f"levels {list(levels)}."
            )
        groups *= count
    total = sum(map(len, groups))
    if codes.shape[-2] != total:
        raise TokensError(f"codes have {codes.shape[-2]} dimensions; the levels describe {total}.")
    radices = constant([level for group in groups for level in group], codes)[:, None]
    if bool(((codes < 0) | (codes >= radices)).any()):
        raise TokensError("a code lies outside the levels of its dimension.")
    bases = constant([math.prod(group[:index]) for group in groups for index in range(len(group))], codes)[:, None]
    digits = codes * bases
    tokens = digits[..., [_first(groups, index) for index in range(len(groups))], :]
    for place in range(1, max(map(len, groups))):
        has_place = [index for index, group in enumerate(groups) if place < len(group)]
        tokens[..., has_place, :] += digits[..., [_first(groups, index) + place for index in has_place], :]
    return tokens


def regroup(tokens: Any, levels: Levels, new_levels: Levels) -> Any:
    """Convert tokens losslessly to another grouping of the same FSQ dimensions.

    The result equals that of NeMo's `VectorQuantizerIndexConverter`, which needs two quantizers.

    Args:
        tokens: ids in [0, codebook_size), shape [..., C, T].
        levels: levels of the codebooks of `tokens`; see `unfold`.
        new_levels: levels of the new codebooks. For tokens with levels (8, 7, 6, 6), a value of
            (8, 7, 6, 6, 8, 7, 6, 6) halves the number of codebooks, and [(8, 7), (6, 6)] * C doubles it.

    Returns:
        Tokens, int64, shape [..., C_new, T].

    Raises:
        TokensError: if the two groupings do not list the same levels in the same order.
    """
    tokens = as_integers(tokens, "tokens")
    groups = _groups(tokens, levels, "tokens")
    flat = [level for group in groups for level in group]
    new_groups = _as_groups(new_levels)
    if not _is_nested(new_levels):
        new_groups *= max(1, len(flat) // len(new_groups[0]))
    new_flat = [level for group in new_groups for level in group]
    if flat != new_flat:
        raise TokensError(
            f"{len(groups)} codebooks of levels {_shown(groups)} cannot be regrouped into {len(new_groups)} of "
            f"{_shown(new_groups)}; the levels of all dimensions must be the same, in the same order."
        )
    return fold(unfold(tokens, groups), new_groups)


def _is_nested(levels: Levels) -> bool:
    return bool(len(levels)) and not isinstance(levels[0], int) and hasattr(levels[0], "__len__")


def _as_groups(levels: Levels) -> list[tuple[int, ...]]:
    """Return the levels of each codebook; a flat sequence gives a single one.

    Raises:
        TokensError: if levels are missing or below 2, or a codebook has more entries than int64 can index.
    """
    nested: Any = levels if _is_nested(levels) else [levels]
    try:
        groups = [tuple(int(level) for level in group) for group in nested]
    except (TypeError, ValueError) as error:
        raise TokensError(f"levels {levels!r} are not integers.") from error
    for group in groups:
        if not group or min(group) < 2 or math.prod(group) >= 2**63:
            raise TokensError(
                f"levels {list(group)} do not form a codebook; each must be at least 2, their product below 2^63."
            )
    return groups


def _groups(tokens: Any, levels: Levels, name: str) -> list[tuple[int, ...]]:
    """Return the levels of each codebook of `tokens`."""
    if len(tokens.shape) < 2:
        raise TokensError(f"{name} have shape {list(tokens.shape)}; pass [..., C, T].")
    groups = _as_groups(levels)
    if not _is_nested(levels):
        return groups * int(tokens.shape[-2])
    if len(groups) != tokens.shape[-2]:
        raise TokensError(f"{name} have {tokens.shape[-2]} codebooks, but levels were passed for {len(groups)}.")
    return groups


def _first(groups: Sequence[Sequence[int]], index: int) -> int:
    """Return the index of a codebook's first dimension among all dimensions."""
    return sum(map(len, groups[:index]))


def _shown(groups: Sequence[Sequence[int]]) -> str:
    return " and ".join(str(list(group)) for group in dict.fromkeys(map(tuple, groups)))
