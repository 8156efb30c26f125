"""Number of examples of property tests."""

from __future__ import annotations

from hypothesis import settings

USUAL = 50  # default of a test


def examples(n: int) -> settings:
    """Return a decorator for ``n`` examples, multiplied by the profile's factor (`make fuzz`)."""
    return settings(max_examples=n * settings.default.max_examples // USUAL)
