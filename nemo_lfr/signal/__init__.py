"""Spectra, signal distances and codebook use, for training and evaluation."""
