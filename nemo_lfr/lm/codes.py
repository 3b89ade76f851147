"""Convert FSQ tokens to one code per dimension, or to another number of codebooks.

In this module, a code is the index of an FSQ level: an integer in [0, n) for a dimension with n levels. A token
combines the codes of all FSQ dimensions of a codebook in one mixed-radix number. The first dimension is the least
significant, as in NeMo's `FiniteScalarQuantizer`.

For example, a frame of 8 codebooks with levels [8, 7, 6, 6] has 32 codes. They can be regrouped into 4 codebooks with
8 dimensions each, or into 16 codebooks with 2 dimensions each. Regrouping is lossless and does not need a codec.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from nemo_lfr.errors import TokensError, shorten
from nemo_lfr.lm.arrays import as_integers, constant

Levels = Sequence[int] | Sequence[Sequence[int]]


def unfold(tokens: Any, levels: Levels) -> Any:
    """Split tokens into one code per FSQ dimension.

    Args:
        tokens: ids in [0, codebook_size), shape [..., C, T].
        levels: number of FSQ levels in each dimension of a codebook, such as `codec.levels`. If the codebooks have
            different levels, pass one such sequence for each codebook.

    Returns:
        Codes, int64, shape [..., D, T]. D is the total number of dimensions, for example 32 for 8 codebooks with
        levels [8, 7, 6, 6]. The codes of a dimension with n levels are in [0, n).

    Raises:
        TokensError: if a token is outside its codebook, or `levels` and `tokens` differ in the number of codebooks.
    """
    tokens = as_integers(tokens, "tokens")
    groups = _groups(tokens, levels, "tokens")
    sizes = constant([math.prod(group) for group in groups], tokens)[:, None]
    if bool(((tokens < 0) | (tokens >= sizes)).any()):
        raise TokensError(
            f"tokens range from {int(tokens.min())} to {int(tokens.max())}, but the codebooks have "
            f"{', '.join(map(str, dict.fromkeys(math.prod(group) for group in groups)))} entries; pass the levels of "
            "the codec that made the tokens."
        )
    codebooks = [index for index, group in enumerate(groups) for _ in group]
    bases = constant([math.prod(group[:index]) for group in groups for index in range(len(group))], tokens)
    radices = constant([level for group in groups for level in group], tokens)
    return tokens[..., codebooks, :] // bases[:, None] % radices[:, None]


def fold(codes: Any, levels: Levels) -> Any:
    """Join the codes of all FSQ dimensions into tokens. This is the inverse of `unfold`.

    Args:
        codes: integers, shape [..., D, T]. The codes of a dimension with n levels are in [0, n).
        levels: number of FSQ levels in each dimension of a codebook, such as `codec.levels`; the number of codebooks
            is then D / len(levels). If the codebooks have different levels, pass one such sequence for each codebook.

    Returns:
        Tokens, int64, shape [..., C, T].

    Raises:
        TokensError: if a code is outside the levels of its dimension, or D does not fit `levels`.
    """
    codes = as_integers(codes, "codes")
    if len(codes.shape) < 2:
        raise TokensError(f"codes have shape {list(codes.shape)}; pass [..., D, T].")
    groups = _as_groups(levels)
    if not _is_nested(levels):
        count, rest = divmod(codes.shape[-2], len(groups[0]))
        if rest or not count:
            raise TokensError(
                f"axis -2 of the codes has size {codes.shape[-2]}, but levels {list(levels)} need a multiple of "
                f"{len(levels)}; pass the codes of complete codebooks."
            )
        groups *= count
    total = sum(map(len, groups))
    if codes.shape[-2] != total:
        raise TokensError(
            f"axis -2 of the codes has size {codes.shape[-2]}, but `levels` describes {total} dimensions; pass the "
            "levels of all codebooks."
        )
    radices = constant([level for group in groups for level in group], codes)[:, None]
    if bool(((codes < 0) | (codes >= radices)).any()):
        raise TokensError(
            "a code is outside the levels of its dimension; pass the levels of the codec that made the codes."
        )
    bases = constant([math.prod(group[:index]) for group in groups for index in range(len(group))], codes)[:, None]
    digits = codes * bases
    tokens = digits[..., [_first(groups, index) for index in range(len(groups))], :]
    for place in range(1, max(map(len, groups))):
        has_place = [index for index, group in enumerate(groups) if place < len(group)]
        tokens[..., has_place, :] += digits[..., [_first(groups, index) + place for index in has_place], :]
    return tokens


def regroup(tokens: Any, levels: Levels, new_levels: Levels) -> Any:
    """Convert tokens losslessly to codebooks that group the same FSQ dimensions differently.

    Args:
        tokens: ids in [0, codebook_size), shape [..., C, T].
        levels: levels of the codebooks of `tokens`; see `unfold`.
        new_levels: levels of the new codebooks. For example, if `levels` is (8, 7, 6, 6), then
            (8, 7, 6, 6, 8, 7, 6, 6) halves the number of codebooks, and [(8, 7), (6, 6)] * C doubles this number.

    Returns:
        Tokens, int64, shape [..., C_new, T].

    Raises:
        TokensError: if `new_levels` does not contain the same levels in the same order as `levels`, or if the tokens
            do not fit `levels`.
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
            f"{len(groups)} codebooks with levels {_shown(groups)} cannot be regrouped into {len(new_groups)} "
            f"codebooks with levels {_shown(new_groups)}; pass the same levels in the same order."
        )
    return fold(unfold(tokens, groups), new_groups)


def _is_nested(levels: Levels) -> bool:
    return bool(len(levels)) and np.ndim(levels[0]) > 0


def _as_groups(levels: Levels) -> list[tuple[int, ...]]:
    """Return the levels of each codebook. A flat sequence is returned as the levels of a single codebook.

    Raises:
        TokensError: if a codebook has no levels, a level is below 2, or a codebook has 2^63 or more entries.
    """
    try:
        nested: Any = levels if _is_nested(levels) else [levels]
        groups = [tuple(operator.index(level) for level in group) for group in nested]
    except (TypeError, KeyError) as error:
        raise TokensError(
            f"levels {shorten(repr(levels))} are not integers; pass a sequence of integers, such as codec.levels."
        ) from error
    for group in groups:
        if not group or min(group) < 2 or math.prod(group) >= 2**63:
            raise TokensError(
                f"levels {list(group)} are not valid for a codebook; pass levels of at least 2, with a product below "
                "2^63."
            )
    return groups


def _groups(tokens: Any, levels: Levels, name: str) -> list[tuple[int, ...]]:
    """Return the levels of each codebook, after checking the shape of `tokens`."""
    if len(tokens.shape) < 2:
        raise TokensError(f"{name} have shape {list(tokens.shape)}; pass [..., C, T].")
    groups = _as_groups(levels)
    if not _is_nested(levels):
        return groups * int(tokens.shape[-2])
    if len(groups) != tokens.shape[-2]:
        raise TokensError(
            f"{name} have {tokens.shape[-2]} codebooks, but `levels` has entries for {len(groups)}; pass "
            "the levels of all codebooks."
        )
    return groups


def _first(groups: Sequence[Sequence[int]], index: int) -> int:
    """Return the total number of dimensions of the codebooks before codebook `index`."""
    return sum(map(len, groups[:index]))


def _shown(groups: Sequence[Sequence[int]]) -> str:
    return " and ".join(str(list(group)) for group in dict.fromkeys(map(tuple, groups)))
