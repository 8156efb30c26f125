"""Rendezvous of several processes of one run, as under torchrun."""

from __future__ import annotations

import torch.distributed as dist


def world(count: int) -> tuple[dist.Store, list[dict[str, str]]]:
    """The store by which ``count`` processes find each other, to be kept meanwhile, and the environment of each.

    As under torchrun, the store lives outside of the processes, so it outlives whichever fails.
    """
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    return store, [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
