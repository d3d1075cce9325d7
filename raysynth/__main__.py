"""`python -m raysynth`, and what the installed command calls."""

import sys

from raysynth.cli import main


def run() -> None:
    """Runs the command line and exits with its code."""
    sys.exit(main())


if __name__ == "__main__":
    run()
