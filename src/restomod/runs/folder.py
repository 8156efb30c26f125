"""Run folder: creation, resumption, appending of records.

runs/NAME/
    config.json        complete configuration
    environment.json   versions, machine and command of the start and of every resumption
    data.json          manifest of the token shards
    metrics.jsonl      losses, learning rate, gradient norm and speed, with times
    samples.jsonl      texts generated during training
    checkpoints/
"""

from __future__ import annotations

import dataclasses
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

import torch

import restomod
from restomod.config.run import RunConfig
from restomod.config.serialize import read_config, to_dict, to_file
from restomod.data.dataset import Dataset
from restomod.data.same_tokens import read_run_data, token_difference, with_hashes
from restomod.runs.config_diff import FIXED, identity_differences
from restomod.runs.metrics import Record, SampleRecord, append_jsonl, iterate_jsonl, keep_records
from restomod.runs.trackers import Trackers
from restomod.utils.errors import UserError, reason
from restomod.utils.files import move_folder, write_json_atomically
from restomod.utils.json_files import read_json
from restomod.utils.redaction import redact_command
from restomod.utils.temporary import Temporary


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """An open run folder."""

    folder: Path
    config: RunConfig
    writes: bool = True
    """True on the main process only; other ranks write no files."""
    trackers: Trackers | None = None
    """Trackers that also receive the records of `metrics.jsonl`; None without trackers."""
    unwritten: list[tuple[str, dict[str, Any]]] = dataclasses.field(default_factory=list)
    """Pending records as (file name, record); a failed write is retried with the next record."""

    def log(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        """Append a record to `metrics.jsonl`, pass it to the trackers, and return it."""
        record = {"kind": kind, "step": step, **values, "time": round(time.time(), 3)}
        if not self.writes:
            return record
        self._append("metrics.jsonl", record)
        if self.trackers is not None:
            self.trackers.put(record)
        return record

    def log_sample(self, step: int, prompt: str, text: str) -> None:
        """Append a sample to `samples.jsonl`."""
        self._append("samples.jsonl", {"step": step, "prompt": prompt, "text": text})

    def _append(self, name: str, record: dict[str, Any]) -> None:
        self.unwritten.append((name, record))
        self.write_records()

    def write_records(self) -> OSError | None:
        """Write pending records.

        Returns:
            Error of a failed write, or None. It is not raised, because the other ranks would wait forever.
        """
        try:
            while self.unwritten:
                name, record = self.unwritten[0]
                append_jsonl(self.folder / name, record)
                self.unwritten.pop(0)
        except OSError as e:
            return e
        return None

    def rewind(self, step: int) -> None:
        """Delete the records after the checkpoint of ``step``, because these steps are repeated.

        Step 0 deletes all records.
        """

        def keep(record: Record) -> bool:
            at = record["step"]
            after = record.get("kind") in ("train", "rollback")  # written after the checkpoint of the same step
            return bool(at < step or (at == step > 0 and not after))

        keep_records(self.folder / "metrics.jsonl", keep)
        keep_records(self.folder / "samples.jsonl", keep, SampleRecord)


def refuse_existing(folder: Path) -> None:
    """Raise UserError if ``folder`` exists."""
    if folder.exists():
        how = (
            f"resume it with `restomod train --resume {quote(str(folder))}`, or "
            if (folder / "config.json").exists()
            else ""
        )
        raise UserError(f"{folder} already exists; {how}choose another folder with --out")


def create_run(
    folder: Path,
    config: RunConfig,
    dataset: Dataset,
    environment: dict[str, Any],
    print_line: Callable[[str], None] = lambda text: None,
) -> RunFolder:
    """Create a run folder atomically: a folder that exists under its name is complete and can be resumed.

    Args:
        folder: path of the new folder.
        config: run configuration.
        dataset: training and validation data.
        environment: record from `environment`.
        print_line: function that prints progress.

    Raises:
        UserError: the folder exists, or cannot be created.
    """
    refuse_existing(folder)
    manifest = with_hashes(dataset, print_line)
    real = folder.resolve()  # the folder may be a dangling link
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        with Temporary(real.parent, "folder") as temporary:
            write_json_atomically(temporary.path / "data.json", manifest)
            write_json_atomically(temporary.path / "environment.json", [environment])
            write_json_atomically(temporary.path / "config.json", to_file(config))
            move_folder(temporary.path, real, "config.json")
    except OSError as e:
        raise UserError(f"{folder}: cannot create the run folder ({reason(e)})") from None
    return RunFolder(folder, config)


def check_resumable(folder: Path, config: RunConfig, dataset: Dataset) -> None:
    """Check that an existing run can resume with ``config``.

    Raises:
        UserError: a fixed setting has changed, or the data differ from those of the run.
    """
    now, before = ({name: to_dict(each)[name] for name in FIXED} for each in (config, read_config(folder)))
    if changed := identity_differences(now, before):
        raise UserError(f"cannot change on resume: {', '.join(changed)}")
    _starts(folder)  # raises UserError if environment.json, which is rewritten, is damaged
    manifest = read_run_data(folder)
    trained_on = str(manifest.get("fingerprint"))
    difference = None if dataset.fingerprint == trained_on else token_difference(manifest, dataset)
    if difference is not None:
        data = "this mix" if dataset.parts else dataset.folder
        raise UserError(
            f"{data} has other tokens than the training data of {folder}: {difference} (fingerprint "
            f"{dataset.fingerprint[:12]}, not {trained_on[:12]}); restore the original text, or start a new run"
        )


def reopen_run(folder: Path, config: RunConfig, environment: dict[str, Any], step: int) -> RunFolder:
    """Open an existing run for resuming from the checkpoint of ``step``; 0 starts from the beginning."""
    write_json_atomically(folder / "environment.json", [*_starts(folder), environment], folder)
    write_json_atomically(folder / "config.json", to_file(config), folder)
    run = RunFolder(folder, config)
    run.rewind(step)
    return run


def _target_reached(folder: Path, target: float | None, step: int) -> int | None:
    """Return the first step before ``step`` with a training loss of at most ``target``, or None."""
    if target is None:
        return None
    for record in iterate_jsonl(folder / "metrics.jsonl"):
        loss, made = record.get("loss"), record["kind"] == "train" and "skipped" not in record
        if made and record["step"] < step and loss is not None and loss <= target:
            return int(record["step"])
    return None


def _starts(folder: Path) -> list[Any]:
    """Read the environments of the start and all resumptions of a run."""
    log = folder / "environment.json"
    known = list[dict[str, Any]] | dict[str, Any]  # unknown keys are kept, because the file is rewritten
    starts = read_json(log, "record of the run's environments", known) if log.exists() else []
    return starts if isinstance(starts, list) else [starts]


def nothing_left_to_do(folder: Path, config: RunConfig, step: int) -> str | None:
    """Explain why a run that resumes from ``step`` is already finished; None if it is not."""
    if step >= config.steps:
        return f"{folder} has already completed its {config.steps} steps; continue to step N with --steps N"
    reached = _target_reached(folder, config.target_loss, step)
    if reached is None:
        return None
    return (
        f"{folder} has already reached its target loss {config.target_loss} at step {reached}; "
        f"continue with a lower --target-loss, or with --target-loss None"
    )


def environment(device: str, precision: str) -> dict[str, Any]:
    """Return the record of this process for `environment.json`: versions, device, precision, command line."""
    return {
        "restomod": restomod.__version__,
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": device,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "command": [Path(sys.argv[0]).name, *redact_command(sys.argv[1:])],  # run folders are shared
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git_revision() -> str | None:
    """Return the Git revision of this package, with "+changes" for uncommitted ones; None outside a repository."""
    tree = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(tree), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    tracked = git("ls-files", "--error-unmatch", Path(__file__).name)
    revision = git("rev-parse", "HEAD") if tracked else None
    return f"{revision}+changes" if revision and git("status", "--porcelain") else revision
