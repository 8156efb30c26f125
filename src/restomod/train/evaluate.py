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


def evaluate(training: Training, step: int, display: Display) -> None:
    """Log and show the validation loss, if there is a validation split, and the metrics of the run's tasks."""
    config, compute, processes = training.config, training.compute, training.processes
    # Under FSDP every process gathers the whole model to evaluate (2 bytes per block parameter in 16 bits, 4 per other
    # parameter): processes score different numbers of windows and questions, so forward passes that gather weights
    # would not match. Activations and gradients of a training step, which need more memory, are not allocated then.
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
        of = ", ".join(f"{name} {part:.4f}" for name, part in validation.sources.items())
        display.line(f"step {step}  validation loss {validation.loss:.4f}{f' ({of})' if of else ''}", style="bold cyan")
    for loaded in training.data.tasks:
        result = score_task(ScoredGPT(model, compute.dtype), loaded, processes=processes)
        metrics = {name: estimate.value for name, estimate in result.metrics.items()}
        errors = {f"{name}_stderr": estimate.stderr for name, estimate in result.metrics.items()}
        training.run.log(
            "task", step, task=loaded.task.name, examples=len(result.gold), seconds=result.seconds, **metrics, **errors
        )
        display.line(f"step {step}  {loaded.task.name} {headline(loaded, result)}", style="bold cyan")


def write_samples(training: Training, step: int, display: Display) -> None:
    """Log and show one continuation of each prompt."""
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
    """Symptoms in the records of a run in progress; each call reads only new records, in the main process only."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self._records, self._history = NewRecords(training.run.folder / "metrics.jsonl"), History()
        self._gather()  # the records of a resumed run, before the first step

    def print_warnings(self, display: Display) -> None:
        """Show one line for each symptom so far."""
        for symptom in self._symptoms():
            display.line(f"warning: {symptom.symptom}: {symptom.reason}", style="bold yellow")

    def verdict_line(self) -> str:
        """The verdict on the run, in one line."""
        symptoms, folder = [symptom.symptom for symptom in self._symptoms()], self.training.run.folder
        if symptoms:
            return f"verdict: not healthy: {', '.join(symptoms)}; `restomod verdict {folder}` says what to do"
        return f"verdict: healthy; `restomod verdict {folder}` says what was looked for"

    def _symptoms(self) -> list[Finding]:
        if not self.training.processes.main:
            return []
        self._gather()
        return failures(find_symptoms_in_curves(self.training.config, self._history.curves()))

    def _gather(self) -> None:
        if not self.training.processes.main:
            return
        fresh, records = self._records.read()
        if fresh:  # also after a rollback
            self._history = History()
        for record in records:
            self._history.add(record)
