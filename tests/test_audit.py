"""The audit of pinned packages fails for known vulnerabilities and reports packages that were not checked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.audit import NOT_CHECKED, audit, main

CLEAN = {"name": "a", "version": "1", "vulns": []}
FAULTY = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited: c (1)"}


@pytest.mark.parametrize(
    ("answers", "code", "said"),
    [
        ([CLEAN, CLEAN], 0, "2 packages, no known"),
        ([CLEAN, FAULTY], 1, "b 2: CVE-1, mended in 3"),
        ([FAULTY, UNKNOWN], 1, "not checked, as PyPI does not have them: c"),
        ([UNKNOWN, UNKNOWN], 0, NOT_CHECKED),
        (None, 0, NOT_CHECKED),
    ],
)
def test_answers(
    answers: list[dict[str, Any]] | None, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["a==1", "b==2"], lambda pins: None if answers is None else answers[: len(pins)]) == code
    assert said in capsys.readouterr().out


def test_the_output_of_the_program_is_parsed(tmp_path: Path) -> None:
    """Use a fake program with the output of pip-audit 2.10.1, one that fails, and one that is missing."""
    program = tmp_path / "pip-audit"
    program.write_text(f"#!{sys.executable}\nprint('{json.dumps({'dependencies': [FAULTY], 'fixes': []})}')\nexit(1)\n")
    program.chmod(0o755)
    assert audit(["b==2"], str(program)) == [FAULTY]
    program.write_text("#!/bin/sh\necho cannot connect >&2; exit 1\n")
    assert audit(["b==2"], str(program)) is None
    assert audit(["b==2"], str(tmp_path / "missing")) is None
