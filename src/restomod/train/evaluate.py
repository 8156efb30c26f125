"""What is looked at along the way: the validation loss, samples, and whether the run is healthy."""

from __future__ import annotations

from restomod.analysis.health.history import History
from restomod.analysis.health.symptoms import Finding, failures, find_symptoms_in_curves
from restomod.engine.gather import gather_full_model
from restomod.evals.models import ScoredGPT
from restomod.evals.scoring import headline
from restomod.evals.scoring import score_task as evaluate_task
from restomod.evals.validation import dataset_loss
from restomod.generate.text import continuations
from restomod.model.gpt import GPT
from restomod.runs.metrics import NewRecords
from restomod.train.setup import Training
from restomod.utils.console import Display


def evaluate(training: Training, step: int, display: Display) -> None:
    """Log and show the loss on the validation split, if there is one, and how well the run's tasks are done."""
    config, compute, processes = training.config, training.compute, training.processes
    # Under FSDP every process has the whole model while it evaluates (2 bytes of every block parameter in 16 bits, 4 of
    # all others), as each computes windows and questions of its own, and not equally many: with the weights shared out,
    # every forward pass would gather them, and those of all processes had to match. The activations and gradients of a
    # training step, which need more than that, are not there meanwhile.
    model = gather_full_model(training.model, compute.dtype)
    validation = dataset_loss(
        model,
        training.dataset,
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
    for loaded in training.tasks:
        result = evaluate_task(ScoredGPT(model, compute.dtype), loaded, processes=processes)
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
    texts = continuations(model, training.tokenizer, sampling.prompts, 1, sampling, seed, dtype)
    for prompt, (text,) in zip(sampling.prompts, texts, strict=True):
        training.run.log_sample(step, prompt, text)
        display.sample(prompt, text)


class Health:
    """Looks for symptoms in the records of a run while it goes on, reading only those that are new.

    Only the main process does; the others see none.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self._records, self._history = NewRecords(training.run.folder / "metrics.jsonl"), History()
        self._gather()  # what a run that goes on has made already: before its steps, and not among them

    def warn(self, display: Display) -> None:
        """Show what is wrong with the run so far, a line for each symptom."""
        for symptom in self._symptoms():
            display.line(f"warning: {symptom.symptom}: {symptom.reason}", style="bold yellow")

    def verdict_line(self) -> str:
        """Whether the run has been healthy, in one line."""
        failed, folder = [symptom.symptom for symptom in self._symptoms()], self.training.run.folder
        if failed:
            return f"verdict: not healthy: {', '.join(failed)}; `restomod verdict {folder}` says what to do"
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
        if fresh:  # of a run that has gone back to a checkpoint, too
            self._history = History()
        for record in records:
            self._history.add(record)
