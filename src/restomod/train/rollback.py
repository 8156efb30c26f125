"""Recovery from failures: roll back to a checkpoint, retry a step with a smaller micro-batch."""

from __future__ import annotations

from restomod.data.batches import MicroBatches
from restomod.engine.device import release_memory
from restomod.engine.micro_batch import next_smaller_divisor, split_micro_batches
from restomod.engine.step import PendingStep, train_step
from restomod.runs.async_saver import Saver
from restomod.runs.checkpoint import describe_newest, load_checkpoint, set_aside_unusable
from restomod.runs.metrics import iterate_jsonl
from restomod.train.setup import Training
from restomod.train.spike_guard import SpikeGuard
from restomod.utils.console import Display
from restomod.utils.errors import UserError, is_out_of_memory, one_line


def roll_back(
    training: Training, saver: Saver, guard: SpikeGuard, step: int, problem: str, offset: int, display: Display
) -> tuple[int, int]:
    """Load the newest checkpoint, and skip the batches since, up to the skipped ``step``, which had a ``problem``.

    Returns:
        The checkpoint's step, and the new data offset.

    Raises:
        UserError: there is no checkpoint, or rolling back to it has not helped.
    """
    run, processes = training.run, training.processes
    saver.finish()
    checkpoint, _ = processes.from_main(lambda: set_aside_unusable(run.folder))
    if checkpoint is None:
        raise processes.error(
            f"step {step}: {problem}, and there is no checkpoint to go back to; lower --optim.lr in a new run"
        )
    back = load_checkpoint(checkpoint, training.model, training.optimizer, processes)
    log = run.folder / "metrics.jsonl"
    records = processes.from_main(lambda: [record for record in iterate_jsonl(log) if record["step"] < back])
    if not guard.rolled_back(back, records):
        raise processes.error(
            f"step {step}: {problem}, and going back to step {back} has not helped; lower --optim.lr in a new run "
            f"({describe_newest(run.folder)})"
        )
    if run.writes:
        run.rewind(back)
    offset += step + 1 - back
    run.log("rollback", back, failed_step=step, data_offset=offset)
    display.line(f"rolled back to step {back}; skips the data of {step + 1 - back} steps", style="bold yellow")
    return back, offset


def train_step_retrying_oom(
    training: Training,
    step: int,
    micro_batches: MicroBatches,
    micro_batch: int,
    loss_limit: float,
    display: Display,
) -> tuple[PendingStep, int]:
    """Make a step on this process's share of the batch, with a smaller micro-batch where memory runs out.

    Returns:
        What `train_step` returns, and the micro-batch that fitted.

    Raises:
        UserError: one sequence does not fit, or other processes wait for this one in the middle of the step.
    """
    loss_of, optimizer, processes = training.loss_of, training.optimizer, training.processes
    while True:
        parts = split_micro_batches(micro_batches, micro_batch)
        try:
            return train_step(loss_of, optimizer, parts, training.config, step, processes, loss_limit), micro_batch
        except Exception as e:
            if not is_out_of_memory(e):
                raise
            if micro_batch == 1 or processes.world_size > 1:
                raise UserError(
                    f"step {step}: out of memory with a micro-batch of {micro_batch} sequences ({one_line(e)}); "
                    f"resume with a smaller --micro-batch, or with --gradient-checkpointing"
                ) from e
        optimizer.zero_grad()  # outside of `except`, which holds on to the tensors of the step
        release_memory(training.compute.device)
        micro_batch = next_smaller_divisor(micro_batch)
        display.line(f"step {step}  out of memory: micro-batch {micro_batch} from here on", style="bold yellow")
