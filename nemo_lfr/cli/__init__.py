"""Command-line interface `nemo-lfr`."""
