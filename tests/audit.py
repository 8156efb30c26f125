"""Known vulnerabilities of the packages in constraints.txt, by pip-audit: `make audit`.

    python -m tests.audit PIP-AUDIT    path of the program, which has a separate virtual environment

The exit code is 1 if a vulnerability is known. If PyPI's vulnerability service does not answer, a message says that
nothing was checked; pip-audit alone would succeed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
NOT_CHECKED = "pip-audit: not checked: the service cannot be reached"


def audit(pins: list[str], program: str) -> list[dict[str, Any]] | None:
    """Return pip-audit's results for each of ``pins`` (NAME==VERSION); None if it fails."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins) + "\n")
        file.flush()
        flags = ["--vulnerability-service", "pypi", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
        command = [program, "-r", file.name, "-f", "json", *flags]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
        except (OSError, subprocess.TimeoutExpired, ValueError, KeyError):
            return None
    return found


def main(pins: list[str], ask: Callable[[list[str]], list[dict[str, Any]] | None]) -> int:
    """Print the known vulnerabilities of ``pins``, found by ``ask`` (see `audit`). Return the exit code."""
    first = ask(pins[:1])  # a service that does not know one package is not asked for all
    found = ask(pins) if first and "skip_reason" not in first[0] else None
    if not found:
        print(NOT_CHECKED)
        return 0
    skipped = [package["name"] for package in found if "skip_reason" in package]
    known = [(package, fault) for package in found for fault in package.get("vulns", [])]
    for package, fault in known:
        mended = f"mended in {', '.join(fault['fix_versions'])}" if fault["fix_versions"] else "not mended yet"
        print(f"pip-audit: {package['name']} {package['version']}: {fault['id']}, {mended}")
    print(f"pip-audit: {len(found) - len(skipped)} packages, {len(known) or 'no'} known vulnerabilities")
    if skipped:
        print(f"pip-audit: not checked, as PyPI does not have them: {', '.join(skipped)}")
    return 1 if known else 0


if __name__ == "__main__":
    pinned = [line for line in CONSTRAINTS.read_text().splitlines() if "==" in line and not line.startswith("#")]
    sys.exit(main(pinned, lambda pins: audit(pins, sys.argv[1])))
