"""Speed of generation with and without key/value cache, compared with `transformers`.

Generation is greedy with random weights. Without cache, every token needs a forward pass over the whole context, with
lm_head only for the last position. `transformers` runs the same weights with its cache in the same compute dtype (for
bf16 all weights are converted).
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.contenders import Contender, InProcess, Measured, Round
from benchmarks.harness import BenchPlan, compare
from benchmarks.records import Comparison, Item, Metric
from restomod.config.presets import preset
from restomod.config.run import ModelConfig, SamplingConfig
from restomod.engine.device import autocast, choose_dtype, keep_freed_memory, synchronize
from restomod.generate.decode import Prompt, generate
from restomod.model.gpt import GPT, build_model
from restomod.model.hf_io import save_model

Tokens = list[list[int]]
Way = Callable[[Tokens, int], Tokens]
Ways = dict[str, Callable[[], Way]]
PROMPT, WARM = 16, 4  # tokens of a prompt; new tokens in the warm-up


def measure(plan: BenchPlan) -> Item:
    """Generate 256 new tokens for batch sizes 1 and 8."""
    device = torch.device(plan.device)
    if device.type == "cpu":
        keep_freed_memory()
    model, dtype, new = random_model(plan), choose_dtype("auto", device), plan.pick(256, 8)
    comparisons: list[Comparison] = []
    left_out: list[str] = []
    ours: Ways = {"restomod": lambda: functools.partial(cached, model, dtype)}
    theirs: Ways = {"transformers, with cache": lambda: by_transformers(exported(model, dtype).to(device))}
    plain: Ways = {"restomod without cache": lambda: functools.partial(uncached, model, dtype)}
    cases = [(1, theirs, plan.pick(4, 2, 5)), (8, theirs, plan.pick(4, 2, 5)), (1, plain, plan.pick(2, 1, 3))]
    for number, (rows, others, rounds) in enumerate(cases):
        case = f"batch size {rows}, {new} new tokens"
        if plan.late() and comparisons:
            left_out.append(f"{case}, compared with {', '.join(others)}: time limit reached")
            continue
        prompts = torch.randint(50257, (rows, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
        contenders: list[Contender] = [
            InProcess(name, rounds_of(make, prompts, new, device)) for name, make in (ours | others).items()
        ]
        share, metric = plan.part(len(cases) - number), Metric("tokens/s", "", "higher")
        comparisons.append(compare(share, case, contenders, [metric], rounds, agree=alike))
    note = f"prompts of {PROMPT} tokens, greedy, random weights; same output: share of identical texts"
    return Item("Generation with GPT-2 124M", comparisons, notes=[note], left_out=left_out)


def alike(ours: Tokens, theirs: Tokens) -> float:
    """Return the share of identical texts, 0 to 1."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def rounds_of(make: Callable[[], Way], prompts: Tokens, new: int, device: torch.device) -> Callable[[], Round]:
    """Return rounds that continue all prompts by ``new`` tokens, and by `WARM` tokens in the first round."""

    def start() -> Round:
        way, lengths = make(), iter([WARM])

        def one_round() -> Measured:
            n = next(lengths, new)
            began = time.perf_counter()
            texts = way(prompts, n)
            synchronize(device)
            return Measured({"tokens/s": len(prompts) * n / (time.perf_counter() - began)}, texts)

        return one_round

    return start


def cached(model: GPT, dtype: torch.dtype, prompts: Tokens, n: int) -> Tokens:
    """Generate with the key/value cache, as `restomod sample` does."""
    sampling = SamplingConfig(max_tokens=n, temperature=0)
    steps = list(generate(model, [Prompt(prompt, 0) for prompt in prompts], sampling, 0, dtype, stop=None))
    return [[new[i] for new in steps] for i in range(len(prompts))]


@torch.no_grad()
def uncached(model: GPT, dtype: torch.dtype, prompts: Tokens, n: int) -> Tokens:
    """Generate without a cache."""
    device = model.head.device
    context = torch.tensor(prompts, device=device)
    for _ in range(n):
        with autocast(device, dtype):
            hidden = model.transformer.forward(context)[:, -1]
            new = F.linear(hidden, model.head[: model.config.vocab_size]).argmax(-1)
        context = torch.cat([context, new[:, None]], dim=1)
    return context[:, len(prompts[0]) :].tolist()


def by_transformers(model: Any) -> Way:
    """Return a function that calls `generate` of a transformers model."""

    def way(prompts: Tokens, n: int) -> Tokens:
        ids = torch.tensor(prompts, device=model.device)
        how = {"do_sample": False, "max_new_tokens": n, "min_new_tokens": n, "pad_token_id": 0}
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        return text[:, len(prompts[0]) :].tolist()

    return way


def random_model(plan: BenchPlan) -> GPT:
    """Return GPT-2 124M, or a tiny model in a smoke test, with random weights on the device."""
    config = preset("gpt2-124m").model
    config = plan.pick(config, dataclasses.replace(config, n_layer=2, n_head=2, n_embd=64))
    assert isinstance(config, ModelConfig)
    return build_model(config, 1, torch.device(plan.device)).eval()


def exported(model: GPT, dtype: torch.dtype) -> Any:
    """Load the weights into a model of transformers."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
