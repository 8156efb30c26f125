"""Command `report`: write a page about runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from restomod.analysis.report.usage import Prices
from restomod.commands.parsing import parse, refuse_ignored
from restomod.config.run import Device, Precision
from restomod.utils.errors import UserError
from restomod.utils.files import require_inside

MEMORY_HINT = "lower --examine-tokens, or report fewer runs"
PAGE_HOLDS = """\
The page contains losses and speeds, evaluations, samples and prompts, passages
of the validation text (with report --examine), all settings with the paths of the
data, the commands without --then, versions and the kind of machine; no host
names and no environment variables. Home folders are shortened to ~, and what
looks like a token, key or password is redacted. Look at it before you share it:
secrets in other forms are not recognised."""


@dataclass(frozen=True, kw_only=True)
class PriceArguments:
    price: float | None = None
    """US dollars for one GPU and one hour (on a CPU: for one process and one hour), for the cost of the run, idle time
    included."""
    watts: float | None = None
    """The mean draw of the whole machine, for the energy."""

    def prices(self) -> Prices:
        """Raises UserError where one is out of its range."""
        for name in ("price", "watts"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"--{name} is {value}; it must be 0 or more")
        return Prices(self.price, self.watts)


@dataclass(frozen=True, kw_only=True)
class ReportArguments(PriceArguments):
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")] = ()
    """Folders of runs, finished or not."""
    out: str | None = None
    """The page to write. Default: report.html in the run's folder; for several runs, in this one."""
    markdown: str | None = None
    """Write the numbers and texts as Markdown into this file, too."""
    png: str | None = None
    """Draw the curves into this folder, too."""
    examine: bool = False
    """First find out where the newest checkpoint is strong and weak, by kind of token, position, source and passage;
    kept in the run's folder for later reports. The only part that needs the model, its data, and time."""
    examine_tokens: int = 100_000
    """On so many validation tokens, spread over all there are."""
    device: Device = "auto"
    """Where to examine. auto: CUDA, else MPS, else CPU."""
    precision: Precision = "auto"
    """Of the matrix products."""


def run(arguments: list[str]) -> int:
    """Write a report."""
    given = parse(ReportArguments, arguments, "restomod report", description=PAGE_HOLDS)
    if not given.runs:
        raise UserError("name a run: restomod report runs/NAME (restomod report --help)")
    if given.examine_tokens < 1:
        raise UserError(f"--examine-tokens is {given.examine_tokens}; it must be at least 1")
    prices = given.prices()
    alone = ("--examine-tokens", "--device", "--precision")
    refuse_ignored(arguments, {} if given.examine else dict.fromkeys(alone, "without --examine"))

    from restomod.analysis.report.write import open_runs, report, require_writable

    runs = open_runs(given.runs)
    default = runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html")
    out = Path(given.out) if given.out is not None else default
    if given.out is None:  # nobody has named the file that a link there leads to
        require_inside(default.parent, default)
    markdown, png = (Path(name) if name is not None else None for name in (given.markdown, given.png))
    require_writable(out, markdown, png)
    if given.examine:
        from restomod.analysis.report.examine import analyse_errors

        for each in runs:
            analyse_errors(each, given.examine_tokens, given.device, given.precision)
    report(runs, out, markdown, png, prices)
    return 0
