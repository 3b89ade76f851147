"""Compress tokens without loss, by entropy coding in integer arithmetic (coding 1 of `.lfr` files)."""
