"""Why others are ahead of restomod where they are: what is lost is said with its reason, beside the number."""

from __future__ import annotations

REASONS: dict[tuple[str, str], str] = {
    ("python, doing nothing", "seconds"): "a floor and no rival, the interpreter alone",
    ("python, doing nothing", "peak memory"): "a floor and no rival, the interpreter alone",
    ("torch.save", "load"): (
        "restomod first compares every byte with its SHA-256, which takes most of that time; torch.load does not"
    ),
    ("1 process, one thread each", "peak memory"): "two processes hold buckets of gradients to exchange",
    ("gpt2", "tokens/s"): "Muon and the modern parts compute more for each token, and need fewer tokens",
}
"""By contender and metric; a test fails where a committed measurement has none."""
