"""How fast text is generated: with the key/value cache, without, and by `transformers`, alternately in one run.

    python benchmarks/generation.py [--preset gpt2-124m] [--prompt 16] [--tokens 256] [--rows 1] [--precision fp32]

Greedy, from random weights. "without cache" passes the whole context for every token, and only its last position
through the head. `transformers` runs the same weights, with its cache, in the same precision (bf16: all weights
converted). Prints the median tokens/s of the rounds, in which all continue the same prompts, and whether the tokens
are equal.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from restomod.config import SamplingConfig
from restomod.device import autocast, choose_dtype, describe_device
from restomod.generate import Request, generate
from restomod.model.gpt import GPT, build_model
from restomod.model.pretrained import save_model
from restomod.presets import preset

Tokens = list[list[int]]
CPU = torch.device("cpu")


def cached(model: GPT, prompts: Tokens, sampling: SamplingConfig, dtype: torch.dtype) -> Tokens:
    steps = list(generate(model, [Request(prompt, 0) for prompt in prompts], sampling, 0, dtype, stop=None))
    return [[new[i] for new in steps] for i in range(len(prompts))]


@torch.no_grad()
def uncached(model: GPT, prompts: Tokens, sampling: SamplingConfig, dtype: torch.dtype) -> Tokens:
    context = torch.tensor(prompts)
    for _ in range(sampling.max_tokens):
        with autocast(CPU, dtype):
            hidden = model.transformer.forward(context)[:, -1]
            new = F.linear(hidden, model.head[: model.config.vocab_size]).argmax(-1)
        context = torch.cat([context, new[:, None]], dim=1)
    return context[:, len(prompts[0]) :].tolist()


def transformers(model: PreTrainedModel, prompts: Tokens, sampling: SamplingConfig) -> Tokens:
    ids = torch.tensor(prompts)
    mask, n = torch.ones_like(ids), sampling.max_tokens
    text = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=n, min_new_tokens=n, pad_token_id=0)
    return text[:, len(prompts[0]) :].tolist()


def exported(model: GPT, dtype: torch.dtype) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="gpt2-124m")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of each row")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    a = parser.parse_args()
    model = build_model(preset(a.preset).model, 0, CPU).eval()
    dtype = choose_dtype(a.precision, CPU)
    sampling = SamplingConfig(max_tokens=a.tokens, temperature=0)
    prompts = torch.randint(50257, (a.rows, a.prompt), generator=torch.Generator().manual_seed(0)).tolist()
    theirs = exported(model, dtype)
    ways: dict[str, Callable[[], Tokens]] = {
        "with cache": lambda: cached(model, prompts, sampling, dtype),
        "without cache": lambda: uncached(model, prompts, sampling, dtype),
        "transformers, with cache": lambda: transformers(theirs, prompts, sampling),
    }
    print(
        f"{describe_device(CPU)}, torch {torch.__version__}: {a.preset}, rows: {a.rows}, "
        f"prompts of {a.prompt} tokens, {a.tokens} new ones, {a.precision}, median (range) of {a.rounds} rounds"
    )
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    texts = {}
    for _ in range(a.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            texts[name] = way()
            speeds[name].append(a.rows * a.tokens / (time.perf_counter() - start))
    ours = speeds["with cache"]
    for name, values in speeds.items():
        ratio = statistics.median(x / y for x, y in zip(ours, values, strict=True))
        equal = "the same tokens" if texts[name] == texts["with cache"] else "other tokens"
        print(
            f"{name:<26} {statistics.median(values):7.1f} tokens/s  ({min(values):.1f} to {max(values):.1f})  "
            f"ours is {ratio:.2f} times as fast  {equal}"
        )


if __name__ == "__main__":
    main()
