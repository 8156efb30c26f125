"""What a run does about failures: goes back to a checkpoint, or takes a smaller micro-batch."""

from __future__ import annotations

from restomod.data.prefetch import MicroBatches
from restomod.engine.device import release_memory
from restomod.engine.micro_batch import next_smaller_divisor, split_micro_batches
from restomod.engine.step import PendingStep, train_step
from restomod.runs.async_saver import Saver
from restomod.runs.checkpoint import describe_newest, load_checkpoint, newest_whole
from restomod.runs.metrics import iterate_jsonl
from restomod.train.setup import Training
from restomod.train.spike_guard import Guard
from restomod.utils.console import Display
from restomod.utils.errors import UserError, is_out_of_memory, one_line


def roll_back(
    training: Training, saver: Saver, guard: Guard, step: int, problem: str, offset: int, display: Display
) -> tuple[int, int]:
    """Go back to the newest checkpoint. Returns its step, and the offset at which the data goes on after ``step``.

    Args:
        training: the run.
        saver: of its checkpoints.
        guard: has judged ``step``.
        step: the last of the bad ones.
        problem: what was wrong with it.
        offset: how many batches have been passed over before.
        display: told of it.

    Raises:
        UserError: there is none, or it has been gone back to too often.
    """
    run, processes = training.run, training.processes
    saver.finish()
    checkpoint, _ = processes.from_main(lambda: newest_whole(run.folder))
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
    run.log("rollback", back, failed_step=step, data_offset=offset + step + 1 - back)
    display.line(f"back to step {back}, past the data of {step + 1 - back} steps", style="bold yellow")
    return back, offset + step + 1 - back


def step_that_fits(
    training: Training,
    step: int,
    micro_batches: MicroBatches,
    sequences: int,
    loss_limit: float,
    display: Display,
) -> tuple[PendingStep, int]:
    """Make a step, with fewer sequences at once where memory runs out.

    Args:
        training: the run.
        step: how many updates the weights have had.
        micro_batches: this process's share of the batch.
        sequences: at most so many go through the model at once.
        loss_limit: see `train_step`.
        display: told of it.

    Returns:
        What `train_step` returns, and how many sequences at once it took.

    Raises:
        UserError: one sequence does not fit, or other processes wait for this one in the middle of the step.
    """
    loss_of, optimizer, processes = training.loss_of, training.optimizer, training.processes
    while True:
        parts = split_micro_batches(micro_batches, sequences)
        try:
            return train_step(loss_of, optimizer, parts, training.config, step, processes, loss_limit), sequences
        except Exception as e:
            if not is_out_of_memory(e):
                raise
            if sequences == 1 or processes.world_size > 1:
                raise UserError(
                    f"step {step}: out of memory with {sequences} sequences at once ({one_line(e)}); "
                    f"go on with a smaller --micro-batch, or with --recompute"
                ) from e
        optimizer.zero_grad()  # outside of `except`, which holds on to the tensors of the step
        release_memory(training.compute.device)
        sequences = next_smaller_divisor(sequences)
        display.line(f"step {step}  out of memory: {sequences} sequences at once from here on", style="bold yellow")


def warn(display: Display, failure: UserError | None) -> None:
    """Tell of a checkpoint that could not be written."""
    if failure is not None:
        display.line(f"warning: {failure}", style="bold yellow")
