"""Why others are ahead of restomod where they are: what is lost is said with its reason, beside the number."""

from __future__ import annotations

REASONS: dict[tuple[str, str], str] = {}
"""By contender and metric; a test fails where a committed measurement has none."""
