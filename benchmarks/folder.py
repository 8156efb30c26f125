"""Where a benchmark writes: the folder that the command line names, or a temporary one."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def in_folder(main: Callable[[Path], None]) -> None:
    """Call ``main`` with the folder."""
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
