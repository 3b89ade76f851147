"""Evaluation of codecs with objective metrics, and reports of the results."""

# Accepted values of `--codec`. Defined here so that the command line need not import the codecs.
CODECS = (
    "lfr (the bundled codec), lfr:FILE_OR_HUB_ID, nemo:FILE, opus:KBIT, codec2:BIT, encodec:KBIT, dac:CODEBOOKS, "
    "mimi:CODEBOOKS, original"
)
