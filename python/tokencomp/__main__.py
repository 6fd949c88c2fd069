"""``python -m tokencomp``, and the command ``tokencomp`` that an installation brings."""

import os
import sys

from tokencomp.cli import main


def run() -> int:
    """Ends quietly where the reader of the output has gone, as with ``| head``."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(run())
