"""Codec tokens for language models: sequence layouts, per-dimension codes and regrouping.

Everything works on NumPy arrays and PyTorch tensors alike and returns what it was called with; importing this package
does not import PyTorch.
"""

from nemo_lfr.lm.codes import fold, regroup, unfold
from nemo_lfr.lm.layouts import DelayLayout, FlatLayout, Layout, StackLayout

__all__ = ["DelayLayout", "FlatLayout", "Layout", "StackLayout", "fold", "regroup", "unfold"]
