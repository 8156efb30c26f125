"""`doctor`'s checks of GPU libraries, with simulated reports of a machine with a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from restomod.checks import gpu
from restomod.checks.gpu import attention, check_faults, chosen_backend, cudnn, is_supported, known_faults
from restomod.checks.machine import Machine
from restomod.config.presets import preset
from restomod.engine.device import REDUCTIONS
from restomod.model.attention import BACKENDS, Use
from tests.checks.test_doctor import assert_says, this


class WithGPU(Machine):
    device = torch.device("cuda", 0)  # type: ignore[assignment]
    dtype = torch.bfloat16  # type: ignore[assignment]


MACHINE = WithGPU("cuda", "auto", "quickstart", preset("quickstart"), Path("runs"))


# --- attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", list(BACKENDS))
def test_the_backend_is_the_one_that_torch_chooses(use: Use) -> None:
    """On a CPU, torch chooses its flash kernel for all uses."""
    assert chosen_backend(torch.device("cpu"), torch.float32, use) == SDPBackend.FLASH_ATTENTION


def test_every_use_is_named_with_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "chosen_backend", lambda device, dtype, use: BACKENDS[use][0])
    expected = "cuDNN for training, memory-efficient for masked training, flash for scoring, flash for decoding"
    assert_says(attention(MACHINE), "pass", expected)


def test_the_math_backend_on_a_gpu_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "chosen_backend", lambda device, dtype, use: SDPBackend.MATH)
    assert_says(attention(MACHINE), "warn", "math for training", "update torch")


# --- cuDNN ----------------------------------------------------------------------------------------------------


@pytest.fixture
def maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replaces the list of this process's mapped files."""
    monkeypatch.setattr(gpu, "MAPS", tmp_path / "maps")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "site-packages/torch/__init__.py"))
    (tmp_path / "site-packages/nvidia/cudnn").mkdir(parents=True)
    return tmp_path / "maps"


def mapped(file: Path) -> str:
    return f"7f0000000000-7f0000001000 r--p 00000000 08:01 4242                       {file}\n"


def test_cudnn_is_named_with_its_folder(maps: Path, tmp_path: Path) -> None:
    folder = tmp_path / "site-packages/nvidia/cudnn/lib"
    maps.write_text(
        mapped(Path("/lib/libc.so.6")) + mapped(folder / "libcudnn.so.9") + "7ffc0-7ffc1 rw-p 0 0 0 [stack]\n"
    )
    assert_says(cudnn(MACHINE), "pass", f"9.19.0, from {folder}")


def test_another_cudnn_than_torchs_own_is_a_warning(maps: Path) -> None:
    maps.write_text(mapped(Path("/usr/local/cuda/lib64/libcudnn.so.9.8.0")))
    assert_says(cudnn(MACHINE), "warn", "from /usr/local/cuda/lib64", "unset LD_LIBRARY_PATH")


def test_without_a_list_of_mapped_files_the_folder_is_unknown(maps: Path) -> None:
    assert_says(cudnn(MACHINE), "pass", "from an unknown folder")


# --- faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "kernels", "supported"),
    [
        ((9, 0), ["sm_80", "sm_90", "compute_90"], True),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((8, 9), ["sm_80", "sm_90"], True),  # binaries of the same major capability
        ((7, 0), ["sm_75", "sm_80"], False),  # a V100 and a build for CUDA 13
        ((12, 0), ["sm_80", "sm_90"], False),  # an RTX 5090 and a build for CUDA 12.6
        ((12, 0), ["sm_80", "compute_90"], True),  # PTX, compiled at load time
        ((8, 0), ["sm_86"], False),
    ],
)
def test_a_gpu_without_kernels_is_found(capability: tuple[int, int], kernels: list[str], supported: bool) -> None:
    assert is_supported(capability, kernels) == supported


def test_a_gpu_without_kernels_fails_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    assert_says(known_faults(MACHINE), "fail", "compute capability 7.0, only for sm_75, sm_90", "install a build")


@pytest.mark.parametrize(
    ("release", "capability", "reductions", "masks"),
    [
        ((2, 11), (9, 0), True, True),
        ((2, 13), (8, 0), True, False),
        ((2, 15), (9, 0), False, False),
    ],
)
def test_avoided_faults_are_listed_and_pass(
    release: tuple[int, int],
    capability: tuple[int, int],
    reductions: bool,
    masks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("restomod.engine.device.torch_release", lambda: release)
    monkeypatch.delenv(REDUCTIONS, raising=False)
    verdict = check_faults(capability, release)
    assert verdict.status == "pass"
    assert ("mix-order reductions" in verdict.reason) == reductions
    assert ("with a mask" in verdict.reason) == masks


def test_a_fault_enabled_by_the_environment_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr("restomod.engine.device.torch_release", lambda: (2, 11))
    monkeypatch.setenv(REDUCTIONS, "1")
    with inductor.patch({"triton.mix_order_reduction": True}):
        assert_says(check_faults((8, 0), (2, 11)), "warn", "wrong gradients", f"unset {REDUCTIONS}")


def test_without_a_gpu_the_checks_are_skipped() -> None:
    for check in (cudnn, known_faults):
        assert check(this()).status == "skip"
