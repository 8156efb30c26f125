"""Command `report`: write an HTML report about runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from restomod.analysis.report.usage import HourlyRates
from restomod.commands.parsing import parse, refuse_ignored, require_number
from restomod.config.model import require_size
from restomod.config.run import Device, Precision
from restomod.utils.errors import UserError
from restomod.utils.files import require_inside

MEMORY_HINT = "lower --error-analysis-tokens, or report fewer runs"
RARE = ("error_analysis_tokens", "device", "precision", "watts")
PAGE_CONTENT = (
    "The page contains: losses and speeds, evaluations, prompts and samples, all settings, data paths, command lines "
    "without --then, versions, the type of the machine, and with `report --error-analysis` passages of the validation "
    "text. It contains no host names and no environment variables. Home folders are shortened to ~. Text that looks "
    "like a token, key or password is redacted, but other secrets are not recognised: read the page before you share "
    "it."
)


@dataclass(frozen=True, kw_only=True)
class PriceArguments:
    """Flags for the cost and energy of a run."""

    price: float | None = None
    """Price in US dollars of one GPU for one hour (on a CPU: of one process for one hour), for the cost of the run
    with its overhead. None: no cost."""
    watts: float | None = None
    """Mean power of the complete machine in watts, for the energy of the run. None: no energy."""

    def rates(self) -> HourlyRates:
        """Return the hourly rates.

        Raises:
            UserError: a rate is out of range.
        """
        require_number("--price", self.price)
        require_number("--watts", self.watts)
        return HourlyRates(self.price, self.watts)


@dataclass(frozen=True, kw_only=True)
class ReportArguments(PriceArguments):
    """Flags of `restomod report`."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")] = ()
    """Folders of finished or unfinished runs."""
    out: Path | None = None
    """HTML file of the report. None: report.html in the run's folder, or in the current folder for several runs."""
    markdown: Path | None = None
    """Markdown file for the same numbers and texts. None: no file."""
    png: Path | None = None
    """Folder for plots of the curves (PNG). None: no plots."""
    error_analysis: bool = False
    """Analyse the errors of the newest checkpoint: validation loss by kind of token, position, source and passage. This
    takes time and needs the model and its data. The result is saved in the run's folder for later reports."""
    error_analysis_tokens: int = 100_000
    """Number of validation tokens for --error-analysis, evenly spaced over the split."""
    device: Device = "auto"
    """Device for --error-analysis. auto: CUDA, else MPS, else CPU."""
    precision: Precision = "auto"
    """Compute dtype of matmuls for --error-analysis. auto: bf16 if the hardware supports it, else fp16 on a GPU that
    supports it, else fp32."""


def run(arguments: list[str]) -> int:
    """Write a report, and return 0."""
    given = parse(ReportArguments, arguments, "restomod report", rare=RARE, notes=PAGE_CONTENT)
    if not given.runs:
        raise UserError("name a run: restomod report runs/NAME (restomod report --help)")
    require_size("--error-analysis-tokens", given.error_analysis_tokens)
    rates = given.rates()
    alone = ("--error-analysis-tokens", "--device", "--precision")
    refuse_ignored(arguments, {} if given.error_analysis else dict.fromkeys(alone, "without --error-analysis"))

    from restomod.analysis.report.write import open_runs, report, require_writable

    runs = open_runs(given.runs)
    default = runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html")
    if given.out is None:  # a link at the default path could overwrite a file outside the run
        require_inside(default.parent, default)
    files = given.out or default, given.markdown, given.png
    require_writable(*files)
    if given.error_analysis:
        from restomod.analysis.report.error_analysis import analyse_errors

        for each in runs:
            analyse_errors(each, given.error_analysis_tokens, given.device, given.precision)
    report(runs, *files, rates)
    return 0
