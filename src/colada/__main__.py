"""``python -m colada`` is the command line."""

import sys

from colada.cli import main

sys.exit(main())
