"""Command `bench step`, which measures the training step of a run without writing a run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from restomod.bench.measure import Steps, measure
from restomod.bench.report import Report
from restomod.config.model import VOCAB_SIZE
from restomod.config.run import RunConfig
from restomod.data.batches import Batches, Prefetch
from restomod.data.dataset import TokenStream
from restomod.data.prepare.text_cache import prepare_text
from restomod.data.tokenizer import gpt2_tokenizer
from restomod.engine.device import choose_device, describe_device, dtype_name
from restomod.engine.distributed import Processes, join_processes
from restomod.engine.micro_batch import Say, choose_micro_batch, first_micro_batch
from restomod.model.flops import parameter_count, peak_flops
from restomod.model.hf_format import describe_shape
from restomod.runs.folder import environment
from restomod.train.console_lines import describe_batch, describe_dtype
from restomod.train.setup import choose_compute, initial_model, make_ready, training_batches
from restomod.utils.console import Display
from restomod.utils.errors import UserError, is_out_of_memory, one_line
from restomod.utils.files import write_bytes_atomically, write_json_atomically
from restomod.utils.output_files import Output, require_outputs, write_outputs
from restomod.utils.text import duration

SYNTHETIC_TOKENS = 2**20


def bench_step(
    config: RunConfig,
    preset: str,
    tokens: str,
    warmup: int,
    timed: int,
    json: str | None = None,
    trace: str | None = None,
    display: Display | None = None,
) -> int:
    """Measure the training step of a run and print the results.

    Args:
        config: run configuration.
        preset: name of the preset.
        tokens: "synthetic" for random tokens, "real" for the tokens of ``config.data``.
        warmup: number of steps before the first timed step.
        timed: number of steps timed as a whole; the same number is timed by phase.
        json: file for the results; None to write no file.
        trace: file for a Chrome trace of one step; None to write no file.
        display: console; None for a new one.

    Returns:
        Exit code, always 0.

    Raises:
        UserError: the device, the data or an output file is unusable, or memory is insufficient.
    """
    with join_processes() as processes, _memory_errors():
        display = display or Display(muted=not processes.main)
        files = {flag: None if name is None else Path(name) for flag, name in (("--json", json), ("--trace", trace))}
        processes.run_on_all_ranks(lambda: require_outputs(files))
        report, traced = _bench(config, preset, tokens, warmup, timed, trace is not None, display, processes)
        if not processes.main:
            return 0
        display.line("")
        display.table(report.rows())
        writes = {
            "--json": lambda path: write_json_atomically(path, report.to_dict()),
            "--trace": lambda path: write_bytes_atomically(path, traced),
        }
        outputs = [Output(path, writes[flag]) for flag, path in files.items() if path is not None]
        write_outputs(outputs, display.line)
        display.require_printed()
    return 0


def measure_micro_batches(config: RunConfig, preset: str, timed: int, display: Display) -> Report:
    """Measure steps of at most two micro-batches with random tokens, in this process only.

    Args:
        config: run configuration.
        preset: name of the preset.
        timed: number of steps timed as a whole; the same number is timed by phase.
        display: console.

    Raises:
        UserError: the device is unusable or memory is insufficient.
    """
    with _memory_errors():
        micro_batch = choose_micro_batch(config, choose_device(config.device))
        count = min(2, config.batch_sequences // micro_batch)
        part = dataclasses.replace(config, batch_tokens=count * micro_batch * config.sequence_length)
        return _bench(part, preset, "synthetic", 1, timed, False, display, Processes())[0]


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Turn out-of-memory errors into a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if is_out_of_memory(e):
            raise UserError(f"out of memory ({one_line(e):.120}); lower --micro-batch") from e
        raise


def _bench(
    config: RunConfig,
    preset: str,
    tokens: str,
    warmup: int,
    timed: int,
    trace: bool,
    display: Display,
    processes: Processes,
) -> tuple[Report, bytes]:
    """Return the report and, if ``trace``, the Chrome trace of one more step."""
    count = warmup + 2 * timed + 1  # the last step is traced
    config = dataclasses.replace(config, steps=max(config.steps, count))
    display.line("preparing the data and the model …", style="dim")
    steps, seconds = processes.run_on_all_ranks(lambda: _steps(config, tokens, count, processes, display.line))
    accumulation = config.batch_sequences // steps.compute.micro_batch // processes.world_size
    display.table(_head(steps, preset, tokens, warmup, timed, accumulation, seconds))
    with steps.data:
        timings = measure(steps, warmup, timed)
        traced = steps.traced(count - 1) if trace else b""
    device = describe_device(steps.compute.device)
    peak = peak_flops(device)
    report = Report(
        preset,
        config,
        tokens,
        steps.compute.micro_batch,
        warmup,
        timings,
        environment(device, dtype_name(steps.compute.dtype)) | {"processes": processes.world_size},
        steps.compute.device.type,
        None if peak is None else peak * processes.world_size,
    )
    return report, traced


def _steps(config: RunConfig, tokens: str, count: int, processes: Processes, say: Say) -> tuple[Steps, float]:
    """Set up the training steps as training does, and return them with the seconds of one micro-batch."""
    compute = choose_compute(config, processes)
    if tokens == "real":
        tokenizer = gpt2_tokenizer()
        dataset = processes.run_on_all_ranks(lambda: prepare_text(config.data), one_first=True)
        batches = training_batches(config, dataset, tokenizer)
    else:
        stream = synthetic_tokens(config.model.vocab_size, config.sequence_length, config.seed)
        batches = Batches(stream, config.sequence_length, config.batch_sequences, config.seed)
    model = processes.run_on_all_ranks(lambda: initial_model(config, compute.device))
    loss_of, optimizer, compute = make_ready(model, batches, compute, config, processes)
    seconds, compute = first_micro_batch(model, loss_of, batches, compute, config, 0, processes, say)
    data = Prefetch(batches, compute.micro_batch, count, processes.rank, processes.world_size, compute.device)
    return Steps(config, data, loss_of, optimizer, compute, processes), seconds


def synthetic_tokens(vocab_size: int, sequence_length: int, seed: int) -> TokenStream:
    """Return random tokens, at least one window of ``sequence_length`` + 1.

    Args:
        vocab_size: number of different tokens, limited to GPT-2's vocabulary.
        sequence_length: tokens of a training sequence.
        seed: seed of the random numbers.
    """
    n = max(SYNTHETIC_TOKENS, sequence_length + 1)
    drawn = np.random.default_rng(seed).integers(min(vocab_size, VOCAB_SIZE), size=n)
    return TokenStream([drawn.astype(np.uint16)])


def _head(
    steps: Steps, preset: str, tokens: str, warmup: int, timed: int, accumulation: int, seconds: float
) -> list[tuple[str, str]]:
    config, compute, processes = steps.config, steps.compute, steps.processes.world_size
    m = config.model
    parallel = f", {config.parallel}" if processes > 1 else ""
    estimate = duration(seconds * accumulation * (warmup + 2 * timed))
    return [
        ("benchmark", f"training step of {preset}"),
        ("model", f"{describe_shape(m)}; {parameter_count(m):,} parameters"),
        ("batch", f"{describe_batch(config, compute.micro_batch, processes)}, {tokens}"),
        ("device", describe_device(compute.device)),
        ("compute dtype", f"{describe_dtype(config, compute.dtype)}{parallel}"),
        ("torch.compile", f"{'on' if compute.compiled else 'off'} ({compute.compile_reason})"),
        ("steps", f"{warmup} warm-up, then {timed} timed as a whole and {timed} by phase, alternating"),
        ("estimated time", f"{estimate}; lower --batch-tokens for shorter steps"),
    ]
