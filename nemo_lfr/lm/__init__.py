"""Arrange codec tokens for language models.

Layouts arrange the tokens of several codebooks in sequences. `unfold` and `fold` convert tokens to one code per FSQ
dimension and back, and `regroup` changes the number of codebooks. All of them accept NumPy arrays or PyTorch tensors,
and return arrays of the same type. Importing this package does not import PyTorch.
"""

from nemo_lfr.lm.codes import fold, regroup, unfold
from nemo_lfr.lm.layouts import DelayLayout, FlatLayout, Layout, StackLayout

__all__ = ["DelayLayout", "FlatLayout", "Layout", "StackLayout", "fold", "regroup", "unfold"]
