"""Console output at the start and at the end of a run: settings, warnings, sanity checks, results, next commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from restomod.config.run import OptimConfig, RunConfig
from restomod.data.read_counts import summary_rows
from restomod.engine.device import describe_device, dtype_name
from restomod.engine.lr_schedule import describe_warmup, schedule_warnings
from restomod.model.flops import parameter_count
from restomod.model.hf_format import describe_shape
from restomod.runs.metrics import Record
from restomod.train.setup import Training
from restomod.utils.console import CheckResult
from restomod.utils.run_files import step_of
from restomod.utils.text import counted, duration, shell_quoted

Rows = list[tuple[str, str]]
LONG_RUN_DAYS = 30  # a longer run causes a warning


def run_summary(training: Training) -> Rows:
    """Return the settings of a run as (label, value) rows, to be printed before the first step."""
    config, compute, dataset = training.config, training.compute, training.data.dataset
    manifest, train, val = dataset.manifest, len(dataset.train), len(dataset.val)
    processes = training.processes.world_size
    epochs = {name: config.steps * n for name, n in _epochs_per_step(training).items()}
    in_epochs = ", ".join(f"{n:.2g} epochs" + (f" of {name}" if len(epochs) > 1 else "") for name, n in epochs.items())
    count = manifest["documents"]  # None for published shards
    documents = f", {counted(count, 'document')}" if count is not None else ""
    initial = f"initialised from {config.init}" if config.init else "random initialisation"
    options, seconds = describe_options(config, processes), estimated_seconds(training)
    return [
        ("run", str(training.run.folder)),
        ("model", f"{describe_shape(config.model)}; {parameter_count(config.model):,} parameters, {initial}"),
        ("data", f"{manifest['name']} ({manifest['tokens']:,} tokens{documents})"),
        *(row for row in summary_rows(manifest) if row[0] != "warning"),
        ("split", f"{train:,} training tokens, " + (f"{val:,} validation tokens" if val else "no validation split")),
        ("batch", describe_batch(config, compute.micro_batch, processes)),
        ("steps", f"{config.steps:,} ({config.steps * config.batch_tokens:,} tokens, {in_epochs})"),
        ("optimizer", describe_optimizer(config.optim)),
        ("learning rate", f"warm-up {describe_warmup(config)}"),
        ("device", describe_device(compute.device)),
        ("compute dtype", describe_dtype(config, compute.dtype)),
        ("torch.compile", f"{'on' if compute.compiled else 'off'} ({compute.compile_reason})"),
        *([("options", options)] if options else []),
        *check_rows(training.check_results),
        ("estimated time", f"{duration(seconds)} (training steps only, from one timed micro-batch)"),
    ]


def estimated_seconds(training: Training) -> float:
    """Return the estimated time of the remaining training steps, in seconds."""
    config = training.config
    accumulation = config.batch_sequences // training.compute.micro_batch // training.processes.world_size
    return training.micro_batch_seconds * accumulation * (config.steps - training.start.step)


def describe_batch(config: RunConfig, micro_batch: int, processes: int) -> str:
    """Describe a batch: ``512 tokens = gradient accumulation 1 × micro-batch 2 × sequence length 256``."""
    among = f"{processes} processes × " if processes > 1 else ""
    accumulation = config.batch_sequences // micro_batch // processes
    chosen = "" if config.micro_batch else " (automatic)"
    return (
        f"{config.batch_tokens:,} tokens = {among}gradient accumulation {accumulation} × "
        f"micro-batch {micro_batch}{chosen} × sequence length {config.sequence_length}"
    )


def describe_optimizer(optim: OptimConfig) -> str:
    """Describe an optimizer: ``AdamW (betas 0.9 and 0.95, weight decay 0.1), gradient clipping 1``."""
    adamw = f"AdamW (betas {optim.betas[0]:g} and {optim.betas[1]:g}, weight decay {optim.weight_decay:g})"
    if optim.optimizer == "muon":
        muon = f"Muon (momentum {optim.muon_momentum:g}, weight decay {optim.muon_weight_decay:g})"
        adamw = f"{muon} for matrices, {adamw} for other parameters"
    return f"{adamw}, gradient clipping {optim.grad_clip:g}"


def describe_dtype(config: RunConfig, dtype: torch.dtype) -> str:
    """Describe the precision: ``bf16 (mixed precision, fp32 weights), bf16 residual stream``."""
    mixed = " (mixed precision, fp32 weights)" if dtype != torch.float32 else ""
    residual = ", bf16 residual stream" if config.residual_dtype == "bf16" else ""
    return f"{dtype_name(dtype)}{mixed}{residual}"


def describe_options(config: RunConfig, processes: int) -> str:
    """List settings that change the computation and are off by default; "" if there are none."""
    used = {
        config.parallel.upper(): processes > 1,
        "gradient checkpointing": config.gradient_checkpointing,
        "document mask": config.document_mask,
        "deterministic kernels": config.deterministic,
    }
    return ", ".join(name for name, on in used.items() if on)


def run_warnings(training: Training) -> list[str]:
    """Return warnings about a run's files, data, schedule, checks and batch, without the prefix "warning: "."""
    found = [*training.warnings]
    found += [text for label, text in summary_rows(training.data.dataset.manifest) if label == "warning"]
    found += schedule_warnings(training.config)
    found += [f"{result.check}: {result.reason}" for result in training.check_results if result.status == "warn"]
    days = estimated_seconds(training) / 86_400
    if days > LONG_RUN_DAYS:
        found.append(f"the run takes about {days:,.0f} days here; use a GPU, fewer --steps or a smaller preset")
    for name, epochs in _epochs_per_step(training).items():
        if epochs > 1:
            found.append(f"each step trains on {epochs:,.3g} epochs of {name}; lower --batch-tokens or add text")
    return found


def _epochs_per_step(training: Training) -> dict[str, float]:
    """Return the part of each source's training windows that one step uses, in epochs."""
    sources = zip(training.data.dataset.sources, training.data.batches.source_windows, strict=True)
    return {s.name: training.config.batch_sequences * float(s.share) / n for s, n in sources}


def check_rows(results: list[CheckResult]) -> Rows:
    """Return the sanity checks that passed as (label, value) rows: the first in full, the names of the others."""
    first, others = results[:1], results[1:]
    passed = [result.check for result in others if result.status == "pass"]
    return [
        *((result.check, result.reason) for result in first if result.status == "pass"),
        *([("sanity checks", f"passed: {', '.join(passed)}")] if passed else []),
    ]


def stop_line(folder: Path, checkpoints: list[Path], records: list[Record]) -> str:
    """Return the last line of a run that a signal stopped: steps done, newest checkpoint, command to resume.

    Args:
        folder: folder of the run.
        checkpoints: the newest checkpoint, or an empty list.
        records: all records of `metrics.jsonl`.
    """
    done, saved = _steps_done(records), step_of(checkpoints[-1]) if checkpoints else 0
    resume = f"resume with: restomod train --resume {shell_quoted(str(folder))}"
    if not checkpoints:
        return f"stopped after {counted(done, 'step')} without a checkpoint (all steps will be repeated); {resume}"
    if saved < done:
        return (
            f"stopped after {counted(done, 'step')}, newest checkpoint: step {saved} (later steps will be repeated); "
            f"{resume}"
        )
    return f"stopped after {counted(done, 'step')}, checkpoint saved; {resume}"


def result_rows(
    config: RunConfig,
    checkpoints: list[Path],
    records: list[Record],
    seconds: float,
    verdict: str,
    exportable: bool = True,
) -> Rows:
    """Return the results of a finished run as (label, value) rows.

    Args:
        config: run configuration.
        checkpoints: the newest checkpoint, or an empty list.
        records: all records of `metrics.jsonl`.
        seconds: wall-clock time since this process started or resumed training.
        verdict: verdict on the run, in one line.
        exportable: whether `transformers` loads the checkpoint.
    """
    rows = []
    for kind, label in (("val", "validation loss"), ("train", "training loss")):
        found = [(r["loss"], r["step"]) for r in records if r["kind"] == kind and r.get("loss") is not None]
        if found:
            best, at = min(found)
            lowest = f" (best {best:.4f} at step {at})" if kind == "val" else ""
            rows.append((label, f"{found[0][0]:.4f} → {found[-1][0]:.4f} nats{lowest}"))
    done = _steps_done(records)
    timed = [r["ms"] / 1000 for r in records if r["kind"] == "train" and r.get("ms")]
    speed = f", {len(timed) * config.batch_tokens / sum(timed):,.0f} tokens/s" if timed else ""
    rows.append(("tokens", f"{done * config.batch_tokens:,} in {counted(done, 'step')}{speed}"))
    rows.append(("time", f"{duration(seconds)} (with validation, samples and checkpoints)"))
    loader = "loads in transformers" if exportable else "restomod only: transformers lacks this architecture"
    rows += [("checkpoint", f"{path} ({loader})") for path in checkpoints]
    return [*rows, ("verdict", verdict)]


def missing_checkpoint(checkpoints: list[Path], records: list[Record]) -> list[str]:
    """Return a warning if the last step of a finished run has no checkpoint.

    Args:
        checkpoints: the newest checkpoint, or an empty list.
        records: all records of `metrics.jsonl`.
    """
    done, saved = _steps_done(records), step_of(checkpoints[-1]) if checkpoints else 0
    if checkpoints and saved >= done:
        return []
    newest = f"the newest is that of step {saved}" if checkpoints else "there is no checkpoint"
    return [f"the checkpoint of step {done} could not be saved; {newest}"]


def next_commands(folder: Path, config: RunConfig) -> list[str]:
    """Return commands for a finished run, quoted for the shell, with labels."""
    run = shell_quoted(str(folder))
    prompt = next((f" --prompt {shell_quoted(prompt)}" for prompt in config.sampling.prompts if prompt.strip()), "")
    commands = {
        "generate text": f"restomod sample {run}{prompt}",
        "plot the run": f"restomod report {run}",
        "train longer": f"restomod train --resume {run} --steps {2 * config.steps}",
    }
    return ["next:", *(f"  {label:<13}  {command}" for label, command in commands.items())]


def _steps_done(records: list[Record]) -> int:
    """Return the number of training steps on record."""
    steps: list[Any] = [r["step"] + 1 for r in records if r["kind"] == "train"]
    return max(steps, default=0)
