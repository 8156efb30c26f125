"""`doctor` reports faults of a machine; tests plant a fault for every check."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from restomod.checks import device_parity, doctor, machine, speed, tools
from restomod.checks.doctor import bf16, matmuls, run_check
from restomod.checks.machine import Machine
from restomod.checks.speed import Rates, matmul_rates
from restomod.cli import main
from restomod.config.presets import preset
from restomod.config.run import Device, ModelConfig, OptimConfig, Precision
from restomod.runs.async_saver import steps_to_keep
from restomod.utils.console import CheckResult, CheckStatus
from restomod.utils.errors import UserError
from tests.checks.test_device_parity import FAULTS, WrongKernel
from tests.models import CPU


def this(
    out: Path = Path("runs"), device: Device = "cpu", precision: Precision = "fp32", of: str = "quickstart"
) -> Machine:
    return Machine(device, precision, of, preset(of), out)


def assert_says(verdict: CheckResult, status: CheckStatus, *said: str) -> None:
    assert verdict.status == status, verdict
    for part in said:
        assert part in verdict.reason


# --- the table ----------------------------------------------------------------------------------------------

GPU_NAMES = ["known faults", "cudnn"]
QUICK_NAMES = ["attention", "threads", "disk", "memory", "parity", "matmuls", "bf16", "bandwidth"]
NAMES = ["versions", "device", *GPU_NAMES, *QUICK_NAMES]
SLOW_NAMES = ["compiler", "processes"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow checks are replaced; other tests cover them."""
    for name in SLOW_NAMES:
        monkeypatch.setattr(doctor, name, lambda machine, name=name: CheckResult(name, "pass", "planted"))
    monkeypatch.setattr(machine, "matmul_rates", lambda device: rates(fp32=1e12, bf16=2e12))
    monkeypatch.setattr(doctor, "memory_bandwidth", lambda device: 5e9)


def rates(size: int = 1024, **per_second: float) -> Rates:
    return Rates({name: {size: rate} for name, rate in per_second.items()})


def test_every_check_has_a_line_and_the_last_is_a_summary(
    quick: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "threads", lambda machine: CheckResult("threads", "pass", "planted"))
    assert main(["doctor", "--device", "cpu", "--precision", "fp32", "--preset", "quickstart"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert [line[6:22].strip() for line in lines] == [*NAMES, *SLOW_NAMES]
    for name, line in zip([*NAMES, *SLOW_NAMES], lines, strict=True):
        assert line.startswith("skip  " if name in GPU_NAMES else "pass  "), line
    assert total == "this machine: 12 passed, 2 skipped"
    assert os.listdir(tmp_path) == []


def test_a_fail_is_exit_code_1_and_the_others_are_still_made(
    quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(machine: Machine) -> CheckResult:
        raise ZeroDivisionError("a mistake\nof two lines")

    monkeypatch.setattr(doctor, "disk", breaks)
    monkeypatch.setattr(breaks, "__name__", "disk")
    assert main(["doctor", "--device", "cpu", "--preset", "quickstart"]) == 1
    shown = capsys.readouterr()
    *lines, total = shown.out.splitlines()
    assert "fail  disk              ZeroDivisionError: a mistake" in lines
    assert len(lines) == len(NAMES) + len(SLOW_NAMES)
    assert "1 failed" in total
    assert shown.err == ""


def test_checks_of_a_missing_device_are_skipped(
    quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["doctor", "--device", "cuda", "--preset", "quickstart"]) == 1
    found = {line[6:22].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert found["device"].startswith("fail  device            device 'cuda' is not available (available: ")
    for name in ("memory", "parity", "matmuls", "bf16"):
        assert found[name].startswith("skip  ")
        assert found[name].endswith("no device")
    assert found["disk"].startswith("pass  ")


def test_only_one_check_reports_a_missing_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the check `device` may report the missing device as an error."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(tools, "_child", lambda *_: None)
    for name in (*NAMES, *SLOW_NAMES):
        verdict = run_check(getattr(doctor, name.replace(" ", "_")), this(device="cuda"))
        assert verdict.check == name
        assert ("is not available (" in verdict.reason) == (name == "device"), verdict


def test_an_unknown_preset_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--preset", "quikstart"]) == 2
    assert capsys.readouterr().err == "restomod: error: unknown preset 'quikstart'; did you mean 'quickstart'?\n"


# --- versions and device ------------------------------------------------------------------------------------


def test_versions_of_this_installation() -> None:
    assert_says(machine.versions(this()), "pass", f"torch {torch.__version__}")


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        (["torch>=99"], "fail", f"torch is {importlib.metadata.version('torch')}; pip install 'torch>=99'"),
        (["no-such-package>=2"], "fail", "no-such-package is missing; pip install 'no-such-package>=2'"),
        (["no-such-package"], "fail", "no-such-package is missing; pip install 'no-such-package'"),
        (["tokie==9.9"], "warn", "tokenized by tiktoken instead, 4 times slower; pip install 'tokie==9.9'"),
        (["torch>=99", "tokie==9.9"], "fail", "pip install 'torch>=99' 'tokie==9.9'"),
        (["no-such-package; extra == 'test'", "torch>=2"], "pass", "; 1 packages"),
    ],
)
def test_a_package_of_another_release(
    monkeypatch: pytest.MonkeyPatch, asked: list[str], status: CheckStatus, said: str
) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda name: asked)
    assert_says(machine.versions(this()), status, said)


@pytest.mark.parametrize(
    ("release", "status"), [((2, 11), "pass"), ((2, 15), "pass"), ((2, 16), "warn"), ((3, 0), "warn")]
)
def test_an_untested_torch_is_a_warning(
    release: tuple[int, int], status: CheckStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "torch_release", lambda: release)
    assert_says(machine.versions(this()), status, "torch")


def test_without_an_installation_versions_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGE", "no-such-package")
    assert machine.versions(this()).status == "skip"


@pytest.mark.parametrize(("cuda", "said"), [(None, "built without CUDA"), ("12.8", "built for CUDA 12.8, cannot use")])
def test_an_unused_gpu_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, said: str
) -> None:
    monkeypatch.setattr(machine, "choose_device", lambda name: CPU)
    assert machine.device(this(device="auto")).status == "pass"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("torch.version.cuda", cuda)
    assert_says(machine.device(this(device="auto")), "warn", said)
    assert machine.device(this(device="cpu")).status == "pass"  # requested by the user


# --- disk, memory, threads ----------------------------------------------------------------------------------


def test_the_disk_needs_space_for_kept_checkpoints_and_one_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = preset("quickstart")
    saved = range(0, config.steps + 1, config.save_every)
    max_kept = max(
        len(steps_to_keep(list(saved[: n + 1]), {step: float(step != best) for step in saved[: n + 1]}, {}, config))
        for n in range(len(saved))
        for best in saved
    )
    needed = (max_kept + 1) * (4 * 7_655_552 + machine.optimizer_bytes(config.model, config.optim)[0])
    monkeypatch.setattr("shutil.disk_usage", lambda at: SimpleNamespace(free=needed))
    assert_says(machine.disk(this(tmp_path / "runs" / "x")), "pass", "0.37 GB", "4 checkpoints of 0.09 GB")
    monkeypatch.setattr("shutil.disk_usage", lambda at: SimpleNamespace(free=needed - 1))
    assert_says(machine.disk(this(tmp_path / "runs" / "x")), "fail", f"free in {tmp_path}", "--out on another disk")


def test_the_estimated_size_of_a_checkpoint_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("A text that is long enough to be trained on.\n" * 200)
    model = ("--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "32", "--sequence-length", "64")
    data = ("--data.source", "text", "--data.path", "text.txt", "--data.val-fraction", "0", "--batch-tokens", "64")
    assert main(["train", "quickstart", *model, *data, "--steps", "1", "--device", "cpu", "--precision", "fp32"]) == 0
    (checkpoint,) = (tmp_path / "runs/quickstart/checkpoints").iterdir()
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    config = ModelConfig(n_layer=1, n_head=2, n_embd=32, n_positions=256)
    said = 4 * machine.parameter_count(config) + machine.optimizer_bytes(config, OptimConfig())[0]
    assert said < size < said + 4 * 2**20  # the tokenizer's files


def test_a_file_in_place_of_the_runs_folder_fails(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    assert_says(machine.disk(this(tmp_path / "runs")), "fail", "is not writable; train with --out")


@pytest.mark.parametrize(
    ("free", "status", "said"),
    [(6e9, "pass", "6.00 GB available"), (4.5e9, "warn", "lower --micro-batch"), (2e9, "fail", "train a smaller")],
)
def test_memory_for_gpt2_124m(monkeypatch: pytest.MonkeyPatch, free: float, status: CheckStatus, said: str) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda device: int(free))
    assert_says(machine.memory(this(precision="bf16", of="gpt2-124m")), status, said, "micro-batch 4")


def test_unknown_memory_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda device: None)
    assert machine.memory(this()).status == "skip"


def cgroup(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(machine, "CGROUP", folder)
    monkeypatch.setattr("restomod.utils.process_memory.CGROUP", folder)


def test_a_containers_limit_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = machine.available_bytes(CPU)
    assert without is not None
    cgroup(tmp_path, monkeypatch, memory_DOT_max="3000\n", memory_DOT_current="1000\n")
    assert machine.available_bytes(CPU) == 2000
    cgroup(tmp_path, monkeypatch, memory_DOT_max="max\n")
    assert (machine.available_bytes(CPU) or 0) > 2000


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu_DOT_max": "150000 100000\n"}, 1.5),
        ({"cpu_DOT_max": "max 100000\n"}, 8),
        ({"cpu__cpu_DOT_cfs_quota_us": "200000\n", "cpu__cpu_DOT_cfs_period_us": "100000\n"}, 2),
        ({"cpu__cpu_DOT_cfs_quota_us": "-1\n", "cpu__cpu_DOT_cfs_period_us": "100000\n"}, 8),
    ],
)
def test_a_containers_limit_of_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: float
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    cgroup(tmp_path, monkeypatch, **files)
    assert machine.usable_processors() == expected


@pytest.mark.parametrize(
    ("used", "there", "variable", "status", "said"),
    [
        (2, 2, None, "pass", "torch uses 2 threads on 2 CPUs"),
        (8, 1.5, None, "warn", "too many; export OMP_NUM_THREADS=1"),
        (8, 0.5, None, "warn", "export OMP_NUM_THREADS=1"),
        (1, 1.5, "1", "pass", ""),
        (1, 4, "1", "warn", "OMP_NUM_THREADS is 1; export OMP_NUM_THREADS=4"),
        (2, 4, None, "pass", ""),  # torch's default: one thread per physical core
    ],
)
def test_threads(
    monkeypatch: pytest.MonkeyPatch, used: int, there: float, variable: str | None, status: CheckStatus, said: str
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: used)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr(machine, "usable_processors", lambda: there)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert_says(machine.threads(this()), status, said)


# --- parity and speed ---------------------------------------------------------------------------------------


def test_a_wrong_kernel() -> None:
    assert run_check(doctor.parity, this()).status == "pass"
    with WrongKernel(*FAULTS["attention 2 % too large"]):
        assert_says(run_check(doctor.parity, this()), "fail", "gradients at most")
    assert device_parity.SHAPE.n_embd == 64 * device_parity.SHAPE.n_head  # the heads are those of GPT-2


@pytest.mark.parametrize(
    ("precision", "bf16_rate", "status", "said"),
    [
        ("bf16", 2e12, "pass", "2.00 × the speed of fp32 (size 1024)"),
        ("bf16", 0.5e12, "warn", "0.50 × the speed of fp32 (size 1024); train with --precision fp32"),
        ("fp32", 0.5e12, "pass", "0.50 × the speed of fp32 (size 1024); compute dtype is fp32"),
    ],
)
def test_bf16_slower_than_fp32(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, bf16_rate: float, status: CheckStatus, said: str
) -> None:
    monkeypatch.setattr(machine, "matmul_rates", lambda device: rates(fp32=1e12, bf16=bf16_rate, fp16=3e12))
    assert_says(bf16(this(precision=precision)), status, said)
    assert_says(matmuls(this()), "pass", "fp32 1.00 TFLOP/s (size 1024)", "fp16 3.00 TFLOP/s")


def test_faster_bf16_is_suggested_where_fp32_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "matmul_rates", lambda device: rates(fp32=1e12, bf16=2e12))
    monkeypatch.setattr(machine, "choose_dtype", lambda precision, device: torch.float32)
    assert_says(bf16(this(precision="auto")), "pass", "--precision bf16 may be faster")


def test_matmuls_grow_until_one_would_take_too_long() -> None:
    """A device of 2e10 operations a second in fp32, 1e8 in fp16: 1024 takes 0.1 s, 2048 0.86 s, and 256 0.3 s."""
    made: list[tuple[torch.dtype, int]] = []
    per_second = {torch.float32: 2e10, torch.bfloat16: 1e13, torch.float16: 1e8}

    def seconds(device: torch.device, dtype: torch.dtype, size: int) -> float:
        made.append((dtype, size))
        return 2 * size**3 / per_second[dtype]

    found = matmul_rates(CPU, seconds)
    sizes = {dtype: [size for d, size in made if d == dtype] for dtype in per_second}
    assert sizes == {
        torch.float32: [256, 1024],
        torch.bfloat16: [256, 1024, 2048, 4096],
        torch.float16: [256],
    }
    assert found.by_size["fp32"][1024] == pytest.approx(2e10)
    assert found.compared("bf16", "fp32") == (1024, pytest.approx(1e13), pytest.approx(2e10))


def test_rates_and_bandwidth_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "REPEAT_SECONDS", 0.0)
    monkeypatch.setattr(speed, "LONGEST_MATMUL", 0.0)
    monkeypatch.setattr(speed, "COPIED_BYTES", {"cpu": 2**20})
    assert matmuls(this()).status == "pass"
    assert doctor.bandwidth(this()).reason.endswith(" GB/s")


# --- tools --------------------------------------------------------------------------------------------------


def compiler_verdict(path: str) -> CheckResult:
    """Run the check in a new process, because torch caches its results about a compiler."""
    program = (
        "from pathlib import Path; from restomod.checks.doctor import *; from restomod.config.presets import preset;"
        "v = run_check(compiler, Machine('cpu', 'fp32', 'x', preset('quickstart'), Path()));"
        "import json; print(json.dumps([v.check, v.status, v.reason]))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": path}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return CheckResult(*json.loads(done.stdout))


def test_a_compiler_that_is_absent(tmp_path: Path) -> None:
    assert_says(
        compiler_verdict(str(tmp_path)), "warn", "no C++ compiler found", "train with --compile off", "install g++"
    )


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("x.h:1: fatal error: Python.h: No such file", "(Python.h is missing); train with --compile off, or install"),
        ("x.cpp:1:1: error: no such thing", "(x.cpp:1:1: error: no such thing); train with --compile off, or repair"),
    ],
)
def test_a_compiler_that_fails(tmp_path: Path, message: str, said: str) -> None:
    says_its_version = "case $1 in *version*) echo 'g++ (Planted) 12.2.0'; exit 0;; esac"
    (tmp_path / "g++").write_text(f"#!/bin/sh\n{says_its_version}\necho '{message}' >&2\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    assert_says(compiler_verdict(f"{tmp_path}:/usr/bin:/bin"), "warn", said)


@pytest.mark.slow
def test_a_compiler_that_works() -> None:
    assert_says(compiler_verdict(os.environ["PATH"]), "pass", "torch.compile works")


@pytest.mark.slow
def test_a_compiler_that_is_older_than_the_processor(tmp_path: Path) -> None:
    refuses = "case \"$*\" in *-mavx512*|*-mamx*) echo 'g++: error: unrecognized option' >&2; exit 1;; esac"
    (tmp_path / "g++").write_text(f'#!/bin/sh\n{refuses}\nexec {shutil.which("g++")} "$@"\n')
    (tmp_path / "g++").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert_says(compiler_verdict(path), "pass", "torch.compile works")


def test_a_compiler_with_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compile", lambda module: lambda x: module(x) * 1.001)
    assert_says(run_check(tools.compiler, this()), "fail", "outputs differ by", "--compile off")
    monkeypatch.setattr("torch.compile", lambda module: module)
    assert run_check(tools.compiler, this()).status == "pass"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Cannot find a working triton installation", "install triton"),
        ("CppCompileError: C++ compile error\n\nx.cpp:1:1: error: no such thing", "x.cpp:1:1: error: no such thing"),
        ("", "unknown reason"),
    ],
)
def test_causes_in_compiler_messages(message: str, said: str) -> None:
    assert said in " ".join(tools._compiler_problem(message))


def test_all_reduce_between_two_processes() -> None:
    assert_says(run_check(tools.processes, this()), "pass", "all-reduce works over gloo")


def test_a_process_group_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-network")
    assert_says(
        run_check(tools.processes, this()), "fail", "two processes cannot communicate (", "GLOO_SOCKET_IFNAME=lo"
    )


def test_processes_that_do_not_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "TIMEOUT", 0.01)
    assert_says(run_check(tools.processes, this()), "fail", "did not connect")


def _says(output: str, code: int = 0) -> Any:
    return lambda *_: SimpleNamespace(returncode=code, stdout=output, stderr="")


def test_a_wrong_all_reduce_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_child", _says("roundtrip gloo 3.0\nroundtrip NCCL 2.0\n"))
    assert_says(tools.processes(this()), "fail", "NCCL returned 2.0, not 3")
    monkeypatch.setattr(tools, "_child", _says("roundtrip gloo 3.0\nroundtrip NCCL 3.0\n"))
    assert_says(tools.processes(this()), "pass", "gloo and NCCL")
    monkeypatch.setattr(tools, "_child", _says(""))
    assert tools.processes(this()).status == "fail"


def test_a_child_finds_this_package_wherever_it_is_run_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "restomod").mkdir()  # another one in the current folder
    (tmp_path / "restomod" / "__init__.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    program = "import restomod, os; print(restomod.__file__, 'RANK' in os.environ)"
    done = tools._child(["-c", program], dict(os.environ))
    assert done is not None
    assert done.stdout.split() == [sys.modules["restomod"].__file__, "False"]


def test_a_user_error_in_a_check_becomes_its_reason() -> None:
    def wants_more(machine: Machine) -> CheckResult:
        raise UserError("micro_batch 3 does not divide")

    assert run_check(wants_more, this()) == CheckResult("wants more", "fail", "micro_batch 3 does not divide")
