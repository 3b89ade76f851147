"""Compress FSQ tokens without loss, by entropy coding in integer arithmetic (`.lfr` coding 1)."""
