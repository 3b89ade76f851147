"""Encoded -> codes -> tokens, and back: finite scalar quantization (Mentzer et al., arXiv 2309.15505).

Each dimension is squashed to an odd or even number of levels and rounded; the levels of a group of dimensions, read
as a mixed-radix number with the first dimension as the lowest digit, are one token. The arithmetic and the state-dict
keys are those of NeMo's classes of the same names; it always runs in fp32, because tokens depend on it.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from nemo_lfr.errors import ConfigError, TokensError
from nemo_lfr.modules.neural_module import NeuralModule


def _mask(values: torch.Tensor, length: torch.Tensor | None) -> torch.Tensor:
    """Zero what lies after each example's length: values [B, ..., T], length [B]."""
    if length is None or bool((length == values.shape[-1]).all()):
        return values
    valid = torch.arange(values.shape[-1], device=values.device) < length.to(values.device)[:, None]
    return values * valid.reshape(valid.shape[0], *[1] * (values.dim() - 2), -1)


class FiniteScalarQuantizer(NeuralModule):
    """One codebook: D dimensions with `num_levels` each.

    Args:
        num_levels: levels of each dimension, each at least 2.
        eps: the squashed range stops this share short of the outermost levels.

    Raises:
        ConfigError: for fewer levels, or more codes than an int32 token can tell.
    """

    input_names = ("inputs", "input_len")
    output_names = ("dequantized", "indices")  # no third: NeMo's model takes that for a commit loss

    num_levels: torch.Tensor
    dim_base_index: torch.Tensor

    def __init__(self, num_levels: Sequence[int], eps: float = 1e-3) -> None:
        super().__init__()
        levels = [int(level) for level in num_levels]
        if min(levels) < 2 or math.prod(levels) > 2**31 - 1:
            raise ConfigError(
                f"levels {levels} do not make a codebook; each must be at least 2, their product < 2^31."
            )
        bases = [math.prod(levels[:dim]) for dim in range(len(levels))]
        self.levels = tuple(levels)
        self.eps = eps
        self.register_buffer("dim_base_index", torch.tensor(bases, dtype=torch.int32).reshape(1, -1, 1))
        self.register_buffer("num_levels", torch.tensor(levels, dtype=torch.int32).reshape(1, -1, 1))

    @property
    def num_codebooks(self) -> int:
        return 1

    @property
    def codebook_size(self) -> int:
        """Entries of the codebook: the product of the levels."""
        return math.prod(self.levels)

    @property
    def dim(self) -> int:
        """Dimensions of a code vector."""
        return len(self.levels)

    @property
    def codebook_dim(self) -> int:
        return self.dim

    @property
    def codes(self) -> torch.Tensor:
        """Every entry of the codebook, [codebook_size, D], in the order of the tokens."""
        tokens = torch.arange(self.codebook_size, device=self.num_levels.device)
        return self.decode(tokens.reshape(1, -1, 1)).squeeze(-1)

    @property
    def codebook(self) -> torch.Tensor:
        """NeMo's second name for `codes`."""
        return self.codes

    @staticmethod
    def round(inputs: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Round to the nearest integer, with a straight-through gradient."""
        return inputs + (inputs.round() - inputs).detach()

    def compress(self, inputs: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Squash [B, D, T] into the range of the levels, so that rounding gives one of them."""
        levels = self.num_levels.to(torch.float32)  # integers would divide into the default dtype
        half_range = (levels - 1) / 2 * (1 - self.eps)
        offset = (levels % 2 == 0).to(torch.float32) * 0.5  # not torch.where: its scalars stand in a CUDA graph's way
        # tan, not atanh: released checkpoints were trained with it, and token ids depend on it.
        shift = (offset / half_range).tan()
        return half_range * (inputs + shift).tanh() - offset

    def forward(
        self, inputs: torch.Tensor, input_len: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize, with a straight-through gradient.

        Args:
            inputs: encoded frames [B, D, T].
            input_len: frames of each example [B]; results after them are zero.

        Returns:
            Codes in [-1, 1], [B, D, T], and tokens [1, B, T] as int32.
        """
        with torch.autocast(inputs.device.type, enabled=False):
            rounded = self.round(self.compress(inputs.float()))
            middle = self.num_levels // 2
            codes = rounded / middle
            digits = rounded.detach().round().to(torch.int32) + middle
        tokens = (digits * self.dim_base_index).sum(dim=1, dtype=torch.int32)
        return _mask(codes, input_len), _mask(tokens, input_len).unsqueeze(0)

    def encode(self, inputs: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens of encoded frames: [B, D, T] -> [1, B, T]."""
        return self(inputs, input_len)[1]

    def decode(self, indices: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Codes of tokens: [1, B, T] -> [B, D, T]."""
        digits = (indices.squeeze(0).unsqueeze(1) // self.dim_base_index) % self.num_levels
        return _mask(self.nonnegative_to_codes(digits), input_len)

    # NeMo's names for the steps in between.

    def inputs_to_codes(self, inputs: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Codes of encoded frames, [B, D, T] -> [B, D, T], with a straight-through gradient."""
        return self(inputs)[0]

    def codes_to_nonnegative(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes in [-1, 1] to digits from 0 to the number of levels less one: [B, D, T] -> [B, D, T]."""
        middle = self.num_levels // 2
        return middle * codes + middle

    def nonnegative_to_codes(self, codes_nonnegative: torch.Tensor) -> torch.Tensor:
        """Digits from 0 to codes in [-1, 1]: [B, D, T] -> [B, D, T]."""
        middle = self.num_levels // 2
        digits = codes_nonnegative - middle
        # Integers would divide into the default dtype.
        return (digits if digits.is_floating_point() else digits.to(torch.float32)) / middle

    def codes_to_indices(self, codes: torch.Tensor) -> torch.Tensor:
        """Tokens of codes in [-1, 1]: [B, D, T] -> [B, T] as int32.

        Raises:
            TokensError: for another number of dimensions.
        """
        _check_dimensions(codes, self.dim)
        digits = self.codes_to_nonnegative(codes.float()).round().to(torch.int32)
        return (digits * self.dim_base_index).sum(dim=1, dtype=torch.int32)


def _check_dimensions(codes: torch.Tensor, dim: int) -> None:
    if codes.dim() != 3 or codes.shape[1] != dim:
        raise TokensError(f"codes have shape {list(codes.shape)}; this quantizer takes [B, {dim}, T].")


class GroupFiniteScalarQuantizer(NeuralModule):
    """`num_groups` codebooks with the same levels, each for its own share of the dimensions.

    Args:
        num_groups: C, the number of codebooks.
        num_levels_per_group: levels of each dimension of one codebook.
        eps: see `FiniteScalarQuantizer`.
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
        return self.num_groups

    @property
    def codebook_size(self) -> int:
        """Entries of one codebook."""
        return math.prod(self.levels)

    @property
    def codebook_dim_per_group(self) -> int:
        return len(self.levels)

    @property
    def codebook_dim(self) -> int:
        """D, the dimensions of an encoded frame."""
        return self.num_groups * len(self.levels)

    def _fold(self, values: torch.Tensor) -> torch.Tensor:
        """Groups as extra examples: all codebooks share their levels, so one quantizer does them in one pass."""
        return values.unflatten(1, (-1, len(self.levels))).flatten(0, 1)

    def forward(
        self, inputs: torch.Tensor, input_len: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize, with a straight-through gradient: [B, D, T] -> codes [B, D, T] and tokens [C, B, T]."""
        codes, tokens = self.fsqs[0](self._fold(inputs))
        codes = codes.reshape(inputs.shape)
        tokens = tokens.reshape(inputs.shape[0], self.num_groups, inputs.shape[2])
        return _mask(codes, input_len), _mask(tokens, input_len).transpose(0, 1)

    def encode(self, inputs: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens of encoded frames: [B, D, T] -> [C, B, T]."""
        return self(inputs, input_len)[1]

    def decode(self, indices: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Codes of tokens: [C, B, T] -> [B, D, T]."""
        batch, frames = indices.shape[1:]
        quantizer = self.fsqs[0]
        assert isinstance(quantizer, FiniteScalarQuantizer)
        codes = quantizer.decode(indices.transpose(0, 1).flatten(0, 1)[None])
        return _mask(codes.reshape(batch, self.codebook_dim, frames), input_len)

    def codes_to_indices(self, codes: torch.Tensor, input_len: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens of codes in [-1, 1]: [B, D, T] -> [B, C, T] as int32, zero after each example's end.

        Raises:
            TokensError: for another number of dimensions.
        """
        _check_dimensions(codes, self.codebook_dim)
        quantizer = self.fsqs[0]
        assert isinstance(quantizer, FiniteScalarQuantizer)
        tokens = quantizer.codes_to_indices(self._fold(codes))
        return _mask(tokens.unflatten(0, (codes.shape[0], self.num_groups)), input_len)
