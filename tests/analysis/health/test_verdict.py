"""Verdict on a run: records, data, reference losses, weights, and output of the command."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from restomod.analysis.health.dead_layers import find_dead_layers
from restomod.analysis.health.reference_loss import check_reference_loss
from restomod.analysis.health.verdict import data_lengths, verdict
from restomod.cli import main
from restomod.config.presets import preset
from restomod.config.run import DataConfig, ModelConfig, RunConfig
from restomod.evals.tasks.registry import references
from restomod.model.gpt import build_model
from restomod.model.hf_io import load_model
from restomod.runs.checkpoint import write_checkpoint
from restomod.runs.reader import Run, open_run
from tests.runs.made_runs import QUICKSTART, SMALL, quickstart_records, simple, train, val, write_run

TINY = dataclasses.replace(
    SMALL, model=ModelConfig(n_layer=2, n_head=2, n_embd=16, n_positions=256, vocab_size=97), sequence_length=32
)
CPU = torch.device("cpu")


@pytest.fixture
def quickstart(tmp_path: Path) -> Run:
    return open_run(write_run(tmp_path / "quickstart", QUICKSTART, quickstart_records()))


# --- reference losses ----------------------------------------------------------------------------------------


def with_val(tmp_path: Path, config: RunConfig, losses: dict[int, float], data: dict[str, Any] | None = None) -> Run:
    return open_run(write_run(tmp_path / "a", config, [val(s, loss) for s, loss in losses.items()], data))


OTHER_SEED = dataclasses.replace(QUICKSTART, seed=5)
OTHER_RATE = dataclasses.replace(OTHER_SEED, optim=dataclasses.replace(QUICKSTART.optim, lr=1e-5))
GPT2 = dataclasses.replace(preset("gpt2-124m"), data=DataConfig(source="tokens", path="t"))
OPENAI = f"OpenAI's GPT-2 {({r.model: r.value for r in references('validation')})['GPT-2 124M']}"


@pytest.mark.parametrize(
    ("config", "step", "loss", "status", "words"),
    [
        (QUICKSTART, 900, 4.8383, "ok", "is within the range of quickstart on Python's library, 4.54 to 5.14"),
        (QUICKSTART, 900, 5.3, "fail", "is above the range"),
        (QUICKSTART, 900, 4.2, "fail", "is below the range"),
        (QUICKSTART, 450, 5.0, "ok", "4.80 to 5.40"),  # halfway between 5.239 and 4.968, ± 0.3
        (OTHER_RATE, 900, 8.0, "warning", "; this run differs from quickstart in optim.lr 1e-05 (not 0.002)"),
        (OTHER_SEED, 900, 8.0, "fail", "is above the range"),  # another seed does not count as a difference
        (GPT2, 19_073, 3.07, "ok", OPENAI),
        (GPT2, 19_073, 3.25, "ok", OPENAI),
        (GPT2, 19_073, 3.4, "fail", OPENAI),
        (GPT2, 19_073, 2.5, "fail", OPENAI),
    ],
)
def test_a_run_is_compared_with_its_reference_loss(
    config: RunConfig, step: int, loss: float, status: str, words: str, tmp_path: Path
) -> None:
    data = {"name": "fineweb-edu"} if config is GPT2 else None
    finding = check_reference_loss(with_val(tmp_path, config, {step: loss}, data))
    assert (finding.status, words in finding.reason) == (status, True), finding


def test_without_a_reference_loss_it_is_unknown(tmp_path: Path) -> None:
    other_model = dataclasses.replace(QUICKSTART, model=dataclasses.replace(QUICKSTART.model, n_layer=2))
    assert check_reference_loss(with_val(tmp_path, other_model, {900: 8.0})).status == "unknown"
    shutil.rmtree(tmp_path / "a")
    early = check_reference_loss(with_val(tmp_path, QUICKSTART, {100: 8.0}))
    assert (early.status, early.reason.split(":")[0]) == ("unknown", "needs a validation after 153,600 tokens")


# --- weights -------------------------------------------------------------------------------------------------


def trained(folder: Path, config: RunConfig = TINY, updates: int = 40) -> Run:
    """Write a run with a checkpoint of trained weights and open it."""
    model = build_model(config.model, config.seed, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    tokens = torch.randint(0, 97, (4, 33), generator=torch.Generator().manual_seed(0))
    for _ in range(updates):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:]).backward()
        optimizer.step()
    run = open_run(write_run(folder, config, simple({0: 4.5, 50: 4.0})))
    write_checkpoint(folder, updates, model, {})
    return run


def spoil(run: Run, name: str, value: Any, updates: int = 40) -> None:
    """Replace one matrix of the checkpoint by ``value(initial matrix, trained matrix)``."""
    folder = run.folder / "checkpoints" / f"step_{updates:06d}"
    model = load_model(folder, CPU)
    drawn = dict(build_model(run.config.model, run.config.seed, CPU).named_parameters())[name]
    with torch.no_grad():
        model.get_parameter(name).copy_(value(drawn, model.get_parameter(name)))
    write_checkpoint(run.folder, updates, model, {})


C_FC = "transformer.h.1.mlp.c_fc.weight"
C_PROJ = "transformer.h.0.attn.c_proj.weight"


def test_a_model_that_has_learnt_has_no_dead_layers(tmp_path: Path) -> None:
    finding = find_dead_layers(trained(tmp_path / "a"))
    assert finding.status == "ok"
    assert "all 8 block matrices have changed" in finding.reason


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda drawn, now: drawn, "not changed by training at step 40: h.1.mlp.c_fc.weight"),
        (
            lambda drawn, now: 0.9 * drawn,
            "not changed by training at step 40: h.1.mlp.c_fc.weight",
        ),  # weight decay alone
        (lambda drawn, now: 0 * now, "constant at step 40: h.1.mlp.c_fc.weight"),
        (lambda drawn, now: now.clone().fill_(0.5), "constant at step 40: h.1.mlp.c_fc.weight"),
        (lambda drawn, now: now * float("nan"), "not finite at step 40: h.1.mlp.c_fc.weight"),
    ],
)
def test_a_matrix_that_is_dead_is_named(value: Any, said: str, tmp_path: Path) -> None:
    run = trained(tmp_path / "a")
    spoil(run, C_FC, value)
    finding = find_dead_layers(run)
    assert finding.status == "fail"
    assert said in finding.reason


def test_projections_that_stay_at_their_initial_zero_are_dead(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, zero_init_projections=True))
    run = trained(tmp_path / "a", config)
    assert find_dead_layers(run).status == "ok"
    spoil(run, C_PROJ, lambda drawn, now: drawn)
    assert "constant at step 40: h.0.attn.c_proj.weight" in find_dead_layers(run).reason


def test_with_pretrained_weights_only_constant_matrices_are_found(tmp_path: Path) -> None:
    run = trained(tmp_path / "a", dataclasses.replace(TINY, init="gpt2"))
    spoil(run, C_FC, lambda drawn, now: drawn)
    assert find_dead_layers(run).status == "ok"
    spoil(run, C_FC, lambda drawn, now: 0 * drawn)
    assert find_dead_layers(run).status == "fail"


def test_without_an_intact_late_checkpoint_weights_are_unknown(tmp_path: Path, quickstart: Run) -> None:
    assert find_dead_layers(quickstart).status == "unknown"
    assert find_dead_layers(trained(tmp_path / "early", updates=3)).reason == "needs a checkpoint of step 20 or later"
    run = trained(tmp_path / "a")
    weights = run.folder / "checkpoints" / "step_000040" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    finding = find_dead_layers(run)
    assert finding.status == "unknown"
    assert "model.safetensors is damaged" in finding.reason


# --- the whole -----------------------------------------------------------------------------------------------


def test_epochs_and_shards_are_counted_in_steps(tmp_path: Path) -> None:
    shards = [{"tokens": 51_200}, {"tokens": 51_200}, {"tokens": 100}]
    data = {"fingerprint": "a", "splits": {"train": {"tokens": 102_500, "shards": shards}}}
    assert data_lengths(open_run(write_run(tmp_path / "a", SMALL, data=data))) == {
        "an epoch": pytest.approx(102_500 / 512),
        "a shard": 100,
    }
    assert data_lengths(open_run(write_run(tmp_path / "b"))) == {}


def test_a_healthy_run_is_exit_code_0(quickstart: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "v.json"
    assert main(["verdict", str(quickstart.folder), "--json", str(written)]) == 0
    said = capsys.readouterr().out
    assert said.endswith(
        f"{quickstart.folder}, step 900 of 900: healthy (12 symptoms checked, 1 unknown)\nwritten: {written}\n"
    )
    values = json.loads(written.read_text())
    assert (values["healthy"], values["step"]) == (True, 900)
    assert {f["status"] for f in values["findings"] if f["symptom"] != "dead layers"} == {"ok"}


def test_a_run_without_a_readable_record_is_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", SMALL, [])
    assert main(["verdict", str(folder)]) == 0  # no records yet
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step"')  # a crash during its first record
    assert main(["verdict", str(folder)]) == 0
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step"\n' * 3)
    assert main(["verdict", str(folder)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"restomod: error: {folder / 'metrics.jsonl'} is damaged: no line can be read")


def test_an_unhealthy_run_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        r | ({"ms": 3 * r["ms"]} if r["kind"] == "train" and r["step"] > 700 else {}) for r in quickstart_records()
    ]
    folder = write_run(tmp_path / "slow", QUICKSTART, records)
    assert main(["verdict", str(folder), "--no-weights"]) == 1
    assert "not healthy: throughput drop (12 symptoms checked)" in capsys.readouterr().out


@pytest.mark.parametrize("records", [[], [train(0, 10.8)], [val(0, 10.8)]])
def test_a_run_with_at_most_one_record_is_healthy(records: list[dict[str, Any]], tmp_path: Path) -> None:
    found = verdict(open_run(write_run(tmp_path / "a", QUICKSTART, records)))
    assert found.healthy
    assert sum(f.status == "unknown" for f in found.findings) >= 9
