"""Evaluation during training: validation loss, tasks, samples, and symptoms of an unhealthy run."""

from __future__ import annotations

from restomod.analysis.health.history import History
from restomod.analysis.health.symptoms import Finding, failures, find_symptoms_in_curves
from restomod.engine.gather import gather_full_model
from restomod.evals.models import ScoredGPT
from restomod.evals.scoring import headline, score_task
from restomod.evals.validation import dataset_loss
from restomod.generate.text import continuations
from restomod.model.gpt import GPT
from restomod.runs.metrics import NewRecords
from restomod.train.setup import Training
from restomod.utils.console import Display
from restomod.utils.text import counted, shell_quoted


def evaluate(training: Training, step: int, display: Display) -> None:
    """Compute, log and print the validation loss and the metrics of the run's tasks.

    Collective: every rank must call this. Without a validation split there is no validation loss.
    """
    config, compute, processes = training.config, training.compute, training.processes
    # Under FSDP every rank gathers the complete model (2 bytes per block parameter in 16 bits, 4 per other parameter):
    # ranks score different numbers of windows and questions, so all-gathers in forward passes would not match.
    # Activations and gradients of a training step need more memory and are not allocated here.
    model = gather_full_model(training.model, compute.dtype)
    validation = dataset_loss(
        model,
        training.data.dataset,
        config.sequence_length,
        compute.device,
        compute.dtype,
        config.eval_tokens,
        processes=processes,
    )
    if validation is not None:
        parts = {"sources": validation.sources} if validation.sources else {}
        training.run.log("val", step, loss=validation.loss, tokens=validation.tokens, **parts)
        by_source = ", ".join(f"{name} {part:.4f}" for name, part in validation.sources.items())
        suffix = f" ({by_source})" if by_source else ""
        display.line(f"step {step}  validation loss {validation.loss:.4f}{suffix}", style="bold cyan")
    for loaded in training.data.tasks:
        result = score_task(ScoredGPT(model, compute.dtype), loaded, processes=processes)
        metrics = {name: estimate.value for name, estimate in result.metrics.items()}
        errors = {f"{name}_stderr": estimate.stderr for name, estimate in result.metrics.items()}
        training.run.log(
            "task", step, task=loaded.task.name, examples=len(result.gold), seconds=result.seconds, **metrics, **errors
        )
        display.line(f"step {step}  {loaded.task.name} {headline(loaded, result)}", style="bold cyan")


def write_samples(training: Training, step: int, display: Display) -> None:
    """Generate, log and print one continuation of each prompt.

    Collective: every rank must call this.
    """
    model = gather_full_model(training.model, training.compute.dtype, keep=training.processes.main)
    training.processes.from_main(lambda: _sample(training, model, step, display))


def _sample(training: Training, model: GPT, step: int, display: Display) -> None:
    sampling, dtype = training.config.sampling, training.compute.dtype
    display.line(f"step {step}  samples", style="bold cyan")
    seed = training.config.seed + step
    texts = continuations(model, training.data.tokenizer, sampling.prompts, 1, sampling, seed, dtype)
    for prompt, (text,) in zip(sampling.prompts, texts, strict=True):
        training.run.log_sample(step, prompt, text)
        display.sample(prompt, text)


class Health:
    """Detector of symptoms of an unhealthy run in progress.

    Each call reads only the new records of `metrics.jsonl`, and only in the main process.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self._records, self._history = NewRecords(training.run.folder / "metrics.jsonl"), History()
        self._gather()  # records from before a resumption

    def print_warnings(self, display: Display) -> None:
        """Print a warning for each symptom seen so far."""
        for symptom in failures(self._findings()):
            display.warn(f"{symptom.symptom}: {symptom.reason}")

    def verdict(self) -> str:
        """Return the verdict on the run in one line: healthy or not, with the names of the symptoms."""
        findings = self._findings()
        symptoms = ", ".join(finding.symptom for finding in failures(findings))
        judged, total = sum(finding.status != "unknown" for finding in findings), len(findings)
        checked = counted(total, "symptom") if judged == total else f"{judged} of {counted(total, 'symptom')}"
        details = f"details: restomod verdict {shell_quoted(str(self.training.run.folder))}"
        return f"not healthy: {symptoms} ({details})" if symptoms else f"healthy ({checked} checked; {details})"

    def _findings(self) -> list[Finding]:
        if not self.training.processes.main:
            return []
        self._gather()
        return find_symptoms_in_curves(self.training.config, self._history.curves())

    def _gather(self) -> None:
        if not self.training.processes.main:
            return
        fresh, records = self._records.read()
        if fresh:  # first call, or the file was rewritten by a rollback
            self._history = History()
        for record in records:
            self._history.add(record)
