"""FSDP: equality with DDP, dtypes of gathered parameters, gathering, checkpoints; DDP and FSDP with torch.compile."""

from __future__ import annotations

import functools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from restomod.config.run import ModelConfig, Parallel
from restomod.data.batches import MicroBatches
from restomod.engine.distributed import SINGLE, Processes, compiled_parts, distribute, synchronised
from restomod.engine.gather import gather_full_model, gather_model_on_main, gather_on_main
from restomod.engine.optimizer import build_optimizer, optimizer_tensors
from restomod.engine.step import BatchLoss, ComputeConfig, train_step
from restomod.evals.validation import token_losses
from restomod.model.gpt import GPT
from restomod.runs.async_saver import Saver
from restomod.runs.checkpoint import load_checkpoint
from tests.models import CPU
from tests.processes import error_lines, launch, member, results
from tests.trainee import Trainee, assert_identical, make_trainee

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPT2 = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=97)
MODERN = ModelConfig(
    n_layer=2,
    n_head=2,
    n_embd=32,
    n_positions=16,
    vocab_size=97,
    norm="rmsnorm",
    positions="rope",
    mlp="swiglu",
    qk_norm=True,
    bias=False,
    tied=False,
    embedding_norm=True,
    embedding_skip=True,
    value_embedding=True,
)


def shared_out(
    processes: Processes, parallel: Parallel = "fsdp", dtype: torch.dtype = FP32, **changes: Any
) -> tuple[Trainee, nn.Module]:
    """Build a run of several ranks with 16 sequences per step, and the module that computes its loss."""
    t = make_trainee(**{"batch_tokens": 256, **changes})
    loss_of = distribute(BatchLoss(t.model, ComputeConfig(CPU, dtype, 2)), t.model, parallel, processes, dtype)
    t.optimizer = build_optimizer(t.model, t.config.optim, dtype, processes)
    return t, loss_of


def share_of(t: Trainee, step: int, processes: Processes, micro_batch: int = 2) -> MicroBatches:
    return t.batches.micro_batches(step, micro_batch, processes.rank, processes.world_size)


def train(t: Trainee, loss_of: nn.Module, processes: Processes, first: int, end: int) -> list[tuple[float, bool]]:
    """Train steps [first, end); return each loss, and whether the update was skipped."""
    made = [
        train_step(loss_of, t.optimizer, share_of(t, s, processes), t.config, s, processes) for s in range(first, end)
    ]
    return [(outcome.loss, outcome.refused) for outcome in (step.wait() for step in made)]


def full(tensor: Tensor) -> Tensor:
    """Return a full copy of a tensor or DTensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights(model: GPT) -> dict[str, Tensor]:
    return {name: full(parameter) for name, parameter in model.named_parameters()}


# --- precision -----------------------------------------------------------------------------------------------


def gradients_in_bf16(processes: Processes, parallel: Parallel, model: ModelConfig) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of a step of four micro-batches in bf16."""
    t, loss_of = shared_out(processes, parallel, BF16, model=model)
    found: dict[str, Tensor] = {}
    t.optimizer.parts[0].register_step_pre_hook(
        lambda *_: found.update({name: full(p.grad) for name, p in t.model.named_parameters() if p.grad is not None})
    )
    ((loss, _),) = train(t, loss_of, processes, 0, 1)
    return loss, found


@pytest.mark.parametrize("model", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_gradients_in_bf16_equal_those_of_ddp_bit_for_bit(model: ModelConfig) -> None:
    """FSDP rounds linear layers before the all-gather, DDP's autocast rounds them in the forward pass."""
    (loss, expected), *_ = results(2, member, gradients_in_bf16, "ddp", model)
    for found_loss, found in results(2, member, gradients_in_bf16, "fsdp", model):
        assert found_loss == loss
        assert_identical(found, expected)


def dtypes_in_forward(processes: Processes) -> tuple[dict[str, torch.dtype], set[torch.dtype], torch.dtype]:
    """Return the dtypes of a block's parameters in the forward pass, of the residual stream, and of the embedding."""
    t, loss_of = shared_out(processes, "fsdp", BF16, model=MODERN)
    block, parameters, stream = t.model.transformer.h[1], {}, set()
    embedding = []

    def within_block(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        parameters.update({name: p.dtype for name, p in block.named_parameters()})
        stream.add(inputs[0].dtype)
        embedding.append(t.model.transformer.wte.weight.dtype)

    block.ln_2.register_forward_pre_hook(within_block)
    train(t, loss_of, processes, 0, 1)
    return parameters, stream, embedding[0]


def test_linear_layers_are_gathered_in_the_compute_dtype_and_others_in_fp32() -> None:
    for parameters, stream, embedding in results(2, member, dtypes_in_forward):
        linear = {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
        assert {name for name, dtype in parameters.items() if dtype == BF16} == linear
        assert {"ln_1.weight", "attn.q_norm.weight", "attn.v_skip.skip", "x_skip.weight"} < parameters.keys()
        assert {dtype for name, dtype in parameters.items() if name not in linear} == {FP32}
        assert stream == {FP32}
        assert embedding == FP32


def on_the_cpu_of_a_machine_with_gpus(processes: Processes) -> list[tuple[float, bool]]:
    torch._C._get_accelerator = lambda *_: torch.device("cuda")  # type: ignore[assignment]
    t, loss_of = shared_out(processes)
    return train(t, loss_of, processes, 0, 2)


def test_a_model_on_the_cpu_of_a_gpu_machine_stays_on_the_cpu() -> None:
    first, second = results(2, member, on_the_cpu_of_a_machine_with_gpus)
    assert first == second
    assert not any(refused for _, refused in first)


def order_of_copies(processes: Processes) -> list[str]:
    """Return the order of token copies and FSDP's own hook, which would copy synchronously."""
    t, loss_of = shared_out(processes)
    tokens, targets = t.batches.load(t.batches.windows(0)[:2])
    order, to, prepare = [], Tensor.to, FSDPState._root_pre_forward

    def copied(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        order.extend(["copy", *options] if tensor is tokens or tensor is targets else [])
        return to(tensor, *arguments, **options)

    def prepared(self: FSDPState, module: nn.Module, *arguments: Any) -> Any:
        order.extend(["FSDP"] if module is loss_of else [])
        return prepare(self, module, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "to", copied)
        patch.setattr(FSDPState, "_root_pre_forward", prepared)
        loss_of(tokens, targets)
    return order


def test_tokens_are_copied_asynchronously_before_fsdps_hook() -> None:
    expected = ["copy", "non_blocking", "copy", "non_blocking", "FSDP"]
    assert [order[:5] for order in results(2, member, order_of_copies)] == [expected, expected]


def overflow_in_one(
    processes: Processes, parallel: Parallel
) -> tuple[list[bool], list[float], bool, dict[str, Tensor]]:
    """Train a step in fp16 whose gradients overflow in rank 1 only, and the steps after it."""
    t, loss_of = shared_out(processes, parallel, FP16)
    t.optimizer.loss_scale.factor.fill_(2.0**10)
    train(t, loss_of, processes, 0, 2)
    before = weights(t.model)
    inner = loss_of.module if isinstance(loss_of, DistributedDataParallel) else loss_of
    hook = inner.register_forward_hook(lambda _, inputs, loss: loss * (2.0**60 if processes.rank == 1 else 1.0))
    factors, refused = [t.optimizer.loss_scale.factor.item()], []
    for step in range(2, 5):
        refused.append(train(t, loss_of, processes, step, step + 1)[0][1])
        factors.append(t.optimizer.loss_scale.factor.item())
        if step == 2:
            unchanged = all(torch.equal(value, before[name]) for name, value in weights(t.model).items())
            hook.remove()
    return refused, factors, unchanged, weights(t.model)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_fp16_overflow_in_one_rank_skips_the_update_in_all(parallel: Parallel) -> None:
    found = results(2, member, overflow_in_one, parallel)
    for refused, factors, unchanged, _ in found:
        assert refused == [True, False, False]
        assert factors == [2.0**10, 2.0**9, 2.0**9, 2.0**9]
        assert unchanged
    assert_identical(found[0][3], found[1][3])


# --- gathering -----------------------------------------------------------------------------------------------


def gathered(processes: Processes) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], int]:
    """Return expected state, gathered weights, gathered state, and the peak number of full tensors in memory."""
    t, loss_of = shared_out(processes)
    train(t, loss_of, processes, 0, 2)
    expected = weights(t.model) | {n: full(v) for n, v in optimizer_tensors(t.model, t.optimizer).items()}
    alive: list[weakref.ref[Tensor]] = []
    most, gather = 0, DTensor.full_tensor

    def counted(self: DTensor) -> Tensor:
        nonlocal most
        tensor = gather(self)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", counted)
        model = gather_model_on_main(t.model, processes)
        state = gather_on_main(optimizer_tensors(t.model, t.optimizer), processes)
        gather_full_model(t.model, keep=processes.main)
    return expected, {n: p for n, p in model.named_parameters() if not p.is_meta}, state, most


def test_a_checkpoint_is_gathered_in_the_main_process_only() -> None:
    main, other = results(2, member, gathered)
    expected, model, state, _ = main
    assert_identical(model | state, expected)
    _, model, state, most = other
    assert not model
    assert not state
    assert most == 1


def evaluated(processes: Processes) -> tuple[Tensor, Tensor, set[torch.dtype], set[str]]:
    """Return losses of a bf16 and of an fp32 copy, dtypes of the bf16 copy, and devices of a copy without weights."""
    t, loss_of = shared_out(processes, "fsdp", BF16, model=MODERN)
    train(t, loss_of, processes, 0, 5)
    small, large = gather_full_model(t.model, BF16), gather_full_model(t.model)
    tokens, targets = t.batches.load(t.batches.windows(9))
    with torch.no_grad():
        losses = [token_losses(model, tokens, targets, CPU, BF16) for model in (small, large)]
    none = gather_full_model(t.model, BF16, keep=False)
    linear = {p.dtype for m in small.transformer.h.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    return losses[0], losses[1], linear, {p.device.type for p in none.parameters()}


def test_evaluation_with_bf16_blocks_has_equal_losses() -> None:
    for small, large, linear, none in results(2, member, evaluated):
        assert torch.equal(small, large)
        assert linear == {BF16}
        assert none == {"meta"}


# --- checkpoints ---------------------------------------------------------------------------------------------


def saved_and_loaded(processes: Processes, parallel: Parallel, folder: Path, optimizer: str) -> bool:
    """Save, load into a new run, and continue both; only the main process has a folder."""
    run = folder / str(processes.rank)
    optim = make_trainee().config.optim
    changes = {"optim": type(optim)(lr=3e-3, warmup_steps=3, optimizer=optimizer)}  # type: ignore[arg-type]
    old, old_loss = shared_out(processes, parallel, **changes)
    train(old, old_loss, processes, 0, 3)
    with Saver(run, old.config, processes) as saver:
        saver.save(3, old.model, old.optimizer)
        saver.finish()
    assert run.exists() == processes.main
    new, new_loss = shared_out(processes, parallel, seed=2, **changes)
    train(new, new_loss, processes, 0, 1)
    new.batches = old.batches
    assert load_checkpoint(run / "checkpoints/step_000003", new.model, new.optimizer, processes) == 3
    for t, loss_of in ((old, old_loss), (new, new_loss)):
        train(t, loss_of, processes, 3, 5)
    states = [
        weights(t.model) | {n: full(v) for n, v in optimizer_tensors(t.model, t.optimizer).items()} for t in (old, new)
    ]
    assert_identical(*states)
    return True


@pytest.mark.parametrize(("parallel", "optimizer"), [("ddp", "adamw"), ("fsdp", "adamw"), ("fsdp", "muon")])
def test_only_the_main_process_writes_and_reads_checkpoints(tmp_path: Path, parallel: Parallel, optimizer: str) -> None:
    assert results(2, member, saved_and_loaded, parallel, tmp_path, optimizer) == [True, True]


def loaded_by_another(processes: Processes, folder: Path) -> None:
    old, loss_of = shared_out(processes)
    train(old, loss_of, processes, 0, 1)
    with Saver(folder, old.config, processes) as saver:
        saver.save(1, old.model, old.optimizer)
        saver.finish()
    other, _ = shared_out(processes, optim=type(old.config.optim)(optimizer="muon"))
    load_checkpoint(folder / "checkpoints/step_000001", other.model, other.optimizer, processes)


def test_a_checkpoint_of_another_optimizer_is_refused_with_one_line(tmp_path: Path) -> None:
    ended = launch(2, member, loaded_by_another, tmp_path, timeout=30)
    (line,) = error_lines(ended)
    assert "belongs to another optimizer or model" in line
    assert [e.code for e in ended] == [2, 2]


# --- torch.compile -------------------------------------------------------------------------------------------

WIDE = ModelConfig(n_layer=2, n_head=2, n_embd=256, n_positions=16, vocab_size=97)  # gradients of several megabytes


def gradients_of_two_steps(
    processes: Processes, parallel: Parallel, gradient_checkpointing: bool, micro_batch: int
) -> list[dict[str, Tensor]]:
    t = make_trainee(batch_tokens=256, model=WIDE)
    t.model.transformer.gradient_checkpointing = gradient_checkpointing
    if processes.world_size > 1:
        for module in compiled_parts(t.model, parallel):
            module.compile(backend="aot_eager")  # traced and differentiated, without kernels
    loss_of = distribute(BatchLoss(t.model, ComputeConfig(CPU, FP32, 2)), t.model, parallel, processes)
    found = []
    for step in range(2):
        batch = share_of(t, step, processes, micro_batch)
        for i, (tokens, targets) in enumerate(batch):
            with synchronised(loss_of, last=i + 1 == len(batch)):
                (loss_of(tokens, targets) / len(batch)).backward()
        found.append({name: full(p.grad) for name, p in t.model.named_parameters() if p.grad is not None})
        t.model.zero_grad(set_to_none=True)
    return found


def compiled(
    processes: Processes, parallel: Parallel, gradient_checkpointing: bool, micro_batch: int
) -> tuple[list[dict[str, Tensor]], int, int]:
    """Return gradients, the number of compiled operations, and the number of graphs."""
    with pytest.MonkeyPatch.context() as patch:
        small = functools.partialmethod(DistributedDataParallel.__init__, bucket_cap_mb=1)
        patch.setattr(DistributedDataParallel, "__init__", small)  # several buckets, like a large model
        found = gradients_of_two_steps(processes, parallel, gradient_checkpointing, micro_batch)
    return found, counters["stats"]["calls_captured"], counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["", "gradient_checkpointing"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("micro_batch", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_compiled_gradients_equal_eager_ones_of_one_process(
    parallel: Parallel, gradient_checkpointing: bool, micro_batch: int
) -> None:
    expected = gradients_of_two_steps(SINGLE, "ddp", False, 8)
    for found, operations, graphs in results(2, member, compiled, parallel, gradient_checkpointing, micro_batch):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys()
            for name, gradient in theirs.items():
                torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4)
        assert operations > 0
        assert graphs == 1, "all blocks share one graph, without recompilation"
