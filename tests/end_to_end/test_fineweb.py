"""`restomod prepare fineweb-edu` in a separate process with the real client, a failing hub and a full disk."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fineweb import KEY, parquet
from tests.hub import Hub

CARD = {"configs": [{"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]}]}


FILES = {f"sample/10BT/{i:03d}_00000.parquet": parquet(i, documents=300, longest=120) for i in range(3)}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub({KEY: dict(FILES)}) as hub:
        hub.cards[KEY] = CARD
        yield hub


def prepare(hub: Hub, out: Path, home: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    patience = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "2", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "restomod",
            "prepare",
            "fineweb-edu",
            "--out",
            str(out),
            "--val-fraction",
            "0.1",
            *flags,
        ],
        env={**hub.environment(home), **patience},
        capture_output=True,
        text=True,
        timeout=200,
    )


def shards(out: Path) -> dict[str, bytes]:
    """Return the content of a finished folder."""
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".verified")) == sorted(
        ["manifest.json", *(path.name for path in out.glob("*.bin"))]
    )
    return {path.name: path.read_bytes() for path in out.glob("*.bin")} | {
        "manifest": (out / "manifest.json").read_bytes()
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    with Hub({KEY: dict(FILES)}) as hub:
        hub.cards[KEY] = CARD
        done = prepare(hub, folder / "out", folder / "home")
    assert done.returncode == 0, done.stderr
    return shards(folder / "out")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a drop mid-file", "a slow server", "a server that stops", "a wrong hash"])
def test_temporary_faults_are_retried(hub: Hub, tmp_path: Path, undisturbed: dict[str, bytes], fault: str) -> None:
    if fault == "a drop mid-file":
        hub.cut(after=9_000, times=3)
    elif fault == "a slow server":
        hub.bytes_per_second = 20_000
    elif fault == "a server that stops":
        hub.stall(3.0, times=2)
    else:
        hub.flip(bit=40_000)
    done = prepare(hub, tmp_path / "out", tmp_path / "home")
    assert (done.returncode, done.stderr) == (0, "")
    assert shards(tmp_path / "out") == undisturbed
    downloads = len([r for r in hub.requests if r.method == "GET" and r.path.startswith("/cdn")])
    assert downloads == 3 + {"a drop mid-file": 3, "a server that stops": 2, "a wrong hash": 1}.get(fault, 0)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a wrong hash", "a missing file", "an error", "no server"])
def test_lasting_faults_are_one_line_and_the_same_command_resumes(
    hub: Hub, tmp_path: Path, undisturbed: dict[str, bytes], fault: str
) -> None:
    out, home = tmp_path / "out", tmp_path / "home"
    last = max(FILES)
    if fault == "a wrong hash":
        hub.flip(bit=77, times=None)
    elif fault == "a missing file":
        hub.hidden.add(last)
    elif fault == "an error":
        hub.answer(503, times=None)
    else:
        hub.close()
    failed = prepare(hub, out, home, "--workers", "1")
    assert failed.returncode == 2, failed.stdout
    assert failed.stderr.startswith("restomod: error: ")
    assert failed.stderr.count("\n") == 1
    assert not (out / "manifest.json").exists()
    finished = {path.name: path.read_bytes() for path in out.glob("*.bin")}
    for name, content in finished.items():
        assert content == undisturbed[name]
    if fault == "a missing file":
        assert f"{last} of HuggingFaceFW/fineweb-edu is missing on the hub" in failed.stderr
        assert len(finished) == 4
    if fault == "no server":
        return
    hub.mend()
    done = prepare(hub, out, home)
    assert done.returncode == 0, done.stderr
    if fault == "a missing file":
        assert "2 of 3 units finished" in done.stdout
    assert shards(out) == undisturbed


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount an in-memory file system of the given size."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted only by root on Linux")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["64k", "100k", "160k"])
def test_a_full_disk_loses_no_finished_unit(hub: Hub, tmp_path: Path, undisturbed: dict[str, bytes], size: str) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, size):
        out = disk / "out"
        failed = prepare(hub, out, tmp_path / "home")
        assert failed.returncode == 2, failed.stdout
        assert failed.stderr.count("\n") == 1, failed.stderr
        assert "No space left on device" in failed.stderr
        assert not (out / "manifest.json").exists()
        for path in out.glob("*.bin"):
            assert path.read_bytes() == undisturbed[path.name]
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        done = prepare(hub, out, tmp_path / "home")
        assert done.returncode == 0, done.stderr
        assert shards(out) == undisturbed


@pytest.mark.slow
def test_a_kill_during_a_download_leaves_no_partial_file(
    hub: Hub, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    hub.bytes_per_second = 15_000
    command = [sys.executable, "-m", "restomod", "prepare", "fineweb-edu", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--val-fraction", "0.1", "--workers", "1"],
        env=hub.environment(tmp_path / "home"),
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not any((tmp_path / "out").glob("train_00000_*.bin")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)  # in the middle of the second file
    process.kill()
    process.wait()
    assert not (tmp_path / "out" / "manifest.json").exists()
    hub.mend()
    done = prepare(hub, tmp_path / "out", tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert shards(tmp_path / "out") == undisturbed
