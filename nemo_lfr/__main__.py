"""Run the command line with `nemo-lfr` or `python -m nemo_lfr`."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C exits with 130, even while the command's modules are being imported."""
    try:
        from nemo_lfr.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
