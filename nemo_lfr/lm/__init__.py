"""Codec tokens for language models.

The package provides sequence layouts, per-dimension codes and regrouping. All functions accept NumPy arrays and
PyTorch tensors, and return the type of their input. Importing this package does not import PyTorch.
"""

from nemo_lfr.lm.codes import fold, regroup, unfold
from nemo_lfr.lm.layouts import DelayLayout, FlatLayout, Layout, StackLayout

__all__ = ["DelayLayout", "FlatLayout", "Layout", "StackLayout", "fold", "regroup", "unfold"]
