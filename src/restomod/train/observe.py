"""What is looked at along the way: the validation loss, and samples."""

from __future__ import annotations

from restomod.evals.heldout import heldout_loss
from restomod.samples import continuations
from restomod.train.console import Display
from restomod.train.distributed import whole
from restomod.train.setup import Training


def evaluate(training: Training, step: int, display: Display) -> None:
    """Log and show the loss on the validation split, if there is one; of a mix, the mean by share, and that of each."""
    config, compute, processes = training.config, training.compute, training.processes
    sources = [source for source in training.dataset.sources if len(source.dataset.val)]
    if not sources:
        return
    model = whole(training.model)
    shares, losses, tokens = [], {}, 0
    for source in sources:
        shares.append(float(source.share / sum(s.share for s in sources)))
        limit = (
            None if config.eval_tokens is None else max(config.sequence_length, int(shares[-1] * config.eval_tokens))
        )
        losses[source.name], n = heldout_loss(
            model,
            source.dataset.val,
            config.sequence_length,
            compute.device,
            compute.dtype,
            limit,
            processes=processes,
        )
        tokens += n
    loss = sum(share * part for share, part in zip(shares, losses.values(), strict=True))
    parts = {"sources": losses} if training.dataset.parts else {}
    training.run.log("val", step, loss=loss, tokens=tokens, **parts)
    of = ", ".join(f"{name} {part:.4f}" for name, part in losses.items()) if parts else ""
    display.line(f"step {step}  validation loss {loss:.4f}{f' ({of})' if of else ''}", style="bold cyan")


def write_samples(training: Training, step: int, display: Display) -> None:
    """Log and show one continuation of each prompt."""
    sampling, model = training.config.sampling, whole(training.model)
    if not training.processes.main:
        return
    display.line(f"step {step}  samples", style="bold cyan")
    seed, dtype = training.config.seed + step, training.compute.dtype
    texts = continuations(model, training.tokenizer, sampling.prompts, 1, sampling, seed, dtype)
    for prompt, (text,) in zip(sampling.prompts, texts, strict=True):
        training.run.log_sample(step, prompt, text)
        display.sample(prompt, text)
