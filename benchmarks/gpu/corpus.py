"""Extract of a corpus as one JSON lines file for `restomod prepare`.

    python -m benchmarks.gpu.corpus DATA OUT.jsonl --megabytes 66

DATA has corpus/*train*.jsonl.xz, as for `benchmarks.run --data`; without it, the text is the source of Python's
standard library.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.harness import BenchPlan
from benchmarks.texts import texts, write_json_lines


def main() -> None:
    """Write the extract."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.corpus", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with corpus/")
    parser.add_argument("out", type=Path, help="JSON lines file to write")
    parser.add_argument(
        "--megabytes", type=float, required=True, help="size of the text in MB; English has about 4.4 bytes per token"
    )
    given = parser.parse_args()
    found, what = texts(BenchPlan(given.out.parent, data=given.data), given.megabytes)
    write_json_lines(found, given.out)
    print(f"{len(found):,} documents: {what}")


if __name__ == "__main__":
    main()
