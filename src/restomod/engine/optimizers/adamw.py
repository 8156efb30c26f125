"""AdamW, with weight decay on matrices and embeddings only.

Sources: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2; Brown et al., "Language
Models are Few-Shot Learners", 2020, appendix B (hyperparameters).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from restomod.config.run import OptimConfig
from restomod.model.gpt import GPT


def build(model: GPT, config: OptimConfig, dtype: torch.dtype, distributed: bool) -> list[Optimizer]:
    """Build one AdamW for all parameters; arguments as in `restomod.engine.optimizers`."""
    return [adamw(model.parameters(), config)]


def adamw(parameters: Iterable[Tensor], config: OptimConfig) -> AdamW:
    """Build torch's fused AdamW.

    GPT-3 has betas 0.9 and 0.95, eps 1e-8 and weight decay 0.1 (Brown et al., 2020, appendix B).

    Args:
        parameters: parameters to update.
        config: learning rate, betas, eps and weight decay.
    """
    return AdamW(
        decay_groups(parameters, config.weight_decay), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def decay_groups(parameters: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices and embeddings with weight decay, biases and norms without."""
    every = list(parameters)
    return [
        {"params": [p for p in every if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
    ]
