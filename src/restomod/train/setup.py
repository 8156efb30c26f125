"""From a configuration to everything a training loop needs, ready at its first step."""

from __future__ import annotations

import collections
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from restomod.checks.device_parity import CHECKED_BEFORE_TRAINING, device_parity
from restomod.checks.model_quick import CheckedModel, quick_checks
from restomod.config.run import RunConfig
from restomod.data.batches import Batches
from restomod.data.dataset import Dataset
from restomod.data.tokenize import prepare_text
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
from restomod.engine.micro_batch import Say, choose_chunk, choose_micro_batch, first_micro_batch, fitting_micro_batch
from restomod.engine.optimizer import Optimizers, build_optimizer
from restomod.engine.step import BatchLoss, Compute
from restomod.evals.tasks.registry import LoadedTask, load_task, with_absolute_path
from restomod.model.flops import flops_per_token, parameter_count, peak_flops
from restomod.model.gpt import GPT, build_model
from restomod.model.hf_format import OtherModel, as_saved
from restomod.model.hf_io import load_model, read_model_config
from restomod.runs.checkpoint import (
    Unusable,
    load_optimizer,
    load_saved_weights,
    newest_usable,
    progress,
    set_aside,
)
from restomod.runs.folder import RunFolder, check_resumable, create_run, environment, nothing_left_to_do, reopen_run
from restomod.runs.metrics import SampleRecord, iterate_jsonl
from restomod.runs.open_model import find_model
from restomod.runs.saved_tensors import require_shape
from restomod.utils.check_result import CheckResult
from restomod.utils.errors import UserError, is_out_of_memory, one_line


@dataclass(frozen=True)
class Training:
    """A run in memory."""

    run: RunFolder
    dataset: Dataset
    tokenizer: Tokenizer
    batches: Batches
    model: GPT
    loss_of: nn.Module
    """What is called with tokens and targets to train; the model is in it."""
    optimizer: Optimizers
    compute: Compute
    processes: Processes
    first_step: int
    """How many updates the weights have had: 0, or those of the checkpoint that was loaded."""
    data_offset: int
    """How many batches have been passed over: step s trains on batch s + data_offset."""
    tasks: list[LoadedTask]
    """What every validation asks besides the validation loss."""
    warnings: list[str]
    """Of a run that goes on: newer checkpoints that were set aside, records that cannot be read."""
    verdicts: list[CheckResult]
    """What the sanity checks found; empty for a run that goes on, or that does without them."""
    micro_batch_seconds: float
    """How long a micro-batch takes, forward and backward."""
    nothing_left: str | None = None
    """Why a run that is resumed has nothing left to do; None where it has."""

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @property
    def flops_per_token(self) -> int:
        return flops_per_token(self.config.model, self.config.sequence_length)

    @property
    def peak_flops(self) -> float | None:
        """The peak of all devices together, if it is known; see `restomod.model.flops`."""
        peak = peak_flops(describe_device(self.compute.device))
        return None if peak is None else peak * self.processes.world_size


def set_up(
    config: RunConfig, folder: Path, resume: bool, processes: Processes = SINGLE, say: Say = lambda text: None
) -> Training:
    """Prepare data, model and optimizer, and make or reopen the run's folder.

    Nothing is written before the data and the configuration have been found good, and nothing at all into a run that
    has nothing left to do. A resumed run starts from its newest checkpoint, or from the beginning if it was stopped
    before its first.

    Raises:
        UserError: the data, the device, the folder or the checkpoint is not usable.
    """
    checkpoint, unusable = processes.from_main(lambda: newest_usable(folder)) if resume else (None, [])
    first_step, data_offset = processes.from_main(lambda: progress(checkpoint)) if checkpoint else (0, 0)
    if checkpoint is not None:
        processes.from_main(lambda: require_shape(checkpoint, config.model))
    if config.steps < first_step:
        raise processes.error(
            f"{folder} has made {first_step} steps already, more than --steps {config.steps}; "
            f"leave --steps out, or raise it to go on"
        )
    config = _with_absolute_paths(config, needs_init=checkpoint is None)
    # a run that is still trained may have a newer checkpoint by the time another process looks
    config = dataclasses.replace(config, init=processes.gather(config.init)[0])
    compute = choose_compute(config, processes)
    device = compute.device
    tokenizer = gpt2_tokenizer()
    dataset = processes.run_on_all_ranks(lambda: prepare_text(config.data, tokenizer), one_first=True)
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
    if resume:
        processes.from_main(lambda: check_resumable(folder, config, dataset))
    fresh = config if checkpoint is None else dataclasses.replace(config, init=None)
    if config.sanity_checks and device.type in CHECKED_BEFORE_TRAINING:
        parity = device_parity(device, compute.dtype)
        if parity.status == "fail":
            raise UserError(
                f"this device computes wrongly: {parity.reason} (`restomod doctor` examines it; "
                f"--no-sanity-checks trains all the same)"
            )
    model = processes.run_on_all_ranks(lambda: initial_model(fresh, device))
    if checkpoint is not None:
        load_saved_weights(checkpoint, model, processes)
    verdicts = []
    if config.sanity_checks and first_step == 0:  # before torch.compile, which would compile for their shapes too
        trial, eager = build_optimizer(model, config.optim), dataclasses.replace(compute, compiled=False)
        verdicts = quick_checks(CheckedModel(model, batches, eager, trial, fresh=config.init is None))
        for verdict in verdicts:
            if verdict.status == "fail":
                raise UserError(
                    f"sanity check {verdict.check!r} failed: {verdict.reason} "
                    f"(`restomod check` shows all checks; --no-sanity-checks trains all the same)"
                )
    processes.agree()
    loss_of, optimizer, compute = make_ready(model, batches, compute, config, processes)
    if checkpoint is not None:
        load_optimizer(checkpoint, model, optimizer, processes)
    processes.agree()
    seconds, compute = first_micro_batch(model, loss_of, batches, compute, config, first_step, processes, say)

    nothing_left = processes.from_main(lambda: nothing_left_to_do(folder, config, first_step)) if resume else None
    warnings = processes.from_main(lambda: _warnings(folder, unusable, first_step)) if resume else []
    run = RunFolder(folder, config, writes=False)
    if processes.main and nothing_left is None:
        here = environment(describe_device(device), dtype_name(compute.dtype))
        here |= {
            "processes": processes.world_size,
            "parameters": parameter_count(config.model),
            "flops_per_token": flops_per_token(config.model, config.sequence_length),
        }
        if resume:
            set_aside(unusable)
        run = reopen_run(folder, config, here, first_step) if resume else create_run(folder, config, dataset, here, say)
    return Training(
        run,
        dataset,
        tokenizer,
        batches,
        model,
        loss_of,
        optimizer,
        compute,
        processes,
        first_step,
        data_offset,
        tasks,
        warnings,
        verdicts,
        seconds,
        nothing_left,
    )


def _warnings(folder: Path, unusable: list[Unusable], first_step: int) -> list[str]:
    """What is wrong with the files of a run that goes on from ``first_step``, and does not stop it."""
    found = [f"set aside: {each.problem}" for each in unusable]
    log, before = folder / "metrics.jsonl", len(found)
    records = (record for record in iterate_jsonl(log, found.append) if record["kind"] == "train")
    lacking = first_step - sum(record["step"] < first_step for record in records)
    if lacking > 0 and len(found) == before:  # damaged lines have been told of
        found.append(f"{log} lacks {lacking} of the {first_step} steps before this one")
    collections.deque(iterate_jsonl(folder / "samples.jsonl", found.append, SampleRecord), maxlen=0)
    return found


def training_batches(config: RunConfig, dataset: Dataset, tokenizer: Tokenizer) -> Batches:
    """The batches of a run.

    Raises:
        UserError: a source is shorter than a window, or the model is for another vocabulary.
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
            f"{tokenizer.vocab_size} tokens; leave it at that (memory is padded to a multiple of 64 anyway)"
        )
    return batches


def choose_compute(config: RunConfig, processes: Processes) -> Compute:
    """Where and how precisely this process computes, and how many sequences at once.

    Raises:
        UserError: the device is not there, or the batch cannot be shared out.
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
            f"residual_dtype bf16 needs bf16 matrix products, and this device uses {dtype_name(dtype)}; "
            f"leave --residual-dtype out, or add --precision bf16"
        )
    compiled, reason = choose_compile(config.compile, device)
    return Compute(device, dtype, micro_batch, compiled, config.document_mask, choose_chunk(device), reason)


def make_ready(
    model: GPT, batches: Batches, compute: Compute, config: RunConfig, processes: Processes
) -> tuple[nn.Module, Optimizers, Compute]:
    """Compile and distribute a model as configured. All processes call this.

    Returns:
        What computes the loss, the optimizer, and ``compute`` with a micro-batch that fits.
    """
    model.transformer.recompute = config.recompute
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
    """The same run, fit to be resumed from any folder; initial weights are pinned to one checkpoint of their run.

    Args:
        needs_init: whether the initial weights are still to be read. A run with a checkpoint goes on without them.
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
    """The model of step 0."""
    shape = config.model
    try:
        if config.init is None:
            return build_model(shape, config.seed, device)
        folder = find_model(config.init)
        try:
            saved = read_model_config(folder)
        except OtherModel as e:
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
