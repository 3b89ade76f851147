"""python -m nemo_lfr"""

from nemo_lfr.cli import main

main()
