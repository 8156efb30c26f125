"""Import blocker: with this folder on PYTHONPATH, modules in BLOCKED_MODULES (comma-separated) appear not installed.

Copies of them elsewhere on the path are importable.
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
    """Finder that skips the installed packages for blocked modules."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is None and fullname in BLOCKED:
            path = [folder for folder in sys.path if folder not in INSTALLED]
        return PathFinder.find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
