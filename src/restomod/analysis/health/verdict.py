"""Command `verdict`: health of a run, judged by its metrics, weights and reference loss."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from restomod.analysis.health.dead_layers import find_dead_layers
from restomod.analysis.health.reference_loss import check_reference_loss
from restomod.analysis.health.symptoms import Finding, failures, find_symptoms
from restomod.runs.metrics import iterate_jsonl
from restomod.runs.reader import Run
from restomod.utils.errors import UserError
from restomod.utils.text import counted


@dataclass(frozen=True)
class RunVerdict:
    """Findings of all symptoms of a run."""

    run: str
    """Folder of the run."""
    step: int
    """Number of updates so far."""
    steps: int
    """Number of planned updates."""
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """Whether no finding has the status fail."""
        return not failures(self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON values."""
        return {
            "run": self.run,
            "healthy": self.healthy,
            "step": self.step,
            "steps": self.steps,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def summary(self) -> str:
        """Return the verdict in one line."""
        failed = failures(self.findings)
        unknown = sum(f.status == "unknown" for f in self.findings)
        warnings = sum(f.status == "warning" for f in self.findings)
        parts = [f"{len(self.findings) - unknown} symptoms checked"]
        parts += [counted(warnings, "warning")] if warnings else []
        parts += [f"{unknown} unknown"] if unknown else []
        what = "healthy" if not failed else f"not healthy: {', '.join(f.symptom for f in failed)}"
        return f"{self.run}, step {self.step:,} of {self.steps:,}: {what} ({', '.join(parts)})"


def verdict(run: Run, weights: bool = True) -> RunVerdict:
    """Look for every symptom in a run, finished or in progress.

    Args:
        run: run to judge.
        weights: whether the weights of the newest checkpoint are examined as well.

    Raises:
        UserError: a file of the run is damaged, or no line of its metrics can be read.
    """
    if not run.records:
        damage: list[str] = []
        path = run.folder / "metrics.jsonl"
        if not list(iterate_jsonl(path, damage.append)) and damage:
            raise UserError(f"{path} is damaged: no line can be read, so the run cannot be judged")
    findings = find_symptoms(run.config, run.records, data_lengths(run))
    findings.append(check_reference_loss(run))
    if weights:
        findings.append(find_dead_layers(run))
    return RunVerdict(str(run.folder), run.updates, run.config.steps, findings)


def data_lengths(run: Run) -> dict[str, float]:
    """Return the lengths of an epoch and, with several shards, of the median shard, in steps."""
    split = run.manifest.get("splits", {}).get("train", {})
    shards = [shard["tokens"] for shard in split.get("shards", [])]
    found = {"an epoch": split.get("tokens", 0) / run.config.batch_tokens}
    if len(shards) > 1:
        found["a shard"] = statistics.median(shards) / run.config.batch_tokens
    return {what: steps for what, steps in found.items() if steps > 0}
