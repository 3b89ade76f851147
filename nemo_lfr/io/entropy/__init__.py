"""Lossless entropy coding of FSQ tokens with integer arithmetic: coding 1 of `.lfr` files."""
