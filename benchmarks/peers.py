"""Training steps of GPT-2 124M in other projects, with their unmodified model and optimizer classes.

The few lines of their training loops are repeated here, with the defaults of their scripts for precision, torch.compile
and gradient clipping. Each function returns a step, a function that updates the model and returns the loss.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Absent
from restomod.model.gpt import GPT
from restomod.utils.errors import UserError, did_you_mean

Step = Callable[[], float]
PADDED_VOCABULARY = 50304


@dataclass(frozen=True)
class Shape:
    """Sizes of a GPT-2 model."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_positions: int = 1024

    def nanogpt_sizes(self) -> dict[str, int]:
        """Return the sizes by nanoGPT's parameter names."""
        return {"n_layer": self.n_layer, "n_head": self.n_head, "n_embd": self.n_embd, "block_size": self.n_positions}


@dataclass(frozen=True)
class StepInputs:
    """Model sizes, tokens and source code of a training step."""

    shape: Shape
    """Sizes of the model."""
    x: Tensor
    """Tokens, (B, T), int64, on the device."""
    y: Tensor
    """Targets, (B, T), int64, on the device."""
    path: Path | None
    """Checkout of the project; None for a package."""

    @property
    def device(self) -> torch.device:
        """Device of the tokens."""
        return self.x.device


def clipped_step(loss_of: Callable[[], Tensor], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """Return the step of most of these projects: backward, gradient clipping to norm 1, update."""

    def step() -> float:
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step


def restomod(inputs: StepInputs, compiled: bool, change: Callable[[GPT], None] = lambda model: None) -> Step:
    """Return the step of `restomod train gpt2-124m`; ``change`` is called with the model before torch.compile."""
    from restomod.config.presets import preset
    from restomod.engine.device import choose_dtype, compile_module, keep_freed_memory
    from restomod.engine.distributed import SINGLE
    from restomod.engine.optimizer import build_optimizer
    from restomod.engine.step import BatchLoss, ComputeConfig, train_step
    from restomod.model.gpt import build_model

    x, device = inputs.x, inputs.device
    if device.type == "cpu":
        keep_freed_memory()  # as `restomod train` does
    config = preset("gpt2-124m")
    model_config = dataclasses.replace(config.model, **dataclasses.asdict(inputs.shape))
    config = dataclasses.replace(config, model=model_config, batch_tokens=x.numel(), sequence_length=x.shape[1])
    model = build_model(config.model, 1, device)
    change(model)
    if compiled:
        compile_module(model.transformer, device)
    compute = ComputeConfig(device, choose_dtype("auto", device), len(x), compiled)
    loss_of, optimizer = BatchLoss(model, compute), build_optimizer(model, config.optim, compute.dtype)
    return lambda: train_step(loss_of, optimizer, [(x, inputs.y)], config, 1000, SINGLE).wait().loss


def transformers(inputs: StepInputs) -> Step:
    """Return the step of transformers' GPT2LMHeadModel with `Trainer`: mixed precision, fused AdamW, clipping to 1."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from restomod.engine.device import autocast, choose_dtype

    shape, device = inputs.shape, inputs.device
    sizes: dict[str, Any] = dataclasses.asdict(shape)
    sizes |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    model: Any = GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=PADDED_VOCABULARY))
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    dtype = choose_dtype("auto", device)

    def loss_of() -> Tensor:
        with autocast(device, dtype):
            # the model shifts labels by one position
            return model(input_ids=inputs.x, labels=inputs.x).loss

    return clipped_step(loss_of, model, optimizer)


def litgpt(inputs: StepInputs) -> Step:
    """Return the step of litgpt's pretrain.py with GPT-2's sizes and RoPE; litgpt has no GPT-2."""
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    from restomod.engine.device import autocast, choose_dtype

    shape, device = inputs.shape, inputs.device
    sizes = shape.nanogpt_sizes()
    config = Config(**sizes, padded_vocab_size=PADDED_VOCABULARY)
    model = GPT(config).to(device)
    with torch.device(device):
        model.max_seq_length = inputs.x.shape[1]
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    dtype = choose_dtype("auto", device)

    def loss_of() -> Tensor:
        with autocast(device, dtype):
            return chunked_cross_entropy(compiled(inputs.x), inputs.y)

    return clipped_step(loss_of, model, optimizer)


def build_nanogpt(inputs: StepInputs) -> Step:
    """Return the step of build-nanogpt's train_gpt2.py: bf16 on every device, eager."""
    names = definitions(_file(inputs.path, "train_gpt2.py"))
    names["master_process"] = False
    torch.set_float32_matmul_precision("high")
    shape, device = inputs.shape, inputs.device
    sizes = shape.nanogpt_sizes()
    model = names["GPT"](names["GPTConfig"](**sizes, vocab_size=PADDED_VOCABULARY)).to(device)
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=6e-4, device_type=device.type)

    def loss_of() -> Tensor:
        with torch.autocast(device_type=device.type, dtype=torch.bfloat16):
            return model(inputs.x, inputs.y)[1]

    return clipped_step(loss_of, model, optimizer)


def nanogpt(inputs: StepInputs) -> Step:
    """Return the step of nanoGPT's train.py: bf16 and compiled on a GPU; fp32 and eager on a CPU, as in its README."""
    names = definitions(_file(inputs.path, "model.py"))
    shape, device = inputs.shape, inputs.device
    sizes = shape.nanogpt_sizes()
    model = names["GPT"](names["GPTConfig"](**sizes, vocab_size=PADDED_VOCABULARY, dropout=0.0, bias=True)).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    on_gpu = device.type == "cuda"
    forward = torch.compile(model) if on_gpu else model
    context = torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    def loss_of() -> Tensor:
        with context:
            return forward(inputs.x, inputs.y)[1]

    return clipped_step(loss_of, model, optimizer)


def nanochat(inputs: StepInputs) -> Step:
    """Return the step of nanochat's base_train.py: value embeddings, untied lm_head, Muon, compiled."""
    file = _file(inputs.path, "nanochat/gpt.py")
    sys.path.insert(0, str(file.parents[1].absolute()))
    from nanochat.gpt import GPT, GPTConfig

    shape, device = inputs.shape, inputs.device
    heads = max(1, shape.n_embd // 128)  # base_train.py: head size 128
    sizes = {"n_layer": shape.n_layer, "n_head": heads, "n_kv_head": heads, "n_embd": shape.n_embd}
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes, vocab_size=PADDED_VOCABULARY, sequence_len=inputs.x.shape[1]))
    model.to_empty(device=device)
    model.init_weights()
    compiled, optimizer = torch.compile(model, dynamic=False), model.setup_optimizer()

    def step() -> float:
        loss = compiled(inputs.x, inputs.y)
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return float(loss.item())

    return step


PACKAGES: dict[str, Callable[[StepInputs], Step]] = {"transformers": transformers, "litgpt": litgpt}
CHECKOUTS: dict[str, Callable[[StepInputs], Step]] = {
    "build-nanogpt": build_nanogpt,
    "nanogpt": nanogpt,
    "nanochat": nanochat,
}
NAMES = ", ".join(CHECKOUTS)


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add --peer NAME=PATH, which may be repeated; `parse` reads its values."""
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help=f"checkout of another project to compare with; NAME is one of {NAMES}",
    )


def parse(peer: str) -> tuple[str, Path]:
    """Parse NAME=PATH of --peer; raises UserError if the name is unknown or the folder does not exist."""
    name, _, path = peer.partition("=")
    if name not in CHECKOUTS:
        raise UserError(f"unknown peer {name!r}{did_you_mean(name, CHECKOUTS)}")
    if not Path(path).is_dir() or not path:
        raise UserError(f"--peer {peer}: no such folder; clone the project and give its folder, --peer {name}=PATH")
    return name, Path(path)


def definitions(path: Path) -> dict[str, Any]:
    """Return the imports, classes and functions of a script without running its other statements."""
    kept = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, kept) and "hellaswag" not in ast.unparse(node)[:40]]
    module = type(sys)(path.stem)
    sys.modules[path.stem] = module
    exec(compile(tree, str(path), "exec"), module.__dict__)
    return module.__dict__


def _file(checkout: Path | None, name: str) -> Path:
    if checkout is None:
        raise Absent("no checkout given with --peer")
    if not (checkout / name).exists():
        raise Absent(f"the checkout has no file {name}")
    return checkout / name
