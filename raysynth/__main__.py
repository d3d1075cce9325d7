"""`python -m raysynth`, and what the installed command and the jobs call."""

import atexit
import os
import sys
from typing import NoReturn

from raysynth.cli import main


def run(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits with its code.

    The interpreter is not taken apart: threads of several libraries run on in it, and have been
    seen to crash a process whose work was done.

    Args:
        arguments: of the command line; None: those of the process.
    """
    code = main(arguments)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
