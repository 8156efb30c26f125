"""Journal of a sweep, with a check of every line before Optuna reads it.

Optuna does not validate the file.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any, NotRequired

from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages.journal import JournalFileBackend
from pydantic import AfterValidator, BeforeValidator, Field
from typing_extensions import TypedDict

from restomod.data.manifest import Count, Finite
from restomod.utils.errors import UserError, one_line
from restomod.utils.json_files import as_tuple, checked, file_name, parse_json
from restomod.utils.locks import FileLock

STUDY = "sweep"
LONGEST_LINE = 2**20
CREATE_STUDY, CREATE_TRIAL, SET_STATE, SET_INTERMEDIATE, SET_USER_ATTR, LAST_OPERATION = 0, 4, 6, 7, 8, 10

Time = Annotated[float, Field(ge=0, le=1e11)]  # seconds since 1970
Attempt = tuple[Time, Time | None, str]  # start, end, GPU


class Notes(TypedDict, total=False):
    """User attributes of a trial."""

    name: Annotated[str, AfterValidator(file_name)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    attempts: list[Annotated[Attempt, BeforeValidator(as_tuple)]]
    step: Count
    reason: str


class NewNotes(Notes):
    """User attributes of a new trial, which must have a name and a seed."""

    name: Annotated[str, AfterValidator(file_name)]  # type: ignore[misc]
    seed: Annotated[int, Field(ge=0, lt=2**32)]  # type: ignore[misc]


class _Line(TypedDict):
    op_code: Annotated[int, Field(ge=0, le=LAST_OPERATION)]
    worker_id: str


class _Trial(_Line):
    trial_id: Count


class _CreateStudy(_Line):
    study_name: str
    directions: list[int]


class _CreateTrial(_Line):
    study_id: Count
    datetime_start: str | None
    state: Annotated[int, Field(ge=0, le=4)]
    distributions: dict[str, str]
    params: dict[str, Finite]
    user_attrs: NewNotes
    system_attrs: dict[str, Any]
    intermediate_values: dict[str, float]


class _SetState(_Trial):
    state: Annotated[int, Field(ge=0, le=4)]
    values: Annotated[list[Finite], Field(min_length=1, max_length=1)] | None
    datetime_complete: NotRequired[str]


class _SetIntermediate(_Trial):
    step: Count
    intermediate_value: float


class _SetUserAttr(_Trial):
    user_attr: Annotated[Notes, Field(min_length=1)]


KINDS: dict[int, Any] = {
    CREATE_STUDY: _CreateStudy,
    CREATE_TRIAL: _CreateTrial,
    SET_STATE: _SetState,
    SET_INTERMEDIATE: _SetIntermediate,
    SET_USER_ATTR: _SetUserAttr,
}


class _JournalLock(FileLock):
    """Lock of a journal. Optuna's own lock is a file that remains for half a minute after a process is killed."""

    def __init__(self, journal: Path) -> None:
        super().__init__(journal.with_name("locks") / "journal")
        self._journal = journal

    def acquire(self, wait: bool = True) -> bool:
        got = super().acquire(wait)
        drop_torn_line(self._journal)
        return got


def drop_torn_line(path: Path) -> None:
    """Remove an incomplete last line, which a full disk or a power failure can leave."""
    with open(path, "rb+") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
        if f.read(1) not in (b"", b"\n"):
            f.seek(0)
            f.truncate(f.read().rfind(b"\n") + 1)


class CheckedJournal(JournalFileBackend):
    """Optuna's journal file with validation.

    Args:
        path: journal file.
        distributions: distributions of all swept fields, which every trial must have.
    """

    def __init__(self, path: Path, distributions: dict[str, BaseDistribution]) -> None:
        super().__init__(str(path), lock_obj=_JournalLock(path))
        self.path, self._distributions = path, distributions
        self._restart()

    def _restart(self) -> None:
        self.line = 0
        """Number of lines read."""
        self._offset = 0
        self.names: list[str] = []
        """Names of the trials."""

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Yield the lines from a number on, without a last line that another process is still writing.

        Raises:
            UserError: a line is damaged.
        """
        if log_number_from < self.line:
            self._restart()
        with open(self.path, "rb") as f:
            f.seek(self._offset)
            while content := f.readline(LONGEST_LINE + 1):
                if len(content) <= LONGEST_LINE and not content.endswith(b"\n"):
                    return
                self.line += 1
                value = self._checked(content)
                self._offset += len(content)
                if self.line > log_number_from:
                    yield value

    def _checked(self, content: bytes) -> dict[str, Any]:
        if len(content) > LONGEST_LINE:
            raise self.damaged(f"longer than {LONGEST_LINE:,} bytes")
        try:
            value = parse_json(content)
        except ValueError as e:
            raise self.damaged(f"not JSON ({one_line(e)})") from None
        try:
            operation = checked(value, _Line, "it")["op_code"]
            checked(value, KINDS.get(operation, _Line), "it")
            assert isinstance(value, dict)
            if (self.line == 1 and operation != CREATE_STUDY) or value.get("study_name", STUDY) != STUDY:
                raise UserError("the first line of a journal must create the study")
            if value.get("study_id", 0) != 0 or value.get("trial_id", -1) >= len(self.names):
                raise UserError("the line that creates this trial is missing")
            if operation == CREATE_TRIAL:
                self._begin(value)
        except UserError as e:
            raise self.damaged(str(e)) from None
        return value

    def _begin(self, value: dict[str, Any]) -> None:
        name, params = value["user_attrs"]["name"], value["params"]
        try:
            distributions = {key: json_to_distribution(text) for key, text in value["distributions"].items()}
            inside = distributions == self._distributions and params.keys() == distributions.keys()
            inside = inside and all(distributions[key]._contains(number) for key, number in params.items())
        except Exception:  # Optuna raises many types for invalid distributions
            inside = False
        if not inside:
            raise UserError("the parameters do not match plan.json")
        if name in self.names:
            raise UserError(f"trial {name} is created twice")
        self.names.append(name)

    def damaged(self, why: str) -> UserError:
        """Return an error that names the line read last and the reason ``why``."""
        return UserError(
            f"{self.path}, line {self.line} is damaged: {why}; restore the file from a copy, or delete the line "
            f"(its record of a trial is lost)"
        )
