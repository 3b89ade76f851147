"""Measurements on audio and tokens that training and evaluation share: spectra, distances, codebook use."""
