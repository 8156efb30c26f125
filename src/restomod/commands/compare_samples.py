"""Command `compare-samples`: generate text with two models from the same prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from restomod.commands.flags import GenerateArguments
from restomod.commands.parsing import parse

MEMORY_HINT = "give fewer prompts, or lower --max-tokens"


@dataclass(frozen=True, kw_only=True)
class CompareSamplesArguments(GenerateArguments):
    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """A run (its newest checkpoint is used), a model folder, or a name on the Hugging Face hub, such as gpt2."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """The other model, named in the same way."""
    out: str | None = None
    """Also write the texts to this file: Markdown (.md) or a page for the browser (.html)."""


def run(arguments: list[str]) -> int:
    """Print the texts side by side, and write them if asked to. Returns 0."""
    parsed = parse(CompareSamplesArguments, arguments, "restomod compare-samples")
    settings = parsed.settings(arguments)

    from restomod.generate.compare import DEFAULT_PROMPTS, compare_samples, samples_table, samples_writer
    from restomod.generate.text import choose_prompts

    write = samples_writer(parsed.out, parsed.prompt_file)
    prompts = choose_prompts(parsed.prompt, parsed.prompt_file, DEFAULT_PROMPTS)
    compared = compare_samples(parsed.a, parsed.b, prompts, settings, parsed.seed, parsed.device, parsed.precision)
    print(samples_table(compared), end="")
    write(compared)
    return 0
