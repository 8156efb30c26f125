"""With this folder on PYTHONPATH, installed packages that BLOCKED_MODULES names (with commas) are as if not installed.

Copies of them elsewhere on the path are found.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

BLOCKED = frozenset(os.environ.get("BLOCKED_MODULES", "").split(","))
INSTALLED = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}


class Finder(PathFinder):
    """Looks for blocked modules everywhere but among the installed packages."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is None and fullname in BLOCKED:
            path = [folder for folder in sys.path if folder not in INSTALLED]
        return PathFinder.find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
