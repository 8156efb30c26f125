"""`python -m restomod`, and the command `restomod`."""

import sys

from restomod.output import make_harmless
from restomod.train.signals import stop_with_torchrun


def main() -> int:
    """Run the command line."""
    make_harmless()  # to the very end: of a traceback too
    stop_with_torchrun()  # before what takes seconds to import: torchrun may be killed meanwhile
    from restomod.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
