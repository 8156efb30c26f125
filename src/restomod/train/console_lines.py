"""Console lines at the head and at the end of a run: its settings, warnings, sanity checks, results, next steps."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

import torch

from restomod.config.run import RunConfig
from restomod.data.read_counts import summary_rows
from restomod.engine.device import describe_device, dtype_name
from restomod.engine.lr_schedule import describe_warmup, schedule_warnings
from restomod.model.flops import parameter_count
from restomod.model.hf_format import describe_shape
from restomod.runs.metrics import read_jsonl
from restomod.train.setup import Training
from restomod.utils.console import CheckResult
from restomod.utils.run_files import step_of
from restomod.utils.text import counted, duration


def run_summary(training: Training) -> list[tuple[str, str]]:
    """The table before the first step, as (name, value) rows."""
    config, compute, dataset = training.config, training.compute, training.data.dataset
    manifest, train, val = dataset.manifest, len(dataset.train), len(dataset.val)
    processes = training.processes.world_size
    accumulation = config.batch_sequences // compute.micro_batch // processes
    seconds = training.micro_batch_seconds * accumulation * (config.steps - training.start.step)
    epochs = {name: config.steps * n for name, n in _epochs_per_step(training).items()}
    in_epochs = ", ".join(f"{n:.2g} epochs" + (f" of {name}" if len(epochs) > 1 else "") for name, n in epochs.items())
    split = f"{train:,} for training, {val:,} for validation" if val else "all for training, none for validation"
    count = manifest["documents"]  # unknown for published shards
    documents = f" in {counted(count, 'document')}" if count is not None else ""
    return [
        ("run", str(training.run.folder)),
        ("model", describe_shape(config.model)),
        (
            "parameters",
            f"{parameter_count(config.model):,}, " + (f"from {config.init}" if config.init else "random at the start"),
        ),
        ("data", f"{manifest['name']}: {manifest['tokens']:,} tokens{documents}; {split}"),
        *summary_rows(manifest),
        ("batch", describe_batch(config, compute.micro_batch, processes)),
        ("steps", f"{config.steps:,} ({config.steps * config.batch_tokens:,} tokens, {in_epochs})"),
        ("warm-up", describe_warmup(config)),
        ("device", describe_device(compute.device)),
        ("compute dtype", describe_dtype(config, compute.dtype)),
        ("torch.compile", f"{'on' if compute.compiled else 'off'} ({compute.compile_reason})"),
        ("estimated time", f"{duration(seconds)} for the steps alone, from timing one micro-batch"),
    ]


def describe_batch(config: RunConfig, micro_batch: int, processes: int) -> str:
    """``512 tokens = gradient accumulation 1 × micro-batch 2 × sequence length 256``."""
    among = f"{processes} processes × " if processes > 1 else ""
    accumulation = config.batch_sequences // micro_batch // processes
    chosen = "" if config.micro_batch else " (chosen automatically)"
    return (
        f"{config.batch_tokens:,} tokens = {among}gradient accumulation {accumulation} × "
        f"micro-batch {micro_batch}{chosen} × sequence length {config.sequence_length}"
    )


def describe_dtype(config: RunConfig, dtype: torch.dtype) -> str:
    """``bf16, fp32 weights, bf16 residual stream``."""
    residual = ", bf16 residual stream" if config.residual_dtype == "bf16" else ""
    return f"{dtype_name(dtype)}, fp32 weights{residual}"


def length_warnings(training: Training) -> list[str]:
    """Warnings about the length of a run, its schedule and its data."""
    found = schedule_warnings(training.config)
    for name, epochs in _epochs_per_step(training).items():
        if epochs > 1:
            found.append(f"a step trains on all of {name} {epochs:,.3g} times; lower --batch-tokens or add text")
    return found


def _epochs_per_step(training: Training) -> dict[str, float]:
    """How much of the training text of each source one step takes, in epochs."""
    sources = zip(training.data.dataset.sources, training.data.batches.source_windows, strict=True)
    return {s.name: training.config.batch_sequences * float(s.share) / n for s, n in sources}


def check_lines(results: list[CheckResult]) -> list[str]:
    """The sanity checks in a few lines: the first in full, the names of others that passed, and warnings."""
    if not results:
        return []
    first, *others = results
    passed = [result.check for result in others if result.status == "pass"]
    return [
        *([f"{first.check} {first.reason}"] if first.status == "pass" else []),
        *([f"also checked: {', '.join(passed)}"] if passed else []),
        *(f"warning: {result.check}: {result.reason}" for result in results if result.status == "warn"),
    ]


def closing_lines(
    folder: Path, checkpoints: list[Path], seconds: float, finished: bool, exportable: bool = True
) -> list[str]:
    """The end of a run: first and final losses, where it is, and what to do next, from the files in its folder.

    ``checkpoints`` holds the newest, or none; `transformers` loads it if it is ``exportable``.
    """
    run = quote(str(folder))
    records = read_jsonl(folder / "metrics.jsonl")
    made = max((r["step"] + 1 for r in records if r["kind"] == "train"), default=0)
    saved = step_of(checkpoints[-1]) if checkpoints else 0
    if not finished:
        resume = f"resume with: restomod train --resume {run}"
        if not checkpoints:
            return [f"stopped after {made} steps without a checkpoint, so they will be repeated; {resume}"]
        if saved < made:
            repeated = f"the newest checkpoint is that of step {saved}, and the steps after it will be repeated"
            return [f"stopped after {made} steps; {repeated}; {resume}"]
        return [f"stopped with the checkpoint of step {saved}; {resume}"]
    lines = [f"finished in {duration(seconds)}"]
    for kind, name in (("train", "training loss"), ("val", "validation loss")):
        losses = [r["loss"] for r in records if r.get("kind") == kind and r.get("loss") is not None]
        if losses:
            lines.append(f"  {name:<15}  {losses[0]:.4f} at the start, {losses[-1]:.4f} at the end")
    if not checkpoints or saved < made:
        newest = f"the newest is that of step {saved}" if checkpoints else "there is none"
        lines.append(f"warning: the checkpoint of step {made} could not be saved; {newest}")
    return [
        *lines,
        f"everything is in {folder}; next:",
        f'  restomod sample {run} --prompt "..."      # generate text',
        f"  restomod train --resume {run} --steps N   # continue training to step N",
        *(
            f"  AutoModelForCausalLM.from_pretrained({str(path)!r})   # use it elsewhere"
            if exportable
            else "not exportable: only restomod loads this model, because transformers has no class with these parts"
            for path in checkpoints
        ),
    ]
