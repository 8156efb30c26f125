"""Simulated file systems without some operations."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest


def refuse(code: int) -> Callable[..., NoReturn]:
    """Return a function that raises an error in every call."""

    def refused(*_: object, **__: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return refused


def refuse_renaming_folders(patch: pytest.MonkeyPatch, code: int = errno.EPERM) -> None:
    """Simulate a network or union file system that renames files but not folders."""
    rename = os.rename

    def for_files(source: str | Path, target: str | Path, **more: int) -> None:
        if os.path.isdir(source):
            raise OSError(code, os.strerror(code), str(source), None, str(target))
        rename(source, target, **more)

    def of_path(self: Path, target: str | Path) -> Path:
        for_files(self, target)
        return Path(target)

    patch.setattr(os, "rename", for_files)
    patch.setattr(Path, "rename", of_path)
