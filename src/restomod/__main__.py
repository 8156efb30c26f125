"""`python -m restomod`."""

import sys

from restomod.cli import main

sys.exit(main())
