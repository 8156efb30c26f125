"""Setup of a run from its configuration: data, model, sanity checks, state of a checkpoint."""

from __future__ import annotations

import collections
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from restomod.checks.device_parity import CHECKED_BEFORE_TRAINING, device_parity
from restomod.checks.model_quick import CheckedModel, quick_checks
from restomod.config.run import RunConfig
from restomod.data.batches import Batches
from restomod.data.dataset import Dataset
from restomod.data.prepare.text_cache import prepare_text
from restomod.data.tokenizer import Tokenizer, gpt2_tokenizer
from restomod.engine.device import (
    choose_compile,
    choose_device,
    choose_dtype,
    compile_module,
    compute_deterministically,
    describe_device,
    dtype_name,
    keep_freed_memory,
)
from restomod.engine.distributed import SINGLE, Processes, compiled_parts, device_of, distribute
from restomod.engine.micro_batch import Say, choose_micro_batch, first_micro_batch, fitting_micro_batch
from restomod.engine.optimizer import Optimizers, build_optimizer
from restomod.engine.step import BatchLoss, ComputeConfig
from restomod.evals.tasks.registry import LoadedTask, load_task, with_absolute_path
from restomod.model.flops import flops_per_token, parameter_count, peak_flops
from restomod.model.gpt import GPT, build_model
from restomod.model.hf_format import UnsupportedModel, as_saved
from restomod.model.hf_io import load_model, read_model_config
from restomod.runs.checkpoint import (
    load_optimizer,
    load_saved_weights,
    newest_usable,
    progress,
    require_shape,
    set_aside,
)
from restomod.runs.folder import RunFolder, check_resumable, create_run, environment, nothing_left_to_do, reopen_run
from restomod.runs.metrics import SampleRecord, iterate_jsonl
from restomod.runs.open_model import find_model
from restomod.utils.console import CheckResult
from restomod.utils.errors import UserError, is_out_of_memory, one_line


@dataclass(frozen=True)
class Start:
    """Starting point of a run: step 0, or the checkpoint from which it resumes."""

    checkpoint: Path | None = None
    unusable: dict[Path, str] = field(default_factory=dict)
    """Newer, unusable checkpoints and their problems; they are renamed."""
    step: int = 0
    """Number of updates of the weights."""
    data_offset: int = 0
    """Number of skipped batches: step s trains on batch s + data_offset."""


@dataclass(frozen=True)
class TrainingData:
    """Tokens, batches and evaluation tasks of a run."""

    dataset: Dataset
    tokenizer: Tokenizer
    batches: Batches
    tasks: list[LoadedTask]
    """Tasks that are scored at every validation."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Run in memory: folder, data, model, optimizer and device."""

    run: RunFolder
    start: Start
    data: TrainingData
    model: GPT
    loss_of: nn.Module
    """Module from tokens and targets, both (B, T), to the training loss; contains the model."""
    optimizer: Optimizers
    compute: ComputeConfig
    processes: Processes
    check_results: list[CheckResult]
    """Results of the sanity checks; empty for a resumed run or without checks."""
    micro_batch_seconds: float
    """Duration of the forward and backward pass of one micro-batch, in seconds."""
    warnings: list[str]
    """Problems of a resumed run's files: unusable checkpoints, unreadable records."""
    nothing_left: str | None
    """Reason why a resumed run is complete already; None if steps remain."""

    @property
    def config(self) -> RunConfig:
        """Run configuration."""
        return self.run.config

    @property
    def flops_per_token(self) -> int:
        """FLOPs of the forward and backward pass per token."""
        return flops_per_token(self.config.model, self.config.sequence_length)

    @property
    def peak_flops(self) -> float | None:
        """Peak FLOP/s of all devices together; None if unknown (see `restomod.model.flops`)."""
        peak = peak_flops(describe_device(self.compute.device))
        return None if peak is None else peak * self.processes.world_size


def set_up(
    config: RunConfig, folder: Path, resume: bool, processes: Processes = SINGLE, print_line: Say = lambda text: None
) -> Training:
    """Prepare data, model and optimizer, and create or reopen the run's folder.

    Collective: every rank must call this. The folder is written only after data and configuration are validated, and
    only if steps remain. A resumed run starts from its newest checkpoint, or from step 0 without a checkpoint.

    Args:
        config: run configuration.
        folder: folder of the run.
        resume: whether the folder holds a run to be resumed.
        processes: ranks that share the batch.
        print_line: function that prints a line about a long operation or a change.

    Raises:
        UserError: the data, the device, the folder or the checkpoint is unusable.
    """
    start = processes.from_main(lambda: find_start(config, folder)) if resume else Start()
    config = _with_absolute_paths(config, needs_init=start.checkpoint is None)
    # another run may write a newer checkpoint before the other ranks look for its newest one
    config = dataclasses.replace(config, init=processes.gather(config.init)[0])
    compute = choose_compute(config, processes)

    data = build_data(config, processes)
    if resume:
        processes.from_main(lambda: check_resumable(folder, config, data.dataset))
    if config.sanity_checks:
        check_device(compute)
    model = build_weights(config, start.checkpoint, compute.device, processes)
    check_results = check_model(model, data, compute, config) if config.sanity_checks and start.step == 0 else []
    processes.agree()
    loss_of, optimizer, compute = make_ready(model, data.batches, compute, config, processes)
    if start.checkpoint is not None:
        load_optimizer(start.checkpoint, model, optimizer, processes)
    processes.agree()
    seconds, compute = first_micro_batch(
        model, loss_of, data.batches, compute, config, start.step, processes, print_line
    )

    nothing_left, warnings = None, []
    if resume:
        nothing_left = processes.from_main(lambda: nothing_left_to_do(folder, config, start.step))
        warnings = processes.from_main(lambda: _warnings(folder, start))
    run = RunFolder(folder, config, writes=False)
    if processes.main and nothing_left is None:
        here = environment(describe_device(compute.device), dtype_name(compute.dtype))
        here |= {
            "processes": processes.world_size,
            "parameters": parameter_count(config.model),
            "flops_per_token": flops_per_token(config.model, config.sequence_length),
        }
        if resume:
            set_aside(start.unusable)
            run = reopen_run(folder, config, here, start.step)
        else:
            run = create_run(folder, config, data.dataset, here, print_line)
    return Training(
        run=run,
        start=start,
        data=data,
        model=model,
        loss_of=loss_of,
        optimizer=optimizer,
        compute=compute,
        processes=processes,
        check_results=check_results,
        micro_batch_seconds=seconds,
        warnings=warnings,
        nothing_left=nothing_left,
    )


def find_start(config: RunConfig, folder: Path) -> Start:
    """Find the newest usable checkpoint of a run, or step 0 if it was stopped before its first checkpoint.

    Raises:
        UserError: all checkpoints are unusable, the model has another shape, or the step is beyond ``config.steps``.
    """
    checkpoint, unusable = newest_usable(folder)
    if checkpoint is None:
        return Start(None, unusable)
    start = Start(checkpoint, unusable, *progress(checkpoint))
    require_shape(checkpoint, config.model)
    if config.steps < start.step:
        raise UserError(
            f"{folder} is already at step {start.step}, beyond --steps {config.steps}; "
            f"omit --steps, or raise it to continue"
        )
    return start


def build_data(config: RunConfig, processes: Processes) -> TrainingData:
    """Load tokens, batches and evaluation tasks, identical on all ranks.

    Collective: every rank must call this.

    Raises:
        UserError: too little text, a model with another vocabulary, or different tokens on different ranks.
    """
    tokenizer = gpt2_tokenizer()
    dataset = processes.run_on_all_ranks(lambda: prepare_text(config.data), one_first=True)
    batches = training_batches(config, dataset, tokenizer)
    for source in dataset.sources:
        if len(source.dataset.val):  # raises UserError for a split shorter than a window
            Batches(source.dataset.val, config.sequence_length, 1, 0, "validation")
    cache, limit = Path(config.data.cache), config.eval_limit
    tasks = processes.run_on_all_ranks(
        lambda: [load_task(name, cache, limit) for name in config.eval_tasks], one_first=True
    )
    if len(set(processes.gather(dataset.fingerprint))) > 1:
        raise processes.error(
            "the processes of this run found different data; use the same files on all machines, or a shared folder "
            "(--data.path, --data.cache)"
        )
    return TrainingData(dataset, tokenizer, batches, tasks)


def check_device(compute: ComputeConfig) -> None:
    """Raise UserError if the device computes wrong results; only types of devices with known faults are checked."""
    if compute.device.type in CHECKED_BEFORE_TRAINING:
        parity = device_parity(compute.device, compute.dtype)
        if parity.status == "fail":
            raise UserError(
                f"this device computes wrong results: {parity.reason} (`restomod doctor` checks it; "
                f"--no-sanity-checks trains anyway)"
            )


def build_weights(config: RunConfig, checkpoint: Path | None, device: torch.device, processes: Processes) -> GPT:
    """Build the model and load the weights of ``checkpoint`` (None: initial weights).

    Collective: every rank must call this.
    """
    fresh = config if checkpoint is None else dataclasses.replace(config, init=None)
    model = processes.run_on_all_ranks(lambda: initial_model(fresh, device))
    if checkpoint is not None:
        load_saved_weights(checkpoint, model, processes)
    return model


def check_model(model: GPT, data: TrainingData, compute: ComputeConfig, config: RunConfig) -> list[CheckResult]:
    """Run the quick sanity checks, in eager mode: torch.compile would adapt to their shapes.

    Raises:
        UserError: a check failed.
    """
    optimizer, eager = build_optimizer(model, config.optim), dataclasses.replace(compute, compiled=False)
    results = quick_checks(CheckedModel(model, data.batches, eager, optimizer, fresh=config.init is None))
    for result in results:
        if result.status == "fail":
            raise UserError(
                f"sanity check {result.check!r} failed: {result.reason} "
                f"(`restomod check` shows all checks; --no-sanity-checks trains anyway)"
            )
    return results


def _warnings(folder: Path, start: Start) -> list[str]:
    """Return problems of a resumed run's files that do not prevent its resumption."""
    found = [f"unusable checkpoint renamed: {problem}" for problem in start.unusable.values()]
    log, before = folder / "metrics.jsonl", len(found)
    records = (record for record in iterate_jsonl(log, found.append) if record["kind"] == "train")
    lacking = start.step - sum(record["step"] < start.step for record in records)
    if lacking > 0 and len(found) == before:  # damaged lines are already reported
        found.append(f"{log} lacks {lacking} of the {start.step} steps before the checkpoint")
    collections.deque(iterate_jsonl(folder / "samples.jsonl", found.append, SampleRecord), maxlen=0)
    return found


def training_batches(config: RunConfig, dataset: Dataset, tokenizer: Tokenizer) -> Batches:
    """Return the training batches of a run.

    Raises:
        UserError: a source is shorter than a window, or the model has another vocabulary than the tokenizer.
    """
    sources = dataset.sources
    batches = Batches(
        [source.dataset.train for source in sources],
        config.sequence_length,
        config.batch_sequences,
        config.seed,
        "training",
        [source.share for source in sources],
    )
    for source in sources:
        source.dataset.train.expect_random_reads()
    if config.model.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size is {config.model.vocab_size}, but the data's {tokenizer.name} tokenizer has "
            f"{tokenizer.vocab_size} tokens; omit --model.vocab-size (weights are padded to a multiple of 64)"
        )
    return batches


def choose_compute(config: RunConfig, processes: Processes) -> ComputeConfig:
    """Choose device, compute dtype, micro-batch and compilation of this rank.

    Raises:
        UserError: the device is not available, or the batch cannot be divided among the ranks.
    """
    if config.deterministic:
        compute_deterministically()
    device = device_of(choose_device(config.device), processes)
    if device.type == "cpu":
        keep_freed_memory()
    micro_batch = choose_micro_batch(config, device, processes.world_size)
    dtype = choose_dtype(config.precision, device)
    if config.residual_dtype == "bf16" and dtype != torch.bfloat16:
        raise UserError(
            f"residual_dtype bf16 needs the compute dtype bf16, and this device uses {dtype_name(dtype)}; "
            f"omit --residual-dtype, or add --precision bf16"
        )
    compiled, reason = choose_compile(config.compile, device)
    return ComputeConfig(device, dtype, micro_batch, compiled, config.document_mask, compile_reason=reason)


def make_ready(
    model: GPT, batches: Batches, compute: ComputeConfig, config: RunConfig, processes: Processes
) -> tuple[nn.Module, Optimizers, ComputeConfig]:
    """Compile and distribute a model, and build its optimizer.

    Collective: every rank must call this.

    Returns:
        Module that computes the loss, optimizer, and ``compute`` with a micro-batch that fits into memory.
    """
    model.transformer.gradient_checkpointing = config.gradient_checkpointing
    model.transformer.residual_dtype = torch.bfloat16 if config.residual_dtype == "bf16" else None
    if config.micro_batch is None and compute.device.type == "cuda":
        fits = processes.least(fitting_micro_batch(model, batches, compute, config.optim))
        compute = dataclasses.replace(compute, micro_batch=fits)
    if compute.compiled:
        for part in compiled_parts(model, config.parallel):
            compile_module(part, compute.device)
    loss_of = distribute(BatchLoss(model, compute), model, config.parallel, processes, compute.dtype)
    return loss_of, build_optimizer(model, config.optim, compute.dtype, processes), compute


def _with_absolute_paths(config: RunConfig, needs_init: bool) -> RunConfig:
    """Replace relative paths by absolute ones, so that the run resumes from any working directory.

    Args:
        config: run configuration.
        needs_init: whether ``init`` is replaced by the checkpoint it stands for; False for a run with a checkpoint.
    """
    data = config.data
    path = str(Path(data.path).absolute()) if data.path else None
    mix = (
        ",".join(f"{Path(folder).absolute()}:{float(share):g}" for folder, share in data.mixed()) if data.mix else None
    )
    data = dataclasses.replace(data, path=path, mix=mix, cache=str(Path(data.cache).absolute()))
    tasks = tuple(with_absolute_path(task) for task in config.eval_tasks)
    init = config.init
    if init is not None and needs_init and Path(init).is_dir():
        init = str(find_model(init).absolute())
    return dataclasses.replace(config, data=data, init=init, eval_tasks=tasks)


def initial_model(config: RunConfig, device: torch.device) -> GPT:
    """Build the model at step 0, with random weights or those of ``config.init``.

    Raises:
        UserError: ``config.init`` is not a model of the run's shape, or the model does not fit into memory.
    """
    shape = config.model
    try:
        if config.init is None:
            return build_model(shape, config.seed, device)
        folder = find_model(config.init)
        try:
            saved = read_model_config(folder)
        except UnsupportedModel as e:
            raise UserError(f"{config.init} can be evaluated and sampled, but not trained further: {e}") from None
        if saved.vocab_size != shape.vocab_size:
            raise UserError(
                f"{config.init} has a vocabulary of {saved.vocab_size:,} tokens instead of {shape.vocab_size:,}, so it "
                f"can be evaluated and sampled, but not trained further"
            )
        if saved != as_saved(shape):
            changed = {
                field.name.replace("_", "-"): getattr(saved, field.name)
                for field in dataclasses.fields(saved)
                if getattr(saved, field.name) != getattr(as_saved(shape), field.name)
            }
            flags = [
                f"--model.{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--model.{name} {value}"
                for name, value in changed.items()
            ]
            raise UserError(f"{config.init} has another shape than the run's model; add {' '.join(flags)}")
        return load_model(folder, device).train()
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        parameters = parameter_count(shape)
        raise UserError(f"a model of {parameters:,} parameters does not fit into memory ({one_line(e)})") from e
