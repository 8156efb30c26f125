"""Expected final loss of a run, from similar published runs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from restomod.config.model import ModelConfig
from restomod.config.presets import llama_124m, quickstart
from restomod.config.run import RunConfig
from restomod.data.manifest import MANIFEST, is_fineweb_edu, read_manifest
from restomod.evals.tasks.registry import references
from restomod.evals.tasks.task import LLAMA, LR_STUDY

NEAR = 0.05  # relative tolerance of training tokens and of tokens per step
BATCH_TOKENS, TOKENS = 2**19, 10**10  # published runs of GPT-2 124M on FineWeb-Edu
STUDY_RATES = (6e-4, 1.2e-3)  # learning rates of the public study

# (step, training loss) of one public run that memorises TinyShakespeare at 4,096 tokens per step, from its README
# fmt: off
TINYSHAKESPEARE = (
    (0, 10.972), (100, 6.610), (200, 5.443), (300, 5.132), (500, 3.624), (900, 2.586), (1000, 2.464),
    (1100, 2.163), (1200, 1.540), (1300, 1.429), (1400, 1.095), (1500, 0.704), (1600, 0.558), (1700, 0.313),
    (1800, 0.299), (1900, 0.272), (2000, 0.199), (2500, 0.168), (3000, 0.144), (3533, 0.089),
)
# fmt: on
# validation losses of the preset, 2026-11-21: AMD EPYC in bf16, Intel Xeon in fp32; both with the standard
# library of Python 3.11.7 as text
QUICKSTART = (4.8488, 4.8383)
# validation losses of other public runs with 10B tokens; learning rate 6e-4 or unknown
OTHERS = {
    "rsaketh002/gpt2-fineweb-edu": 3.22,
    "PersonalRec/reproduce-gpt2, results/230126": 3.26,
    "debtirthasaha.github.io/blog/2026/gpt2-124m": 3.3969,
}


@dataclass(frozen=True)
class ExpectedLoss:
    """Expected final loss, or the reason why it is unknown."""

    loss: float | None
    """Expected loss in nats per token; None if unknown."""
    low: float | None
    """Lowest loss of the similar published runs; None if there is only one."""
    high: float | None
    """Highest loss of the similar published runs; None if there is only one."""
    basis: str
    """Kind of loss and the runs it comes from, or the reason why the loss is unknown."""


def expected_loss(config: RunConfig) -> ExpectedLoss:
    """Return the final loss of published runs with the same model, data and number of tokens."""
    if config.init is not None:
        return _unknown("published runs start from random weights, and this run starts from trained ones")
    if _is_quickstart(config):
        own = "validation loss: runs of this preset on two machines, with Python 3.11.7"
        return ExpectedLoss(sum(QUICKSTART) / len(QUICKSTART), min(QUICKSTART), max(QUICKSTART), own)
    if _same_model(config.model, llama_124m().model):
        return _llama(config)
    if not _same_model(config.model, ModelConfig()):
        return _unknown("the published runs train GPT-2 124M, and this is another model")
    if config.optim.optimizer != "adamw":
        return _unknown("the published runs use AdamW")
    if config.data.source == "tinyshakespeare":
        return _tinyshakespeare(config)
    if config.data.source not in ("text", "tokens") or config.data.mix is not None:
        return _unknown("the published runs train on FineWeb-Edu or TinyShakespeare")
    if _is_other_text(config):
        return _unknown(f"the published runs train on FineWeb-Edu, and {config.data.path} is other text")
    return _fineweb_edu(config)


def _is_other_text(config: RunConfig) -> bool:
    """Return whether the prepared tokens of a run exist and are not from FineWeb-Edu."""
    path = Path(config.data.path or "") / MANIFEST
    return config.data.source == "tokens" and path.exists() and not is_fineweb_edu(read_manifest(path.parent))


def _is_quickstart(config: RunConfig) -> bool:
    """Return whether all settings that determine the loss equal those of the preset quickstart."""
    same = quickstart()
    names = ("model", "data", "optim", "steps", "batch_tokens", "sequence_length", "document_mask", "seed")
    return all(getattr(config, name) == getattr(same, name) for name in names)


def _same_model(model: ModelConfig, other: ModelConfig) -> bool:
    """Return whether two models are equal except for ``n_positions``."""
    return model == dataclasses.replace(other, n_positions=model.n_positions)


def _llama(config: RunConfig) -> ExpectedLoss:
    """Return the loss of the published Llama run if ``config`` equals it, that is, the preset llama-124m."""
    same = llama_124m()
    other_source = config.data.source not in ("text", "tokens") or config.data.mix is not None
    if other_source or _is_other_text(config):
        return _unknown("the published run trains on FineWeb-Edu")
    if config.optim != same.optim or (config.steps, config.batch_tokens) != (same.steps, same.batch_tokens):
        return _unknown("the published Llama run is the preset llama-124m: two epochs with learning rate 1.8e-3")
    (loss,) = (r.value for r in references("validation") if r.model == LLAMA)
    basis = "validation loss, if the text is FineWeb-Edu: one public run, spread unknown"
    return ExpectedLoss(loss, None, None, basis)


def _fineweb_edu(config: RunConfig) -> ExpectedLoss:
    tokens, lr = config.steps * config.batch_tokens, config.optim.lr
    published = {r.model: r.value for r in references("validation")}
    if not _near(config.batch_tokens, BATCH_TOKENS) or config.sequence_length != 1024:
        return _unknown(f"the published runs use {BATCH_TOKENS:,} tokens per step, in sequences of 1,024")
    text = "validation loss, if the text is FineWeb-Edu"
    if not _near(tokens, TOKENS):
        return _unknown(f"the published runs train on 10 billion tokens, and this run on {tokens / 1e9:.3g} billion")
    losses = [published[name] for name in LR_STUDY]
    if not STUDY_RATES[0] <= lr <= STUDY_RATES[1]:
        low, high = STUDY_RATES
        return _unknown(f"the published learning rates are {low:g} to {high:g}, and this run has {lr:g}")
    every = [*losses, *OTHERS.values()]
    others = ", ".join(f"{loss:.2f}" for loss in OTHERS.values())
    basis = f"{text}: two runs of a learning-rate study; other public runs: {others}"
    return ExpectedLoss(float(np.interp(math.log(lr), np.log(STUDY_RATES), losses)), min(every), max(every), basis)


def _tinyshakespeare(config: RunConfig) -> ExpectedLoss:
    last, _ = TINYSHAKESPEARE[-1]
    if config.batch_tokens != 4096 or config.optim.lr != 6e-4:
        return _unknown("the published run uses 4,096 tokens per step and a learning rate of 6e-4, as the preset")
    if config.steps > last and config.target_loss is None:
        return _unknown(f"the published run has {last:,} steps")
    steps, losses = zip(*TINYSHAKESPEARE, strict=True)
    loss = max(math.exp(np.interp(config.steps, steps, np.log(losses))), config.target_loss or 0.0)
    return ExpectedLoss(loss, None, None, "training loss: one public run, spread unknown")


def _near(value: float, to: float) -> bool:
    return abs(value / to - 1) <= NEAR


def _unknown(why: str) -> ExpectedLoss:
    return ExpectedLoss(None, None, None, f"unknown: {why}")
