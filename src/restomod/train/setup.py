"""Everything a training loop needs, from a configuration: data, model, checks, state of a checkpoint."""

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
    """Where a run starts: step 0, or the checkpoint from which it resumes."""

    checkpoint: Path | None = None
    unusable: dict[Path, str] = field(default_factory=dict)
    """Newer checkpoints, which are set aside, and their problems."""
    step: int = 0
    """Updates that the weights have had."""
    data_offset: int = 0
    """Skipped batches: step s trains on batch s + data_offset."""


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is evaluated on."""

    dataset: Dataset
    tokenizer: Tokenizer
    batches: Batches
    tasks: list[LoadedTask]
    """Evaluated at every validation, besides the validation loss."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run in memory."""

    run: RunFolder
    start: Start
    data: TrainingData
    model: GPT
    loss_of: nn.Module
    """Takes tokens and targets, returns the training loss; contains the model."""
    optimizer: Optimizers
    compute: ComputeConfig
    processes: Processes
    check_results: list[CheckResult]
    """Of the sanity checks; empty for a run that resumes or is not checked."""
    micro_batch_seconds: float
    """Forward and backward pass of one micro-batch."""
    warnings: list[str]
    """Of a resumed run: checkpoints that were set aside, records that cannot be read."""
    nothing_left: str | None
    """Why a resumed run has nothing left to do; None where it has."""

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @property
    def flops_per_token(self) -> int:
        return flops_per_token(self.config.model, self.config.sequence_length)

    @property
    def peak_flops(self) -> float | None:
        """Peak FLOP/s of all devices together, if known; see `restomod.model.flops`."""
        peak = peak_flops(describe_device(self.compute.device))
        return None if peak is None else peak * self.processes.world_size


def set_up(
    config: RunConfig, folder: Path, resume: bool, processes: Processes = SINGLE, print_line: Say = lambda text: None
) -> Training:
    """Prepare data, model and optimizer, and create or reopen the run's folder. All processes call this.

    Nothing is written before the data and the configuration have been found good, and nothing at all into a run that
    has nothing left to do. A resumed run starts from its newest checkpoint, or from step 0 if it has none.

    Raises:
        UserError: the data, the device, the folder or the checkpoint is not usable.
    """
    start = processes.from_main(lambda: find_start(config, folder)) if resume else Start()
    config = _with_absolute_paths(config, needs_init=start.checkpoint is None)
    # a run that is still trained may have a newer checkpoint by the time another process looks
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
    """The newest usable checkpoint of a run; step 0 if it was stopped before its first.

    Raises:
        UserError: no checkpoint is usable, it is of another model, or it is beyond ``config.steps``.
    """
    checkpoint, unusable = newest_usable(folder)
    if checkpoint is None:
        return Start(None, unusable)
    start = Start(checkpoint, unusable, *progress(checkpoint))
    require_shape(checkpoint, config.model)
    if config.steps < start.step:
        raise UserError(
            f"{folder} has made {start.step} steps already, more than --steps {config.steps}; "
            f"omit --steps, or raise it to continue"
        )
    return start


def build_data(config: RunConfig, processes: Processes) -> TrainingData:
    """Tokens, batches and evaluation tasks, the same in all processes. All processes call this.

    Raises:
        UserError: there is too little text, the model is for another vocabulary, or processes found different tokens.
    """
    tokenizer = gpt2_tokenizer()
    dataset = processes.run_on_all_ranks(lambda: prepare_text(config.data), one_first=True)
    batches = training_batches(config, dataset, tokenizer)
    for source in dataset.sources:
        if len(source.dataset.val):  # refused now rather than at the first use
            Batches(source.dataset.val, config.sequence_length, 1, 0, "validation")
    cache, limit = Path(config.data.cache), config.eval_limit
    tasks = processes.run_on_all_ranks(
        lambda: [load_task(name, cache, limit) for name in config.eval_tasks], one_first=True
    )
    if len(set(processes.gather(dataset.fingerprint))) > 1:
        raise processes.error(
            "the processes of this run found different data; give all machines the same files, or one folder that all "
            "can read (--data.path, --data.cache)"
        )
    return TrainingData(dataset, tokenizer, batches, tasks)


def check_device(compute: ComputeConfig) -> None:
    """Raise UserError if the device is of a kind that has computed wrongly before, and does so here."""
    if compute.device.type in CHECKED_BEFORE_TRAINING:
        parity = device_parity(compute.device, compute.dtype)
        if parity.status == "fail":
            raise UserError(
                f"this device computes wrongly: {parity.reason} (`restomod doctor` checks it; "
                f"--no-sanity-checks trains anyway)"
            )


def build_weights(config: RunConfig, checkpoint: Path | None, device: torch.device, processes: Processes) -> GPT:
    """The model with the weights of ``checkpoint``, or its initial ones. All processes call this."""
    fresh = config if checkpoint is None else dataclasses.replace(config, init=None)
    model = processes.run_on_all_ranks(lambda: initial_model(fresh, device))
    if checkpoint is not None:
        load_saved_weights(checkpoint, model, processes)
    return model


def check_model(model: GPT, data: TrainingData, compute: ComputeConfig, config: RunConfig) -> list[CheckResult]:
    """Run the quick sanity checks, before torch.compile adapts to their shapes. Raises UserError: one has failed."""
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
    """What is wrong with the files of a run that resumes from ``start``, but does not stop it."""
    found = [f"set aside: {problem}" for problem in start.unusable.values()]
    log, before = folder / "metrics.jsonl", len(found)
    records = (record for record in iterate_jsonl(log, found.append) if record["kind"] == "train")
    lacking = start.step - sum(record["step"] < start.step for record in records)
    if lacking > 0 and len(found) == before:  # damaged lines have been reported
        found.append(f"{log} lacks {lacking} of the {start.step} steps before this one")
    collections.deque(iterate_jsonl(folder / "samples.jsonl", found.append, SampleRecord), maxlen=0)
    return found


def training_batches(config: RunConfig, dataset: Dataset, tokenizer: Tokenizer) -> Batches:
    """The batches of a run. Raises UserError: a source shorter than a window, or a model for another vocabulary."""
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
            f"{tokenizer.vocab_size} tokens; leave it at that (memory is padded to a multiple of 64 anyway)"
        )
    return batches


def choose_compute(config: RunConfig, processes: Processes) -> ComputeConfig:
    """The device, compute dtype and micro-batch of this process.

    Raises:
        UserError: the device is not there, or the batch cannot be divided among the processes.
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
    """Compile and distribute a model as configured. All processes call this.

    Returns:
        What computes the loss, the optimizer, and ``compute`` with a micro-batch that fits.
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
    """The configuration with absolute paths, so that the run resumes from any folder; ``init`` names one checkpoint.

    Args:
        needs_init: whether the initial weights are still to be read; a run that has a checkpoint does not need them.
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
    """The model at step 0: random weights, or those that ``config.init`` names.

    Raises:
        UserError: ``config.init`` is no model of the run's shape, or memory is too small.
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
                f"{config.init} has a vocabulary of {saved.vocab_size:,} tokens, and a run reads {shape.vocab_size:,}: "
                f"it can be evaluated and sampled, but not trained further"
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
        raise UserError(f"a model of {parameters:,} parameters does not fit here ({one_line(e)})") from e
