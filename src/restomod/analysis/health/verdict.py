"""Command `verdict`: the health of a run, from its metrics, weights and reference loss."""

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
    """Findings about a run."""

    run: str
    step: int
    """Updates so far."""
    steps: int
    """Updates planned."""
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """Whether no symptom failed."""
        return not failures(self.findings)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "run": self.run,
            "healthy": self.healthy,
            "step": self.step,
            "steps": self.steps,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def summary(self) -> str:
        """One line."""
        failed = failures(self.findings)
        unknown = sum(f.status == "unknown" for f in self.findings)
        warnings = sum(f.status == "warning" for f in self.findings)
        parts = [f"{len(self.findings) - unknown} symptoms checked"]
        parts += [counted(warnings, "warning")] if warnings else []
        parts += [f"{unknown} cannot be judged"] if unknown else []
        what = "healthy" if not failed else f"not healthy: {', '.join(f.symptom for f in failed)}"
        return f"{self.run}, step {self.step:,} of {self.steps:,}: {what} ({', '.join(parts)})"


def verdict(run: Run, weights: bool = True) -> RunVerdict:
    """Look for every symptom of a run, finished or not; with ``weights`` in its newest checkpoint too.

    Raises:
        UserError: a file of the run is damaged, or no line of its records can be read.
    """
    if not run.records:
        damage: list[str] = []
        path = run.folder / "metrics.jsonl"
        if not list(iterate_jsonl(path, damage.append)) and damage:
            raise UserError(f"{path} is damaged: no line of it can be read, so the run cannot be judged")
    findings = find_symptoms(run.config, run.records, data_lengths(run))
    findings.append(check_reference_loss(run))
    if weights:
        findings.append(find_dead_layers(run))
    return RunVerdict(str(run.folder), run.updates, run.config.steps, findings)


def data_lengths(run: Run) -> dict[str, float]:
    """Steps after which the training data comes to the end of an epoch, and of a shard, if there are several."""
    split = run.manifest.get("splits", {}).get("train", {})
    shards = [shard["tokens"] for shard in split.get("shards", [])]
    found = {"an epoch": split.get("tokens", 0) / run.config.batch_tokens}
    if len(shards) > 1:
        found["a shard"] = statistics.median(shards) / run.config.batch_tokens
    return {what: steps for what, steps in found.items() if steps > 0}
