"""How good a codec is, from pairs of recordings."""
