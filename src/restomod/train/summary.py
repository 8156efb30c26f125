"""The table and the warnings that a run prints before its first step."""

from __future__ import annotations

from restomod.data.read_counts import summary_rows
from restomod.engine.device import describe_device, dtype_name
from restomod.engine.lr_schedule import describe_warmup, schedule_warnings
from restomod.model.flops import parameter_count
from restomod.model.hf_format import describe_shape
from restomod.train.setup import Training
from restomod.utils.text import counted, duration


def length_warnings(training: Training) -> list[str]:
    """Warnings about the length of a run, its schedule and its data."""
    found = schedule_warnings(training.config)
    for name, passes in _passes_per_step(training).items():
        if passes > 1:
            found.append(f"a step trains on all of {name} {passes:,.3g} times; lower --batch-tokens or add text")
    return found


def _passes_per_step(training: Training) -> dict[str, float]:
    """How often one step goes through the training text of each source."""
    sources = zip(training.dataset.sources, training.batches.source_windows, strict=True)
    return {s.name: training.config.batch_sequences * float(s.share) / n for s, n in sources}


def run_summary(training: Training) -> list[tuple[str, str]]:
    """The table that is printed before the first step, as (name, value) rows."""
    config, m, compute, manifest = (
        training.config,
        training.config.model,
        training.compute,
        training.dataset.manifest,
    )
    train, val = len(training.dataset.train), len(training.dataset.val)
    processes = training.processes.world_size
    accumulation = config.batch_sequences // compute.micro_batch // processes
    seconds = training.micro_batch_seconds * accumulation * (config.steps - training.first_step)
    epochs = {name: config.steps * passes for name, passes in _passes_per_step(training).items()}
    in_epochs = ", ".join(f"{n:.2g} epochs" + (f" of {name}" if len(epochs) > 1 else "") for name, n in epochs.items())
    precision = f"{dtype_name(compute.dtype)} products, fp32 weights"
    split = f"{train:,} for training, {val:,} for validation" if val else "all for training, none for validation"
    count = manifest["documents"]  # not known of published shards
    documents = f" in {counted(count, 'document')}" if count is not None else ""
    return [
        ("run", str(training.run.folder)),
        ("model", describe_shape(m)),
        ("parameters", f"{parameter_count(m):,}, " + (f"from {config.init}" if config.init else "random at the start")),
        ("data", f"{manifest['name']}: {manifest['tokens']:,} tokens{documents}; {split}"),
        *summary_rows(manifest),
        (
            "tokens per step",
            f"{config.batch_tokens:,} = {f'{processes} processes × ' if processes > 1 else ''}"
            f"{accumulation} × {compute.micro_batch} sequences × {config.sequence_length} tokens",
        ),
        ("steps", f"{config.steps:,} ({config.steps * config.batch_tokens:,} tokens, {in_epochs})"),
        ("warm-up", describe_warmup(config)),
        ("device", describe_device(compute.device)),
        ("precision", precision + (", bf16 residual stream" if config.residual_dtype == "bf16" else "")),
        ("torch.compile", f"{'on' if compute.compiled else 'off'} ({compute.compile_reason})"),
        ("estimated time", f"{duration(seconds)} for the steps alone, from timing one micro-batch"),
    ]
