"""The beginning of a corpus as one file of JSON lines, for `restomod prepare`.

    python -m benchmarks.gpu.corpus DATA OUT.jsonl --megabytes 66

DATA has corpus/*train*.jsonl.xz, as for `benchmarks.run --data`; without it the source of Python's library is taken.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.harness import BenchPlan
from benchmarks.texts import texts, write_json_lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.corpus", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=float, required=True, help="of text; English has about 4.4 bytes a token")
    given = parser.parse_args()
    found, what = texts(BenchPlan(given.out.parent, data=given.data), given.megabytes)
    write_json_lines(found, given.out)
    print(f"{len(found):,} documents: {what}")


if __name__ == "__main__":
    main()
