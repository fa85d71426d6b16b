"""``colada`` and ``python -m colada``: the command line."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        from colada.cli.main import main as run

        status = run()
    except KeyboardInterrupt:  # before there was anything to interrupt
        print("interrupted", file=sys.stderr)
        status = 130
    # What is left is the interpreter's end, in which an interrupt would be a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


if __name__ == "__main__":
    main()
