"""Rendezvous of several ranks on this machine, as with torchrun."""

from __future__ import annotations

import torch.distributed as dist


def world(count: int) -> tuple[dist.Store, list[dict[str, str]]]:
    """Return a rendezvous store for ``count`` ranks, and the environment variables of each.

    The caller must keep the store while the ranks run. As with torchrun, it is in another process than the ranks, so it
    survives a failed rank.
    """
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    return store, [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
