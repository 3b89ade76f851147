"""Finite scalar quantization, FSQ (Mentzer et al., arXiv 2309.15505): encoded frames <-> codes <-> tokens.

Each dimension of an encoded frame is squashed into the range of its levels and rounded to one of them; the rounded
value, scaled to [-1, 1], is a code. Each codebook covers a group of dimensions, and gives one token per frame. The
token is a mixed-radix number. Its digits are the indices of the chosen levels, with the first dimension as the lowest
digit. The arithmetic and the state-dict keys are the same as in NeMo's classes with the same names. Quantization runs
in fp32 even under autocast, because tokens depend on its rounding.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from nemo_lfr.errors import ConfigError
from nemo_lfr.modules.altered import is_altered, is_patched, must_be_called, notice_patches
from nemo_lfr.modules.codebook_dropout import CodebookDropout
from nemo_lfr.modules.level_tables import has_level_tables, level_tables
from nemo_lfr.modules.neural_module import NeuralModule
from nemo_lfr.modules.token_checks import check_dimensions, check_indices, check_shape, check_tokens, mask
from nemo_lfr.modules.weights import check_once

_FINITE = "check that the audio and the weights are finite"
_IN_RANGE = "pass codes that this quantizer returned"


@notice_patches
class FiniteScalarQuantizer(NeuralModule):
    """Quantizer with one codebook, which has D dimensions.

    A caller may patch or override methods, or change buffers. The results are then those of NeMo's class with the same
    change, and the returned tokens are not checked.

    Args:
        num_levels: number of levels in each dimension, at least 2.
        eps: fraction by which the range of squashed values is smaller than the range of the levels.

    Raises:
        ConfigError: if a dimension has fewer than 2 levels, or the codebook has more than 2^24 entries. NeMo
            computes tokens in float32, which is not exact for larger codebooks.
    """

    input_names = ("inputs", "input_len")
    output_names = ("dequantized", "indices")  # no third output: NeMo's model would treat it as a commit loss

    num_levels: torch.Tensor
    dim_base_index: torch.Tensor

    def __init__(self, num_levels: Sequence[int], eps: float = 1e-3) -> None:
        super().__init__()
        levels = [int(level) for level in num_levels]
        if min(levels) < 2 or math.prod(levels) > 2**24:
            raise ConfigError(
                f"levels {levels} do not form a codebook; use at least 2 levels in each dimension, and a product "
                "of at most 2^24."
            )
        self.levels = tuple(levels)
        self.eps = eps
        for name, table in self.tables().items():
            self.register_buffer(name, table)

    def tables(self) -> dict[str, torch.Tensor]:
        """Return the correct values of the buffers `num_levels` and `dim_base_index` by name, each int32 [1, D, 1]."""
        values = level_tables(self.levels).items()
        return {name: torch.tensor(value, dtype=torch.int32).reshape(1, -1, 1) for name, value in values}

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks, which is 1."""
        return 1

    @property
    def codebook_size(self) -> int:
        """Number of entries in the codebook: the product of the levels."""
        return math.prod(self.levels) if self.is_consistent else int(self.num_levels.prod())

    @property
    def is_consistent(self) -> bool:
        """Whether no caller has changed the buffers."""
        return has_level_tables(self, self.levels)

    @property
    def is_plain(self) -> bool:
        """Whether no caller has added hooks, or changed methods or buffers."""
        return not is_altered(self) and not must_be_called(self, FiniteScalarQuantizer) and self.is_consistent

    @property
    def _is_own(self) -> bool:
        """Whether the class, the methods and the buffers are unchanged.

        The buffers are not checked within `torch.compile`.
        """
        return type(self) is FiniteScalarQuantizer and not is_patched(self) and self.is_consistent

    @property
    def dim(self) -> int:
        """Number of dimensions D of a code vector."""
        return len(self.levels)

    @property
    def codebook_dim(self) -> int:
        """NeMo's name for `dim`."""
        return self.dim

    @property
    def codes(self) -> torch.Tensor:
        """All entries of the codebook in token order, [codebook_size, D]."""
        tokens = torch.arange(self.codebook_size, device=self.num_levels.device)
        return self.decode(indices=tokens.reshape(1, -1, 1), input_len=None).squeeze(-1)

    @property
    def codebook(self) -> torch.Tensor:
        """NeMo's name for `codes`."""
        return self.codes

    @staticmethod
    def round(inputs: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Round to the nearest integer, with a straight-through gradient."""
        return inputs + (inputs.round() - inputs).detach()

    def compress(self, inputs: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Squash [B, D, T] into the range of the levels, so that rounding gives one of the levels."""
        levels = self.num_levels.to(torch.float32)  # dividing integers would give PyTorch's default dtype
        half_range = (levels - 1) / 2 * (1 - self.eps)
        # `torch.where` with scalars would copy them to the GPU, which is not possible in a CUDA graph.
        offset = (levels % 2 == 0).to(torch.float32) * 0.5
        # tan, not atanh: released checkpoints were trained with tan, and token ids depend on it.
        shift = (offset / half_range).tan()
        return half_range * (inputs + shift).tanh() - offset

    def forward(
        self, inputs: torch.Tensor, input_len: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize, with a straight-through gradient.

        Args:
            inputs: encoded frames [B, D, T].
            input_len: frames in each example, [B]; results after the end of an example are zero. None for all frames.

        Returns:
            Codes in [-1, 1], [B, D, T], and tokens [1, B, T] as int32.
        """
        if self._is_own:
            with torch.autocast(inputs.device.type, enabled=False):
                rounded = self.round(self.compress(inputs.float()))
                middle = self.num_levels // 2
                codes = rounded / middle
                digits = rounded.detach().round().to(torch.int32) + middle
            tokens = (digits * self.dim_base_index).sum(dim=1, dtype=torch.int32)
        else:
            codes = self.inputs_to_codes(inputs=inputs, input_len=input_len)
            tokens = self.codes_to_indices(codes=codes)
        return mask(codes, input_len), mask(tokens, input_len).unsqueeze(0)

    def encode(self, inputs: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Quantize encoded frames to tokens: [B, D, T] -> [1, B, T].

        Raises:
            TokensError: if a frame contains NaN or infinite values.
        """
        tokens: torch.Tensor = self(inputs=inputs, input_len=input_len)[1]
        if self._is_own:
            check_tokens(tokens, inputs, self.codebook_size, input_len, "encoded frames", _FINITE)
        return tokens

    def decode(self, indices: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Dequantize tokens to codes: [1, B, T] -> [B, D, T].

        Raises:
            TokensError: if the shape of `indices` is not [1, B, T], or a token is outside the codebook.
        """
        check_indices(indices, self.num_codebooks, self.codebook_size, input_len)
        return self.decode_unchecked(indices, input_len)

    def decode_unchecked(self, indices: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Dequantize tokens without checking them.

        A token outside the codebook is taken modulo the codebook size.
        """
        digits = (indices.squeeze(0).unsqueeze(1) // self.dim_base_index) % self.num_levels
        return mask(self.nonnegative_to_codes(digits), input_len)

    # Single steps of `forward` and `decode`, under their names in NeMo.

    def inputs_to_codes(self, inputs: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Quantize encoded frames to codes, [B, D, T] -> [B, D, T], with a straight-through gradient."""
        with torch.autocast(inputs.device.type, enabled=False):
            compressed = self.compress(inputs=inputs.float(), input_len=input_len)
            return self.round(inputs=compressed, input_len=input_len) / (self.num_levels // 2)

    def codes_to_nonnegative(self, codes: torch.Tensor) -> torch.Tensor:
        """Convert codes in [-1, 1] to level indices in [0, num_levels): [B, D, T] -> [B, D, T]."""
        middle = self.num_levels // 2
        return middle * codes + middle

    def nonnegative_to_codes(self, codes_nonnegative: torch.Tensor) -> torch.Tensor:
        """Convert level indices in [0, num_levels) to codes in [-1, 1]: [B, D, T] -> [B, D, T]."""
        middle = self.num_levels // 2
        digits = codes_nonnegative - middle
        # Dividing integers would give PyTorch's default dtype.
        return (digits if digits.is_floating_point() else digits.to(torch.float32)) / middle

    def codes_to_indices(self, codes: torch.Tensor) -> torch.Tensor:
        """Convert codes in [-1, 1] to tokens: [B, D, T] -> [B, T] as int32.

        Raises:
            TokensError: if the shape of `codes` is not [B, D, T], or a code is NaN, infinite or out of range.
        """
        if not self._is_own:  # the codes may lie between levels; NeMo does not round them
            return (self.codes_to_nonnegative(codes) * self.dim_base_index).sum(dim=1).to(torch.int32)
        check_dimensions(codes, self.dim)
        tokens = self._to_indices(codes)
        check_tokens(tokens, codes, self.codebook_size, None, "codes", _IN_RANGE)
        return tokens

    def _to_indices(self, codes: torch.Tensor) -> torch.Tensor:
        """Convert codes [B, D, T] to tokens [B, T]; a frame with a code out of range gets -1."""
        digits = self.codes_to_nonnegative(codes.float()).round().to(torch.int32)
        tokens = (digits * self.dim_base_index).sum(dim=1, dtype=torch.int32)
        # Checking the token would not suffice: a level index out of range may still give a token in the codebook.
        is_outside = ((digits < 0) | (digits >= self.num_levels)).any(dim=1)
        return tokens.masked_fill(is_outside, -1)


@notice_patches
class GroupFiniteScalarQuantizer(CodebookDropout):
    """Quantizer with `num_groups` codebooks, each for a group of dimensions.

    The groups have the same levels, so the first group's quantizer handles all groups at once. If a caller has altered
    one of the quantizers in `fsqs`, each quantizer is called for its own group, as in NeMo.

    Args:
        num_groups: number of codebooks C.
        num_levels_per_group: number of levels in each dimension of one codebook; all codebooks have the same levels.
        eps: see `FiniteScalarQuantizer`.

    Raises:
        ConfigError: if a dimension has fewer than 2 levels, or a codebook has more than 2^24 entries.
    """

    input_names = FiniteScalarQuantizer.input_names
    output_names = FiniteScalarQuantizer.output_names

    def __init__(self, num_groups: int, num_levels_per_group: Sequence[int], eps: float = 1e-3) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.fsqs = nn.ModuleList(FiniteScalarQuantizer(num_levels_per_group, eps) for _ in range(num_groups))
        self.levels = tuple(int(level) for level in num_levels_per_group)

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks C."""
        return self.num_groups

    @property
    def codebook_size(self) -> int:
        """Number of entries in one codebook."""
        first = next(iter(self.fsqs), None)
        return first.codebook_size if type(first) is FiniteScalarQuantizer else math.prod(self.levels)

    @property
    def is_consistent(self) -> bool:
        """Whether no caller has changed the buffers of any group."""
        return all(group.is_consistent for group in self.fsqs if isinstance(group, FiniteScalarQuantizer))

    @property
    def is_plain(self) -> bool:
        """Whether the quantizer has no hooks, and its groups, methods and buffers are unchanged."""
        return check_once(self, "plain", lambda: not is_altered(self) and self._is_uniform())

    def _is_uniform(self) -> bool:
        if torch.compiler.is_compiling():
            return self._are_groups_plain()
        return check_once(self, "uniform", self._are_groups_plain)

    def _are_groups_plain(self) -> bool:
        groups = list(self.fsqs._modules.values()) if type(self.fsqs) is nn.ModuleList else []
        kind = FiniteScalarQuantizer
        for group in groups:
            if type(group) is not kind or must_be_called(group, kind) or not group.is_consistent:
                return False
            if group.levels != self.levels or group.eps != groups[0].eps:
                return False
        return len(groups) == self.num_groups

    def _split(self, values: torch.Tensor, dim: int) -> Iterator[tuple[Any, torch.Tensor]]:
        """Split a tensor along the dimension `dim`, and yield each group's quantizer with its part of the tensor.

        Raises:
            TokensError: if the tensor does not have three dimensions, or its size along `dim` does not fit the groups.
                As in NeMo, the shape is not checked if a caller has changed the number of groups.
        """
        if len(self.fsqs) == self.num_groups:
            if dim == 1:
                check_dimensions(values, self.codebook_dim)
            else:
                check_shape(values, self.num_codebooks)
        return zip(self.fsqs, values.chunk(self.num_groups, dim), strict=False)

    def _fold(self, values: torch.Tensor) -> torch.Tensor:
        """Move the C codebooks into the batch dimension: [B, D, T] -> [B * C, D / C, T].

        One quantizer can then process all codebooks, because they have the same levels.
        """
        return torch.unflatten(values, 1, (-1, len(self.levels))).flatten(0, 1)

    def forward(
        self, inputs: torch.Tensor, input_len: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize, with a straight-through gradient: [B, D, T] -> codes [B, D, T] and tokens [C, B, T]."""
        return self._quantize(inputs, input_len)

    def _quantize(self, inputs: torch.Tensor, input_len: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._is_uniform():
            parts = [group(inputs=part, input_len=input_len) for group, part in self._split(inputs, dim=1)]
            return torch.cat([part[0] for part in parts], dim=1), torch.cat([part[1] for part in parts], dim=0)
        codes, tokens = self.fsqs[0](self._fold(inputs))
        codes = codes.reshape(inputs.shape)
        tokens = tokens.reshape(inputs.shape[0], self.num_groups, inputs.shape[2])
        return mask(codes, input_len), mask(tokens, input_len).transpose(0, 1)

    def encode(self, inputs: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Quantize encoded frames to tokens: [B, D, T] -> [C, B, T].

        Raises:
            TokensError: if a frame contains NaN or infinite values.
        """
        if not self._is_uniform():
            parts = [group.encode(inputs=part, input_len=input_len) for group, part in self._split(inputs, dim=1)]
            return torch.cat(parts, dim=0)
        tokens = self._quantize(inputs, input_len)[1]  # NeMo does not call `forward` and its hooks here either
        check_tokens(tokens, inputs, self.codebook_size, input_len, "encoded frames", _FINITE)
        return tokens

    def decode(self, indices: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Dequantize tokens to codes: [C, B, T] -> [B, D, T].

        Raises:
            TokensError: if the shape of `indices` is not [C, B, T], or a token is outside the codebook.
        """
        if not self._is_uniform():
            parts = [group.decode(indices=part, input_len=input_len) for group, part in self._split(indices, dim=0)]
            return torch.cat(parts, dim=1)
        check_indices(indices, self.num_codebooks, self.codebook_size, input_len)
        return self.decode_unchecked(indices, input_len)

    def decode_unchecked(self, indices: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Dequantize tokens without checking them.

        A token outside the codebook is taken modulo the codebook size.
        """
        if not self._is_uniform():
            parts = [
                group.decode(indices=part % group.codebook_size, input_len=input_len)
                for group, part in self._split(indices, dim=0)
            ]
            return torch.cat(parts, dim=1)
        batch, frames = indices.shape[1:]
        quantizer = self.fsqs[0]
        assert isinstance(quantizer, FiniteScalarQuantizer)
        codes = quantizer.decode_unchecked(indices.transpose(0, 1).flatten(0, 1)[None])
        return mask(codes.reshape(batch, self.codebook_dim, frames), input_len)

    def codes_to_indices(self, codes: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Convert codes in [-1, 1] to tokens: [B, D, T] -> [B, C, T] as int32.

        Args:
            codes: FSQ values, [B, D, T].
            input_len: frames in each example, [B]; tokens after the end of an example are zero. None for all frames.

        Raises:
            TokensError: if the shape of `codes` is not [B, D, T], or a code is NaN, infinite or out of range.
        """
        check_dimensions(codes, self.codebook_dim)
        if not self._is_uniform():
            parts = [group.codes_to_indices(codes=part) for group, part in self._split(codes, dim=1)]
            return torch.stack([mask(part, input_len) for part in parts], dim=1)
        quantizer = self.fsqs[0]
        assert isinstance(quantizer, FiniteScalarQuantizer)
        tokens = quantizer._to_indices(self._fold(codes))
        tokens = mask(torch.unflatten(tokens, 0, (codes.shape[0], self.num_groups)), input_len)
        check_tokens(tokens, codes, self.codebook_size, input_len, "codes", _IN_RANGE)
        return tokens
