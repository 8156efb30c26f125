"""Predictions of steps on 8 to 1,024 GPUs from published single-GPU speeds and network figures."""

from __future__ import annotations

from typing import Any

from benchmarks.scale_network import Network, Payload, StepTime, Tree, Work, ddp, fsdp
from restomod.config.presets import preset
from restomod.experiments.plan.hardware import SPEEDS, Speed, tokens_per_second

GB = 10**9
NCCL = "latencies and efficiency of protocol LL128: src/graph/tuning.cc of NCCL at 01afd20"
LL128 = 120 / 128  # share of data bytes in a 128-byte line; the rest are flags
TREE = Tree(start=4.4e-6, within=1.2e-6, between=8.5e-6)

NETWORKS = {
    "A100": Network(
        "NVLink 3, 8 × HDR InfiniBand",
        bandwidth=300 * GB * LL128,
        latency=1.9e-6,
        per_machine=8,
        bandwidth_out=25 * GB * LL128,
        latency_out=4.0e-6,
        start=10.0e-6,
        tree=TREE,
        source=f"NVIDIA's data sheets of A100 (600 GB/s, both directions) and DGX A100 (8 × 200 Gb/s); {NCCL}",
    ),
    "H200": Network(
        "NVLink 4, 8 × NDR InfiniBand",
        bandwidth=450 * GB * LL128,
        latency=1.9e-6,
        per_machine=8,
        bandwidth_out=50 * GB * LL128,
        latency_out=4.0e-6,
        start=10.0e-6,
        tree=TREE,
        source=f"NVIDIA's data sheets of H200 (900 GB/s, both directions) and DGX H200 (8 × 400 Gb/s); {NCCL}",
    ),
}
WORLDS = (8, 64, 1024)
MODELS = {"gpt2-124m": 16, "gpt2-1558m": 4}  # sequences of 1,024 tokens per GPU, in one micro-batch


def alone(gpu: str) -> Speed:
    """Return the published speed of a single GPU, which includes no communication."""
    return next(speed for speed in SPEEDS if speed.gpu == gpu and speed.gpus == 1)


def predictions(payloads: dict[str, Payload]) -> list[dict[str, Any]]:
    """Return a row per model, GPU, number of GPUs and method (ddp, fsdp), without overlap and with full overlap."""
    rows = []
    for name, sequences in MODELS.items():
        for gpu, network in NETWORKS.items():
            speed, config = alone(gpu), preset(name)
            tokens = sequences * config.sequence_length
            # the published step includes its update, which FSDP would shard; it is a small part
            work = Work(1, tokens / tokens_per_second(speed, config, 1), 0.0)
            for n in WORLDS:
                for way in ("ddp", "fsdp"):
                    low, high = (_step(way, payloads[name], work, n, network, overlap) for overlap in (0.0, 1.0))
                    rows.append(
                        {
                            "model": name,
                            "gpu": gpu,
                            "gpus": n,
                            "way": way,
                            "tokens_per_gpu": tokens,
                            "mfu_alone": speed.mfu,
                            "speed_source": f"{speed.software}: {speed.source}",
                            "compute_seconds": high.compute,
                            "communication_seconds": high.communication,
                            "seconds_without_overlap": low.seconds,
                            "seconds_with_overlap": high.seconds,
                            "efficiency_without_overlap": low.efficiency,
                            "efficiency_with_overlap": high.efficiency,
                            "tokens_per_second": [n * tokens / low.seconds, n * tokens / high.seconds],
                        }
                    )
    return rows


def _step(way: str, payload: Payload, work: Work, n: int, network: Network, overlap: float) -> StepTime:
    if way == "ddp":
        return ddp(payload, work, n, network, overlap)
    return fsdp(payload, work, n, network, network, network, overlap)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return predictions as lines of Markdown."""
    lines = [
        "| prediction | GPUs | method | compute, ms | communication, ms | step, ms | efficiency |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for r in rows:
        low, high = r["seconds_with_overlap"], r["seconds_without_overlap"]
        lines.append(
            f"| {r['model']} on {r['gpu']} | {r['gpus']:,} | {r['way']} | {1e3 * r['compute_seconds']:.1f} "
            f"| {1e3 * r['communication_seconds']:.1f} | {1e3 * low:.1f} to {1e3 * high:.1f} "
            f"| {r['efficiency_without_overlap']:.0%} to {r['efficiency_with_overlap']:.0%} |"
        )
    return lines
