"""Peak memory of the largest process of a command.

python benchmarks/peak_memory.py restomod prepare big.txt --out tokens --workers 1
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time


def main() -> int:
    start = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", *sys.argv[1:]]).returncode
    # of children it is right on Linux too: they begin with what this process holds, which is next to nothing
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"exit code {code}, {time.perf_counter() - start:.1f} s, largest process {peak / 2**20:,.0f} MiB")
    return code


if __name__ == "__main__":
    sys.exit(main())
