"""Command `sample`: generate text with one model."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from restomod.commands.flags import GenerateArguments, ModelArguments
from restomod.commands.parsing import parse
from restomod.config.model import require_size
from restomod.utils.output import raw_stream

MEMORY_HINT = "use fewer prompts, or lower --num-samples or --max-tokens"


@dataclass(frozen=True, kw_only=True)
class SampleArguments(GenerateArguments, ModelArguments):
    """Flags of `restomod sample`."""

    num_samples: int = 3
    """Number of texts per prompt. Without a prompt, every text starts a new document."""
    stream: bool = False
    """Generate the texts sequentially and print every token immediately. A single text in a terminal is always
    streamed."""


def run(arguments: list[str]) -> int:
    """Print generated texts, without control characters in a terminal and unchanged otherwise, and return 0."""
    parsed = parse(SampleArguments, arguments, "restomod sample")
    require_size("--num-samples", parsed.num_samples, most=10**6)
    settings, n = parsed.settings(arguments), parsed.num_samples

    from restomod.generate.text import choose_prompts, sample_texts, stream_texts

    prompts = choose_prompts(parsed.prompt, parsed.prompt_file, ("",))
    terminal, count = sys.stdout.isatty(), len(prompts) * n
    how = parsed.model, prompts, n, settings, parsed.seed, parsed.device, parsed.precision
    pieces: Iterable[Iterable[str]]
    if parsed.stream or (terminal and count == 1):
        pieces = stream_texts(*how)
    else:
        pieces = ([text] for texts in sample_texts(*how) for text in texts)
    for i, text in enumerate(pieces):
        print(f"--- {i + 1} of {count} ---")
        for piece in itertools.chain([prompts[i // n]], text):
            print(piece, end="", flush=True, file=sys.stdout if terminal else raw_stream(sys.stdout))
        print()
    return 0
