"""Seconds of a command, and peak memory of its largest process.

    python -m benchmarks.peak_memory restomod prepare big.txt --out tokens --workers 1

With --json the command's output goes to standard error and one line of JSON to standard output. The launcher is a
separate small process because a program inherits the peak memory of its parent.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time


def main() -> int:
    """Run the command and return its exit code, 0 with --json."""
    arguments = sys.argv[1:]
    as_json = arguments[:1] == ["--json"]
    start = time.perf_counter()
    try:
        code = subprocess.run(arguments[as_json:], stdout=sys.stderr if as_json else None).returncode
    except OSError as e:
        print(f"{arguments[as_json]}: {e.strerror}", file=sys.stderr)
        code = 127
    seconds = time.perf_counter() - start
    # on Linux the children inherit the peak of this process, which is small
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if as_json:
        print(json.dumps({"seconds": seconds, "peak_bytes": peak, "code": code}))
        return 0
    print(f"exit code {code}, {seconds:.1f} s, largest process {peak / 2**20:,.0f} MiB")
    return code


if __name__ == "__main__":
    sys.exit(main())
