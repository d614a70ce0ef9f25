"""``python -m core`` is the ``lightning`` command, for where another package claims that name."""

import sys

from core.cli import main

sys.exit(main())
