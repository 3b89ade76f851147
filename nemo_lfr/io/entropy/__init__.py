"""Lossless entropy coding of FSQ tokens in integer arithmetic (`.lfr` coding 1)."""
