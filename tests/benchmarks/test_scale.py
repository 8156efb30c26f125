"""Tests of the simulation of scale: its checks detect errors, and its network model follows the formulas."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks import scale
from benchmarks import scale_data as data
from benchmarks import scale_gpus as gpus
from benchmarks import scale_network as network
from benchmarks import scale_steps as steps
from restomod.config.presets import preset
from restomod.data.batches import Batches, permute
from restomod.data.dataset import MAX_MAPPED_SHARDS, open_dataset
from restomod.model.flops import padded_parameters

TEN_TRILLION = 10**13


def reader(tokens: int, ranks: int = 8, share: int = 2, T: int = 8, shard_tokens: int = 1001) -> data.Reader:
    return data.Reader(Batches(data.numbered_stream(tokens, shard_tokens, T), T, ranks * share, seed=1), ranks)


# --- data loading -------------------------------------------------------------------------------------------


@given(n=st.integers(1, 2**62), seed=st.integers(0, 2**40), epoch=st.integers(0, 99), data_=st.data())
def test_the_inverse_permutation_inverts_the_permutation(n: int, seed: int, epoch: int, data_: st.DataObject) -> None:
    index = np.array(data_.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=4)))
    assert data.unpermute(permute(index, n, seed, epoch), n, seed, epoch).tolist() == index.tolist()
    assert permute(data.unpermute(index, n, seed, epoch), n, seed, epoch).tolist() == index.tolist()


def test_numbered_windows_begin_with_their_numbers_across_shards() -> None:
    stream = data.numbered_stream(TEN_TRILLION, 10**8, 1024)
    assert len(stream) == TEN_TRILLION
    last = (TEN_TRILLION - 1) // 1024 - 1
    assert last == 9_765_624_998
    assert stream.read(last * 1024, 4).tolist() == [last % 50_000, last // 50_000 % 50_000, last // 50_000**2, 0]
    crossing = 10**8 // 1024  # this window is in two shards
    tokens = stream.read(crossing * 1024, 1025).tolist()
    assert tokens == [crossing % 50_000, crossing // 50_000, *[0] * 1022, (crossing + 1) % 50_000]


@pytest.mark.parametrize("tokens", [8 * 160 + 1, 8 * 163 + 5])
def test_all_ranks_together_read_every_window_once_an_epoch(tokens: int) -> None:
    assert [reader(tokens).missing(epoch) for epoch in range(3)] == [0, 0, 0]


def test_ranks_of_ten_trillion_tokens_are_disjoint_and_match_the_inverse() -> None:
    r = reader(TEN_TRILLION, ranks=32, T=1024, shard_tokens=10**8)
    n, end = r.batches.n_windows, r.batches.n_windows // 64
    assert n == 9_765_624_999
    assert r.duplicates([0, 1, end // 2, end - 1, end, end + 1]) == (6 * 64, 0)
    assert r.not_found(np.array([0, 1, n // 3, n - 1])) == 0


class Greedy(Batches):
    """Faulty batches: every rank reads the sequences of rank 0."""

    def micro_batches(self, step: int, micro_batch: int, rank: int = 0, world_size: int = 1):  # type: ignore[no-untyped-def]
        return super().micro_batches(step, micro_batch, 0, world_size)


def test_duplicates_between_ranks_are_detected() -> None:
    batches = Greedy(data.numbered_stream(8 * 160 + 1, 1001, 8), 8, 16, seed=1)
    r = data.Reader(batches, 8)
    assert r.duplicates([0, 3]) == (32, 28)
    assert r.missing() == 160
    assert r.not_found(np.arange(160)) == 140


def test_wrong_targets_are_detected() -> None:
    x, y = reader(8 * 160 + 1).batches.load(np.array([3, 4]))
    assert data.windows_read([(x, y)]) == [3, 4]
    with pytest.raises(AssertionError, match="targets"):
        data.windows_read([(x, x)])
    wrong = y.clone()
    wrong[1, -1] += 1
    with pytest.raises(AssertionError, match="last target"):
        data.windows_read([(x, wrong)])


# --- time and memory ----------------------------------------------------------------------------------------


def test_the_memory_of_a_step_does_not_depend_on_the_number_of_tokens() -> None:
    peaks = []
    for tokens in (10**10, 10**11, 10**12, 10**13):
        batches = Batches(data.numbered_stream(tokens, tokens // 100, 1024), 1024, 4096, seed=1)
        step = batches.n_windows // 4096 - 1
        batches.micro_batches(step, 4, 1023, 1024)
        tracemalloc.start()
        batches.micro_batches(step, 4, 1023, 1024)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 300_000
    assert max(peaks) - min(peaks) < 4096


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    data.write_sparse_dataset(tmp_path / "tokens", shards=300, shard_tokens=10_000)
    return tmp_path / "tokens"


def test_a_sparse_folder_is_valid(sparse: Path) -> None:
    assert len(open_dataset(sparse, data.VOCABULARY, verify="all").train) == 3_000_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_rank_resumes_anywhere_within_a_second_and_with_few_files(sparse: Path) -> None:
    cost = data.rank_cost(sparse, 16, 1024 * 4, 1024, (0.0, 0.5, 0.999))
    assert (cost["tokens"], cost["shards"]) == (3_000_000, 300)
    assert len(cost["first_batch_seconds"]) == 3
    assert max(cost["first_batch_seconds"]) < 1
    assert 0 < cost["files_open"] <= MAX_MAPPED_SHARDS
    assert cost["grown_bytes"] < 4e6


# --- the network --------------------------------------------------------------------------------------------

NET = network.Network("test", bandwidth=1e9, latency=1e-3, per_machine=8)


def test_rings_equal_a_manual_calculation() -> None:
    # 4 processes, 1 GB: an all-reduce sends 6 messages of 250 MB, its halves 3
    assert network.all_reduce(NET, 4, 1e9) == pytest.approx(6 * (1e-3 + 0.25))
    assert network.all_gather(NET, 4, 1e9) == pytest.approx(3 * (1e-3 + 0.25))
    assert network.reduce_scatter(NET, 4, 1e9) == pytest.approx(3 * (1e-3 + 0.25))
    assert network.all_reduce(NET, 1, 1e9) == 0


def test_a_ring_over_two_machines_equals_a_manual_calculation() -> None:
    net = replace(NET, bandwidth_out=0.05e9, latency_out=10e-3, start=1.0)
    # 16 processes: 2 of 30 messages leave a machine; eight cards of 50 MB/s have 400 MB/s
    assert network.all_reduce(net, 16, 16e8) == pytest.approx(1 + 28e-3 + 20e-3 + 30 * 0.1 / 0.4)
    assert network.all_reduce(net, 8, 8e8) == pytest.approx(1 + 14e-3 + 14 * 0.1)


def test_an_all_reduce_takes_the_faster_of_ring_and_tree() -> None:
    net = replace(NET, bandwidth_out=1e9, latency_out=1e-3, tree=network.Tree(1e-3, 1e-3, 2e-3))
    # 1,024 processes in 128 machines: 7 hops within and 7 levels between machines, up and down
    assert network.all_reduce(net, 1024, 9) == pytest.approx(1e-3 + 2 * (7e-3 + 14e-3) + 2e-8)
    assert network.all_reduce(net, 16, 1e12) == network.ring(net, 16, 1e12, 2)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_fit_recovers_the_network_of_the_times(rounds: int) -> None:
    net = replace(NET, per_machine=2)
    sizes = [2.0**k for k in range(10, 25)]
    found = network.fit(sizes, [network.ring(net, 2, size, rounds) for size in sizes], rounds)
    assert (found.latency, found.bandwidth) == pytest.approx((net.latency, net.bandwidth))


@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=20))
@example(sizes=[100, 300, 299, 1, 300, 2])  # exactly full buckets
def test_buckets_equal_those_of_torch(sizes: list[int]) -> None:
    assigned, _ = dist._compute_bucket_assignment_by_size([torch.empty(size) for size in sizes], [400, 1200])
    theirs = [4 * sum(sizes[i] for i in bucket) for bucket in assigned]
    assert list(network.buckets([4 * size for size in sizes], 400, 1200)) == theirs


LOAD = network.Payload(blocks=(10**9, 10**9), outside=2 * 10**9, buckets=(10**9, 3 * 10**9))
WORK = network.Work(micro_batches=2, forward_backward=6.0, update=1.0)
FREE = replace(NET, latency=0.0)


def test_a_ddp_step_equals_a_manual_calculation() -> None:
    # an all-reduce of 2 processes takes one second per GB; the first bucket is hidden, the last is not
    scalar = 4e-9
    assert network.ddp(LOAD, WORK, 2, FREE, 0.0).seconds == pytest.approx(13 + 4 + scalar)
    assert network.ddp(LOAD, WORK, 2, FREE, 1.0).seconds == pytest.approx(13 + 3 + scalar)
    slow = replace(FREE, bandwidth=1e8)  # first bucket 10 s, backward pass 4 s
    assert network.ddp(LOAD, WORK, 2, slow, 1.0).seconds == pytest.approx(13 + 40 - 4 + 10 * scalar)
    assert network.ddp(LOAD, WORK, 1, FREE, 0.0).seconds == 13


def test_an_fsdp_step_equals_a_manual_calculation() -> None:
    # all-gathers in each of 2 micro-batches: outside 1 s, blocks 2 × (½ + ½) s; reduce-scatters ½ + ½ + 1 s
    step = network.fsdp(LOAD, WORK, 2, FREE, FREE, FREE, 0.0)
    assert step.compute == 12.5
    assert step.communication == pytest.approx(2 * (1 + 2) + 2 + 8e-9)
    hidden = network.fsdp(LOAD, WORK, 2, FREE, FREE, FREE, 1.0).hidden
    assert hidden == pytest.approx(6 + 2 - 1 - 1)  # without the first all-gather and the last reduce-scatter
    assert network.fsdp(LOAD, WORK, 1, FREE, FREE, FREE, 0.0).communication == 0


def test_a_model_communicates_all_its_parameters() -> None:
    shape = preset("gpt2-124m").model
    load = steps.payload(shape)
    assert load.total == sum(load.buckets) == 4 * padded_parameters(shape)
    assert len(load.blocks) == 12
    assert load.blocks[0] == 4 * (12 * 768**2 + 13 * 768)


def test_predictions_use_single_gpu_speeds_and_efficiency_falls_with_gpus() -> None:
    assert {gpus.alone(gpu).gpus for gpu in gpus.NETWORKS} == {1}
    rows = gpus.predictions({name: steps.payload(preset(name).model) for name in gpus.MODELS})
    assert len(rows) == len(gpus.MODELS) * len(gpus.NETWORKS) * len(gpus.WORLDS) * 2
    for row in rows:
        assert 0 < row["efficiency_without_overlap"] <= row["efficiency_with_overlap"] <= 1
        assert math.isclose(row["compute_seconds"], row["efficiency_with_overlap"] * row["seconds_with_overlap"])
    one = [r for r in rows if (r["model"], r["gpu"], r["way"]) == ("gpt2-124m", "A100", "ddp")]
    assert one[0]["compute_seconds"] == pytest.approx(0.090, rel=1e-3)  # published: 90 ms for 16 × 1024 tokens
    assert sorted(one, key=lambda r: -r["efficiency_without_overlap"]) == one


# --- the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--json", "none/out.json"], "there is no folder none"), (["--rounds", "0"], "at least 1")]
)
def test_a_user_error_is_one_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scale.py", "--smoke", *arguments])
    assert scale.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.slow
def test_smoke_test_of_the_simulation(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.scale",
        "--smoke",
        "--json",
        str(tmp_path / "out.json"),
        "--folder",
        str(tmp_path),
    ]
    project = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=project)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert found["smoke"]
    assert found["data"]["sampled"]["duplicates"] == 0
    assert found["data"]["looked_up"]["not_found"] == 0
    assert found["data"]["exhaustive"]["not_once"] == 0
    assert [(row["way"], row["micro_batches"]) for row in found["steps"]["here"]["rows"]] == [("ddp", 1), ("fsdp", 1)]
    for row in found["steps"]["here"]["rows"]:
        assert row["measured_seconds"]["median"] > 0
    assert "| prediction | GPUs |" in done.stdout
