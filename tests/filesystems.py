"""File systems that refuse what most allow."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest


def refuse(code: int) -> Callable[..., NoReturn]:
    """What every call of a function ends in."""

    def refused(*_: object, **__: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return refused


def refuse_renaming_folders(patch: pytest.MonkeyPatch, code: int = errno.EPERM) -> None:
    """As some network and union file systems do; files can be renamed."""
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
