"""A process of the two that `doctor` starts: rank 0 contributes 1, rank 1 contributes 2, and the sum is 3."""

from __future__ import annotations

import torch
import torch.distributed as dist

from restomod.engine.distributed import join_processes


def main() -> None:
    """Print a line `roundtrip BACKEND SUM` for each backend."""
    with join_processes() as processes:
        (total,) = processes.sum(processes.rank + 1.0)
        answers = {"gloo": total}
        if torch.cuda.device_count() >= processes.world_size:
            value = torch.tensor(processes.rank + 1.0, device=torch.device("cuda", processes.local_rank))
            dist.all_reduce(value)
            answers["NCCL"] = value.item()
        if processes.main:
            for backend, answer in answers.items():
                print(f"roundtrip {backend} {answer}", flush=True)


if __name__ == "__main__":
    main()
