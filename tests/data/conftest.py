"""Fixtures that the tests of data share."""

from tests.data.preparing import restomod

__all__ = ["restomod"]
