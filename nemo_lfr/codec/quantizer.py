"""Encoded -> codes -> tokens, and back: finite scalar quantization (Mentzer et al., arXiv 2309.15505).

Each dimension is squashed to an odd or even number of levels and rounded; the levels of a group of dimensions, read
as a mixed-radix number with the first dimension as the lowest digit, are one token. The arithmetic and the state-dict
keys are those of NeMo's classes of the same names; it always runs in fp32, because tokens depend on it.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from nemo_lfr.errors import ConfigError


def _mask(values: torch.Tensor, length: torch.Tensor | None) -> torch.Tensor:
    """Zero what lies after each example's length: values [B, ..., T], length [B]."""
    if length is None or bool((length == values.shape[-1]).all()):
        return values
    valid = torch.arange(values.shape[-1], device=values.device) < length.to(values.device)[:, None]
    return values * valid.reshape(valid.shape[0], *[1] * (values.dim() - 2), -1)


class FiniteScalarQuantizer(nn.Module):
    """One codebook: D dimensions with `num_levels` each.

    Args:
        num_levels: levels of each dimension, each at least 2.
        eps: the squashed range stops this share short of the outermost levels.

    Raises:
        ConfigError: for fewer levels, or more codes than an int32 token can tell.
    """

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
    def output_types(self) -> dict[str, None]:
        """The names of `forward`'s results; NeMo's model reads the keys to see that there is no commit loss."""
        return dict.fromkeys(("dequantized", "indices"))

    def compress(self, encoded: torch.Tensor) -> torch.Tensor:
        """Squash [B, D, T] into the range of the levels, so that rounding gives one of them."""
        half_range = (self.num_levels - 1) / 2 * (1 - self.eps)
        offset = (self.num_levels % 2 == 0) * 0.5  # not torch.where: its scalars stand in a CUDA graph's way
        # tan, not atanh: released checkpoints were trained with it, and token ids depend on it.
        shift = (offset / half_range).tan()
        return half_range * (encoded + shift).tanh() - offset

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
            compressed = self.compress(inputs.float())
            rounded = compressed + (compressed.round() - compressed).detach()
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
        middle = self.num_levels // 2
        return _mask((digits - middle) / middle, input_len)


class GroupFiniteScalarQuantizer(nn.Module):
    """`num_groups` codebooks with the same levels, each for its own share of the dimensions.

    Args:
        num_groups: C, the number of codebooks.
        num_levels_per_group: levels of each dimension of one codebook.
        eps: see `FiniteScalarQuantizer`.
    """

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

    @property
    def output_types(self) -> dict[str, None]:
        return dict.fromkeys(("dequantized", "indices"))

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
