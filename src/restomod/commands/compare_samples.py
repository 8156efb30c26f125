"""Command `compare-samples`: generate text with two models from the same prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from restomod.commands.flags import GenerateArguments
from restomod.commands.parsing import parse

MEMORY_HINT = "use fewer prompts, or lower --max-tokens"


@dataclass(frozen=True, kw_only=True)
class CompareSamplesArguments(GenerateArguments):
    """Flags of `restomod compare-samples`."""

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """First model: run (newest checkpoint), model folder, or name on the Hugging Face hub such as gpt2."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """Second model: run (newest checkpoint), model folder, or name on the Hugging Face hub such as gpt2."""
    out: str | None = None
    """File for the texts: Markdown (.md) or HTML (.html). None: no file."""


def run(arguments: list[str]) -> int:
    """Print the texts side by side, write the requested file, and return 0."""
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
