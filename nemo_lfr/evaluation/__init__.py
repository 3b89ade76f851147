"""How good a codec is, from pairs of recordings."""

# What `--codec` takes; here, where the command line reads it without importing the codecs.
CODECS = (
    "lfr (the bundled codec), lfr:FILE_OR_HUB_ID, nemo:FILE, opus:KBIT, codec2:BIT, encodec:KBIT, dac:CODEBOOKS, "
    "mimi:CODEBOOKS, original"
)
