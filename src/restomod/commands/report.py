"""Command `report`: write a page about runs."""

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
PAGE_CONTENT = """\
The page contains losses and speeds, evaluations, samples and prompts, passages
of the validation text (with report --error-analysis), all settings with the paths of the
data, the commands without --then, versions and the kind of machine; no host
names and no environment variables. Home folders are shortened to ~, and what
looks like a token, key or password is redacted. Look at it before you share it:
secrets in other forms are not recognised."""


@dataclass(frozen=True, kw_only=True)
class PriceArguments:
    price: float | None = None
    """US dollars for one GPU and one hour (on a CPU: for one process and one hour), for the cost of the run, overhead
    included."""
    watts: float | None = None
    """Mean power of the whole machine in watts, for the energy."""

    def rates(self) -> HourlyRates:
        """Return the rates; raises UserError for one out of range."""
        require_number("--price", self.price)
        require_number("--watts", self.watts)
        return HourlyRates(self.price, self.watts)


@dataclass(frozen=True, kw_only=True)
class ReportArguments(PriceArguments):
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")] = ()
    """Folders of runs, finished or not."""
    out: Path | None = None
    """HTML file to write. Default: report.html in the run's folder; for several runs, in the current folder."""
    markdown: Path | None = None
    """Also write the numbers and texts as Markdown to this file."""
    png: Path | None = None
    """Also draw the curves as PNG files in this folder."""
    error_analysis: bool = False
    """First analyse the errors of the newest checkpoint: validation loss by kind of token, position, source and
    passage; kept in the run's folder for later reports. The only part that needs the model, its data, and time."""
    error_analysis_tokens: int = 100_000
    """Number of validation tokens of the error analysis, spread evenly over the split."""
    device: Device = "auto"
    """Device of the error analysis. auto: CUDA, else MPS, else CPU."""
    precision: Precision = "auto"
    """Compute dtype of the error analysis. auto: bf16 if supported in hardware, else fp16 on a GPU that has it, else
    fp32."""


def run(arguments: list[str]) -> int:
    """Write a report."""
    given = parse(ReportArguments, arguments, "restomod report", description=PAGE_CONTENT)
    if not given.runs:
        raise UserError("name a run: restomod report runs/NAME (restomod report --help)")
    require_size("--error-analysis-tokens", given.error_analysis_tokens)
    rates = given.rates()
    alone = ("--error-analysis-tokens", "--device", "--precision")
    refuse_ignored(arguments, {} if given.error_analysis else dict.fromkeys(alone, "without --error-analysis"))

    from restomod.analysis.report.write import open_runs, report, require_writable

    runs = open_runs(given.runs)
    default = runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html")
    if given.out is None:  # a link there may lead to a file that nobody has named
        require_inside(default.parent, default)
    files = given.out or default, given.markdown, given.png
    require_writable(*files)
    if given.error_analysis:
        from restomod.analysis.report.error_analysis import analyse_errors

        for each in runs:
            analyse_errors(each, given.error_analysis_tokens, given.device, given.precision)
    report(runs, *files, rates)
    return 0
