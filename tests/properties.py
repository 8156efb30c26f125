"""How many examples a property test tries."""

from __future__ import annotations

from hypothesis import settings

USUAL = 50  # where a test does not say


def examples(n: int) -> settings:
    """A decorator: ``n`` examples, and as many times more as the profile asks for (`make fuzz`)."""
    return settings(max_examples=n * settings.default.max_examples // USUAL)
