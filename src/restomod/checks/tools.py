"""Checks of torch.compile and of distributed training."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn

from restomod.checks.machine import Machine
from restomod.engine.distributed import join_processes
from restomod.utils.console import CheckResult

COMPILED_TOLERANCE = 1e-5
TIMEOUT = 60.0  # seconds until a child process is stopped


def compiler(machine: Machine) -> CheckResult:
    """Check that torch.compile works on a small module, without caches, and does not change its output."""
    name, device = "compiler", machine.device
    module = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64)).to(device)
    x = torch.randn(8, 64, device=device)
    expected = module(x).detach()
    try:
        found = _compile_uncached(module, x)
    except torch._dynamo.exc.TorchDynamoException as e:
        why, fix = _compiler_problem(str(e))
        return CheckResult(name, "warn", f"torch.compile fails ({why}); train with --compile off, or {fix}")
    off = (found - expected).abs().max().item()
    if not off <= COMPILED_TOLERANCE:
        return CheckResult(name, "fail", f"compiled and eager outputs differ by {off:.1e}; train with --compile off")
    return CheckResult(name, "pass", "torch.compile works; compiled and eager outputs agree")


def _compile_uncached(module: nn.Module, x: Tensor) -> Tensor:
    """Compile a module without torch's caches, and return its output.

    torch normally compiles and runs a test program for each vector instruction set of the CPU, which takes most of the
    time. This function uses the best set without the test. A second attempt uses no vector instructions, for old
    compilers.
    """
    import torch._inductor.config
    from torch._inductor.utils import fresh_cache

    # precompiled headers save time only with two or more kernels
    options = {"cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": True}
    problem: BaseException | None = None
    for more in ({}, {"cpp.simdlen": 1}):
        with fresh_cache(), torch._inductor.config.patch(options | more), torch.no_grad():
            torch._dynamo.reset()
            try:
                return torch.compile(module)(x)
            except torch._dynamo.exc.TorchDynamoException as e:
                # raised again outside `fresh_cache`, which keeps its folder after an exception
                problem = e
    assert problem is not None
    raise problem


def _compiler_problem(message: str) -> tuple[str, str]:
    """Extract the cause from an error message, and return it with a fix."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["unknown reason"]
    if "No working C++ compiler" in message:
        return "no C++ compiler found", "install g++ (apt install g++; on macOS xcode-select --install)"
    if "Python.h" in message:
        return "Python.h is missing", "install Python's headers (apt install python3-dev)"
    if "triton" in message.lower():
        return f"{lines[0]:.120}", "install triton (pip install triton) and a C compiler (apt install gcc)"
    error = next((line for line in lines if re.search(r"\b(fatal )?error:", line)), lines[0])
    return f"{error:.120}", "repair g++: it must compile a file that includes <cmath>"


def processes(machine: Machine) -> CheckResult:
    """Check an all-reduce between two processes started by torchrun: over gloo, and over NCCL with two GPUs."""
    name, fix = "processes", "training in one process still works; for several,"
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 -m restomod.checks.tools"
    done = _child(command.split(), os.environ | {"OMP_NUM_THREADS": "1"})
    if done is None:
        return CheckResult(name, "fail", f"two processes did not connect in {TIMEOUT:.0f} s; {fix} {_INTERFACE}")
    answers = re.findall(r"^roundtrip (\S+) (\S+)$", done.stdout, re.MULTILINE)
    if done.returncode or not answers:
        errors = re.findall(r"^\S*(?:Error|Exception): .+$|^restomod: error: .+$", done.stderr, re.MULTILINE)
        why = errors[0] if errors else f"exit code {done.returncode}"
        return CheckResult(name, "fail", f"two processes cannot communicate ({why:.160}); {fix} {_INTERFACE}")
    wrong = [f"{backend} returned {total}" for backend, total in answers if float(total) != 3.0]
    if wrong:
        return CheckResult(name, "fail", f"all-reduce of 1 and 2: {', '.join(wrong)}, not 3; {fix} reinstall torch")
    return CheckResult(name, "pass", f"all-reduce works over {' and '.join(backend for backend, _ in answers)}")


def print_sums() -> None:
    """Compute 1 + 2 between two ranks; rank 0 prints `roundtrip BACKEND SUM` for each backend."""
    with join_processes() as ranks:
        (total,) = ranks.sum(ranks.rank + 1.0)
        answers = {"gloo": total}
        if torch.cuda.device_count() >= ranks.world_size:
            value = torch.tensor(ranks.rank + 1.0, device=torch.device("cuda", ranks.local_rank))
            dist.all_reduce(value)
            answers["NCCL"] = value.item()
        if ranks.main:
            for backend, answer in answers.items():
                print(f"roundtrip {backend} {answer}", flush=True)


_INTERFACE = "set the network interface: export GLOO_SOCKET_IFNAME=lo (on one machine)"


def _child(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str] | None:
    """Run Python in a child process; after `TIMEOUT`, stop it with its children and return None."""
    with tempfile.TemporaryDirectory() as empty:  # -m searches the current folder first
        child = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={k: v for k, v in environment.items() if k not in _TORCHRUN} | {"PYTHONPATH": _python_path()},
            cwd=empty,
        )
        try:
            output, errors = child.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            child.terminate()  # torchrun also stops its children
            child.communicate()
            return None
        return subprocess.CompletedProcess(child.args, child.returncode, output, errors)


_TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}


def _python_path() -> str:
    """Return this process's module search path with absolute folders, for a child in another folder."""
    return os.pathsep.join(os.path.abspath(folder) for folder in sys.path)


if __name__ == "__main__":
    print_sums()
