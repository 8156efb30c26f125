"""Fixtures that the tests of data share."""

from tests.data.prepare.preparing import restomod

__all__ = ["restomod"]
