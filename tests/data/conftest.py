"""Fixtures of the data tests."""

from tests.data.prepare.preparing import restomod

__all__ = ["restomod"]
