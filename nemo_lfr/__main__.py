"""Run the command line with `python -m nemo_lfr`."""

from nemo_lfr.cli.main import main

main()
