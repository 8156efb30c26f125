"""Result of one check of a model or a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CheckStatus = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True)
class CheckResult:
    """What a check found."""

    check: str
    status: CheckStatus
    """fail: this is no GPT-2 that can learn. warn: unusual, or slow. skip: does not apply, or cannot run here."""
    reason: str
