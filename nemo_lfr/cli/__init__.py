"""The command line, `nemo-lfr`."""
