"""Helpers for tests of models: random weights, and the same model built by `transformers`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from restomod.config.run import ModelConfig
from restomod.model.gpt import GPT

CPU = torch.device("cpu")


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> Tensor:
    """Return random token ids, (batch, length) int64."""
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def paired(ours: GPT, theirs: GPT2LMHeadModel) -> Iterator[tuple[str, Tensor, Tensor, bool]]:
    """Yield name, our parameter, theirs, and whether theirs is transposed, for every parameter of both models."""
    parameters = dict(ours.named_parameters())
    for path, module in theirs.named_modules():
        if path != "lm_head":  # tied to the token embedding
            for name, parameter in module.named_parameters(recurse=False):
                transposed = isinstance(module, Conv1D) and name == "weight"
                yield f"{path}.{name}", parameters.pop(f"{path}.{name}"), parameter, transposed
    assert not parameters, "parameters that transformers' GPT-2 lacks"


@torch.no_grad()
def to_transformers(model: GPT) -> GPT2LMHeadModel:
    """Return a GPT-2 of transformers with the weights of our model."""
    c = model.config
    sizes = {name: getattr(c, name) for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, attn_implementation="eager"))
    for _, ours, parameter, transposed in paired(model, theirs):
        parameter.copy_((ours.t() if transposed else ours)[: len(parameter)])
    return theirs.eval()
