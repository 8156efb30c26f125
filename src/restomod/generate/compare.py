"""Comparison of the texts of two models: table for the terminal, Markdown, HTML.

Prompts and continuations are escaped in all formats, so that markup in them has no effect.
"""

from __future__ import annotations

import dataclasses
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from restomod.config.run import Device, Precision, SamplingConfig
from restomod.generate.text import find_readable_model, sample_texts
from restomod.utils.errors import UserError
from restomod.utils.files import resolve_destination, write_text_atomically
from restomod.utils.output_files import Output, require_outputs, write_outputs
from restomod.utils.redaction import redact
from restomod.utils.text import markdown_cell, visible

DEFAULT_PROMPTS = ("Hello, I'm a language model,", "Once upon a time", "The capital of France is")


@dataclass(frozen=True)
class SampleComparison:
    """Continuations of the same prompts by two models."""

    models: tuple[str, str]
    """Names of the models."""
    settings: str
    """Description of the sampling settings."""
    rows: tuple[tuple[str, str, str], ...]
    """One row per prompt: the prompt and both continuations."""


def compare_samples(
    a: str,
    b: str,
    prompts: Sequence[str],
    sampling: SamplingConfig,
    seed: int,
    device: Device = "auto",
    precision: Precision = "auto",
) -> SampleComparison:
    """Continue the same prompts with two models and the same random numbers.

    Args:
        a: first model (see `find_model`).
        b: second model.
        prompts: texts to continue; an empty prompt starts a new document.
        sampling: sampling settings.
        seed: seed of the random numbers.
        device: device of both models.
        precision: compute dtype.

    Raises:
        UserError: a model is missing or damaged; both are checked before the first text is generated.
    """
    names = a, b
    folders = [find_readable_model(name) for name in names]
    texts = [
        [text for (text,) in sample_texts(name, prompts, 1, sampling, seed, device, precision, folder)]
        for name, folder in zip(names, folders, strict=True)
    ]
    labels = [_label(name, folder) for name, folder in zip(names, folders, strict=True)]
    return SampleComparison(
        (labels[0], labels[1]),
        f"{sampling.max_tokens} tokens, temperature {sampling.temperature:g}, top-k {sampling.top_k}, "
        f"top-p {sampling.top_p:g}, seed {seed}",
        tuple(zip(prompts, *texts, strict=True)),
    )


def _label(name: str, folder: Path) -> str:
    """Return the name of a model, with the name of the checkpoint if it is a run."""
    return f"{name} ({folder.name})" if folder.parent == Path(name) / "checkpoints" else name


def samples_writer(out: str | None, prompt_file: str | None = None) -> Callable[[SampleComparison], None]:
    """Return a function that writes a comparison to a file, atomically.

    Call this before generating texts, so that an invalid path is refused immediately.

    Args:
        out: path that ends in .md or .html; devices and named pipes may have any name, and receive Markdown. None
            returns a function without effect.
        prompt_file: input file that must not be overwritten.

    Raises:
        UserError: ``out`` is not writable, has another ending, or equals ``prompt_file``.
    """
    if out is None:
        return lambda comparison: None
    path = Path(out)
    formats = {".md": samples_markdown, ".html": samples_html}
    require_outputs({"--out": path}, {"--prompt-file": Path(prompt_file) if prompt_file is not None else None})
    if path.suffix not in formats and resolve_destination(path).is_regular:
        raise UserError(f"--out {out}: the file name must end in .md (Markdown) or .html (web page)")
    text_of = formats.get(path.suffix, samples_markdown)

    def write(comparison: SampleComparison) -> None:
        text = text_of(SampleComparison(*redact(dataclasses.astuple(comparison))))
        write_outputs([Output(path, lambda path: write_text_atomically(path, text))])

    return write


def samples_table(comparison: SampleComparison, width: int | None = None) -> str:
    """Format a comparison as text, with a table of two columns under each prompt.

    Args:
        comparison: texts to format.
        width: characters per line; None uses the width of the terminal.
    """
    from rich.box import HORIZONTALS
    from rich.table import Table
    from rich.text import Text

    from restomod.utils.terminal import Terminal

    console = Terminal(file=io.StringIO(), width=width or Terminal().width, highlight=False, force_terminal=False)
    for i, (prompt, *texts) in enumerate(comparison.rows):
        table = Table(box=HORIZONTALS, expand=True, show_header=True, padding=(0, 2, 0, 0))
        for model in comparison.models:
            table.add_column(Text(visible(model)), ratio=1, overflow="fold")
        table.add_row(*(Text(visible(text)) for text in texts))
        console.print(Text(f"{i + 1}. {prompt or '(a new document)'}"))
        console.print(table)
    console.print(Text(comparison.settings))
    return console.file.getvalue()  # type: ignore[attr-defined]


def samples_markdown(comparison: SampleComparison) -> str:
    """Format a comparison as a Markdown table (GitHub's dialect), with one row per prompt."""
    lines = [
        f"# {markdown_cell(' and '.join(comparison.models))}",
        "",
        markdown_cell(comparison.settings),
        "",
        f"| prompt | {' | '.join(map(markdown_cell, comparison.models))} |",
        "|---|---|---|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(map(markdown_cell, row))} |" for row in comparison.rows)]) + "\n"


HTML_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere; }}
.settings {{ opacity: 0.7; }}
table {{ width: 100%; table-layout: fixed; border-collapse: collapse; margin: 1.5rem 0; }}
caption, th {{ text-align: left; font-weight: 600; }}
caption {{ padding: 0.5rem 0.75rem; background: #8883; border-radius: 0.4rem; }}
th, td {{ padding: 0.5rem 0.75rem; vertical-align: top; border-bottom: 1px solid #8886; overflow-wrap: anywhere; }}
th {{ font-size: 0.85rem; opacity: 0.7; }}
caption, td {{ white-space: pre-wrap; }}
td {{ font-family: ui-monospace, monospace; font-size: 0.85rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="settings">{settings}</p>
{tables}
</body>
</html>
"""


def samples_html(comparison: SampleComparison) -> str:
    """Format a comparison as a self-contained HTML page without scripts, with one table per prompt."""
    heads = "".join(f'<th scope="col">{_html(model)}</th>' for model in comparison.models)
    tables = [
        f"<table>\n<caption>{_html(prompt or '(a new document)')}</caption>\n<tr>{heads}</tr>\n"
        f"<tr>{_cells(texts)}</tr>\n</table>"
        for prompt, *texts in comparison.rows
    ]
    title = _html(" and ".join(comparison.models))
    return HTML_PAGE.format(title=title, settings=_html(comparison.settings), tables="\n".join(tables))


def _cells(texts: Sequence[str]) -> str:
    return "".join(f'<td dir="auto">{_html(text)}</td>' for text in texts)


def _html(text: str) -> str:
    return html.escape(visible(text))
