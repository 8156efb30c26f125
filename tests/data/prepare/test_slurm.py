"""Slurm jobs write the same bytes; the same command prints the progress and submits missing units.

In place of Slurm stand programs of the same names that keep a queue in files and run the submitted scripts: arrays task
by task, dependencies with afterok, `--kill-on-invalid-dep`. Nothing runs before the test says so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from restomod.cli import main
from restomod.data.prepare import slurm as slurm_module
from restomod.data.prepare import units
from tests.data.prepare.preparing import hashes, nothing_but_the_shards, texts_of, write_jsonl

STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, shlex, subprocess, sys

QUEUE = pathlib.Path(__file__).parent / "queue"
QUEUE.mkdir(exist_ok=True)


def jobs():
    return {{int(p.stem): json.loads(p.read_text()) for p in sorted(QUEUE.glob("*.json"))}}


def save(number, job):
    (QUEUE / f"{{number}}.json").write_text(json.dumps(job))


def options(arguments):
    return dict(a.removeprefix("--").partition("=")[::2] for a in arguments)


def sbatch(*arguments):
    script = pathlib.Path(arguments[-1]).read_text()
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    given = options([part for line in lines for part in shlex.split(line)]) | options(arguments[:-1])
    if given.get("partition") == "nope":
        sys.exit("sbatch: error: invalid partition specified: nope")
    number = max(jobs(), default=100) + 1
    last = int(given["array"].partition("%")[0].removeprefix("0-"))
    save(number, {{"options": given, "script": script, "cwd": os.getcwd(), "environment": dict(os.environ),
                   "tasks": {{str(i): "PENDING" for i in range(last + 1)}}}})
    print("Submitted batch job", number)


def squeue(*arguments):
    if (QUEUE.parent / "down").exists():
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller")
    name = options(arguments)["name"]
    for job in jobs().values():
        for state in job["tasks"].values():
            if job["options"]["job-name"] == name and state in ("PENDING", "RUNNING"):
                print(state)


def scontrol(*arguments):
    print("node1")


def run():
    for number, job in jobs().items():
        dependency = job["options"].get("dependency", "")
        if dependency:
            kind, before = dependency.split(":")
            assert kind == "afterok"
            ended = set(jobs()[int(before)]["tasks"].values())
            if ended != {{"COMPLETED"}}:
                assert job["options"]["kill-on-invalid-dep"] == "yes"
                job["tasks"] = {{i: "CANCELLED" for i in job["tasks"]}}
                save(number, job)
                continue
        for i, state in job["tasks"].items():
            if state != "PENDING":
                continue
            log = job["options"]["output"].replace("%A", str(number)).replace("%a", i)
            environment = job["environment"] | {{
                "SLURM_ARRAY_TASK_ID": i, "SLURM_JOB_ID": str(number), "SLURM_NODELIST": "node1", "RUN_OFFSET": "0"}}
            with open(log, "w") as f:
                code = subprocess.run(["bash", "-c", job["script"]], cwd=job["cwd"], env=environment,
                                      stdout=f, stderr=f).returncode
            job["tasks"][i] = "COMPLETED" if code == 0 else "FAILED"
            save(number, job)


globals()[pathlib.Path(sys.argv[0]).name](*sys.argv[1:])
"""


class Cluster:
    """Folder of the fake Slurm programs and their jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("sbatch", "squeue", "scontrol", "run"):
            (folder / name).write_text(STAND_IN)
            (folder / name).chmod(0o755)

    def run(self) -> None:
        subprocess.run([self.folder / "run"], check=True)

    def jobs(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted((self.folder / "queue").glob("*.json"))]

    def states(self) -> list[set[str]]:
        return [set(job["tasks"].values()) for job in self.jobs()]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    return cluster


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Path:
    """Write four files into a folder with a space in its name, and prepare the reference in one process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    for i in range(4):
        write_jsonl(tmp_path / "my text" / f"{i}.jsonl", texts_of(20, seed=i // 2))
    for out, flags in {"reference": [], "deduplicated": ["--dedup"]}.items():
        assert main(["prepare", "my text", "--out", out, "--workers", "1", *flags]) == 0
    capfd.readouterr()
    return tmp_path / "my text"


SLURM = ("prepare", "my text", "--out", "my out", "--engine", "slurm")


def said(capfd: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Return the lines of a successful command."""
    assert main([*SLURM, *arguments]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out.splitlines()


def refusal(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the error line of a refused command."""
    assert main([*SLURM, *arguments]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1, err
    return err.removeprefix("restomod: error: ").strip()


@pytest.mark.parametrize("flags", [(), pytest.param(("--dedup",), marks=pytest.mark.slow)])
def test_jobs_write_the_same_bytes_and_the_manifest(
    tmp_path: Path, text: Path, cluster: Cluster, capfd: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    lines = said(capfd, *flags)
    assert lines[0] == "input: 4 .jsonl files; 4 units of work"
    stages = ["hash 4 units", "assign", "prepare 4 units", "finish"] if flags else ["prepare 4 units", "finish"]
    assert lines[1:-1] == [f"submitted job {101 + i}: {stage}" for i, stage in enumerate(stages)]
    for job in cluster.jobs():
        assert job["options"]["output"].startswith(f"{tmp_path}/my out/.prepare/slurm/")
    name = cluster.jobs()[0]["options"]["job-name"]
    assert lines[-1] == (
        f"progress: run the same command again; queue: squeue --name={name}; cancel: scancel --name={name}"
    )
    cluster.run()
    assert cluster.states() == [{"COMPLETED"}] * len(stages)
    assert hashes(tmp_path / "my out") == hashes(tmp_path / ("deduplicated" if flags else "reference"))
    assert sorted(os.listdir("my out")) == sorted(os.listdir("deduplicated" if flags else "reference"))
    assert said(capfd, *flags)[0].startswith("my out: ")
    assert len(cluster.jobs()) == len(stages)


def test_while_jobs_are_in_the_queue_nothing_is_submitted_and_other_engines_are_refused(
    text: Path, cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    said(capfd)
    before = hashes(Path("my out"))
    assert said(capfd)[:2] == ["Slurm tasks: 0 running, 5 pending", "0 of 4 units finished"]
    assert main([*SLURM[:4], "--workers", "1"]) == 2
    name = cluster.jobs()[0]["options"]["job-name"]
    jobs = "5 Slurm jobs are working on my out; wait for them, or cancel them: "
    assert capfd.readouterr().err == f"restomod: error: {jobs}scancel --name={name}\n"
    (cluster.folder / "down").touch()
    assert refusal(capfd).startswith("squeue cannot list the jobs of my out: slurm_load_jobs error")
    assert len(cluster.jobs()) == 2
    assert hashes(Path("my out")) == before


@pytest.fixture
def good(text: Path, cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> bytes:
    """Return the correct content of a file that was not UTF-8 when the jobs ran."""
    good = (text / "2.jsonl").read_bytes()
    (text / "2.jsonl").write_bytes(b'{"text": "\xff"}\n')
    said(capfd)
    cluster.run()
    return good


def test_a_bad_file_is_reported_once_and_then_its_unit_is_submitted(
    tmp_path: Path, text: Path, cluster: Cluster, good: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cluster.states() == [{"COMPLETED", "FAILED"}, {"CANCELLED"}]
    assert "2.jsonl is not UTF-8 text: byte 0xff at offset 10 of line 1" in refusal(capfd)
    (text / "2.jsonl").write_bytes(good)
    lines = said(capfd)
    assert lines[0] == "resuming: 3 of 4 units finished"
    assert "submitted job 103: prepare 1 unit" in lines
    cluster.run()
    assert hashes(tmp_path / "my out") == hashes(tmp_path / "reference")


@pytest.mark.slow
def test_a_file_fixed_before_the_report_is_submitted_immediately(
    tmp_path: Path, text: Path, cluster: Cluster, good: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    (text / "2.jsonl").write_bytes(good)
    said(capfd)
    cluster.run()
    assert hashes(tmp_path / "my out") == hashes(tmp_path / "reference")


@pytest.mark.slow
def test_lost_jobs_are_submitted_again_and_a_lost_finish_is_replaced(
    tmp_path: Path, text: Path, cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    said(capfd)
    shutil.rmtree(cluster.folder / "queue")  # like scancel
    lines = said(capfd)
    assert lines[1].startswith("warning: the jobs ended with unfinished units")
    (cluster.folder / "queue" / "102.json").unlink()
    cluster.run()
    assert not Path("my out/manifest.json").exists()
    assert said(capfd)[2].startswith("my out: 80 documents, ")
    assert hashes(tmp_path / "my out") == hashes(tmp_path / "reference")
    assert nothing_but_the_shards(tmp_path / "my out")


def test_the_options_of_jobs(text: Path, cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ("--slurm-partition", "cpu", "--slurm-time", "1:00:00", "--slurm-mem-gb", "5", "--workers", "3")
    said(capfd, *flags)
    for job in cluster.jobs():
        options = job["options"]
        assert (options["partition"], options["time"], options["mem-per-cpu"]) == ("cpu", "1:00:00", "5G")
        assert options["array"] in ("0-3%3", "0-0%3")
    shutil.rmtree(cluster.folder / "queue")
    shutil.rmtree("my out")
    said(capfd)
    assert not {"partition", "time", "qos"} & cluster.jobs()[0]["options"].keys()


@pytest.mark.slow
def test_more_units_than_an_array_has_tasks(
    tmp_path: Path, text: Path, cluster: Cluster, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_module, "MAX_ARRAY", 3)
    said(capfd)
    assert len(cluster.jobs()[0]["tasks"]) == 2
    cluster.run()
    assert hashes(tmp_path / "my out") == hashes(tmp_path / "reference")


def test_an_sbatch_error_is_one_line(text: Path, cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    assert refusal(capfd, "--slurm-partition", "nope") == (
        "sbatch failed: sbatch: error: invalid partition specified: nope"
    )
    assert said(capfd)[-2:-1] == ["submitted job 102: finish"]


def test_without_slurm_one_line_says_so(
    text: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert refusal(capfd) == (
        "--engine slurm needs sbatch, which is not installed on this machine; run the command on the cluster"
    )
    assert not Path("my out").exists()


def test_settings_of_slurm_are_for_slurm(text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*SLURM[:4], "--slurm-time", "1:00"]) == 2
    assert "--slurm-mem-gb need --engine slurm, not local" in capfd.readouterr().err
    assert "--slurm-mem-gb is 0; it must be at least 1" in refusal(capfd, "--slurm-mem-gb", "0")
