"""--device-batch-size auto: the plan of this model with its optimizers, and the trial that has the last word."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch

from vibechat import memory_plan, micro_batch
from vibechat.base_run import BaseRun
from vibechat.common import UserError
from vibechat.gpt import GPT, GPTConfig
from vibechat.micro_batch import (
    check_memory,
    is_out_of_memory,
    largest_micro_batch,
    out_of_memory,
    plan_of,
    predicted_micro_batch,
    state_bytes,
)
from vibechat.train_step import TrainStep

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(GPTConfig(16, 32, 2, 1, 1, 16))
    model.init_weights()
    return model


@pytest.fixture(scope="module")
def step(model: GPT) -> TrainStep:
    return TrainStep(model, model.setup_optimizers())


def test_the_plan_is_of_this_model_and_its_optimizers(model: GPT, step: TrainStep) -> None:
    parts = plan_of(model, step, 4).parts
    assert parts["parameters, fp32"] == 4 * model.num_params()
    assert parts["optimizer states, fp32"] == state_bytes(step)
    momentum = 4 * sum(p.numel() for p in model.transformer.h.parameters())
    adam = 8 * (model.lm_head.weight.numel() + model.transformer.wte.weight.numel())
    rows = 4 * sum(p.size(0) for p in model.transformer.h.parameters())  # NorMuon's
    assert state_bytes(step) == pytest.approx(momentum + rows + adam, abs=64)  # the counters of AdamW
    model.activation_checkpointing = True
    assert plan_of(model, step, 4).total < sum(parts.values())
    model.activation_checkpointing = False


def test_free_memory_comes_on_top_of_what_is_held(model: GPT, step: TrainStep, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(micro_batch, "largest_planned", lambda *args, available, **_: asked.append(available) or 1)
    predicted_micro_batch(model, step, 8, 1000)
    predicted_micro_batch(model, step, 8, None)
    assert asked == [1000 + 4 * model.num_params() + state_bytes(step), None]


def test_on_a_cpu(model: GPT, step: TrainStep, monkeypatch: pytest.MonkeyPatch) -> None:
    assert largest_micro_batch(model, step, 100) == 8
    assert largest_micro_batch(model, step, 3) == 2
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: 0)
    assert largest_micro_batch(model, step, 100) == 1


def test_a_model_that_is_too_large_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: 12_000)
    check_memory(1000, CPU)
    with pytest.raises(UserError, match=r"1,001 parameters need .* on cpu: choose a smaller --depth"):
        check_memory(1001, CPU)
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: None)
    check_memory(10**15, CPU)


@pytest.mark.parametrize("most", [0, 1, 5, 64])
def test_the_trial_halves_until_it_fits(
    model: GPT, step: TrainStep, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """As on a GPU that has room for `most` rows, whatever the plan says."""
    tried: list[int] = []
    real = model.forward

    def forward(idx: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        tried.append(idx.size(0))
        if idx.size(0) > most:
            raise torch.OutOfMemoryError
        return real(idx, *args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(micro_batch, "predicted_micro_batch", lambda model, step, rows, free: rows)
    before = [p.detach().clone() for p in model.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "get_device", lambda self: torch.device("cuda"))
        patch.setattr(micro_batch, "free_bytes", lambda device: 1 << 40)
        patch.setattr(model, "_hidden", lambda idx, *_: model.transformer.wte.weight[idx].to(model.compute_dtype))
        if most == 0:
            with pytest.raises(UserError, match=r"not even one row.*--activation-checkpointing"):
                largest_micro_batch(model, step, 64)
            assert tried == [64, 32, 16, 8, 4, 2, 1]
        else:
            assert largest_micro_batch(model, step, 64) == {1: 1, 5: 4, 64: 64}[most]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_running_out_names_the_flag_and_the_value(model: GPT, step: TrainStep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: 1 << 40)
    message = str(out_of_memory(model, step, 8))
    assert message.startswith("out of memory with --device-batch-size 8 (planned: ")
    assert "try --device-batch-size 4 (or auto), or --activation-checkpointing" in message
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: 0)
    assert "try --device-batch-size 1 (or auto)" in str(out_of_memory(model, step, 8))
    assert "try a smaller --depth or --max-seq-len" in str(out_of_memory(model, step, 1))
    monkeypatch.setattr(model, "activation_checkpointing", True)
    assert "--activation-checkpointing" not in str(out_of_memory(model, step, 8))


def test_a_run_that_runs_out_says_so_and_another_error_stays_what_it_is(model: GPT, step: TrainStep) -> None:
    def raising(error: BaseException) -> BaseRun:
        run = object.__new__(BaseRun)
        run.model, run.train_step, run.B = model, step, 8
        run.trainer = Mock(train=Mock(side_effect=error))
        return run

    with pytest.raises(UserError, match="out of memory with --device-batch-size 8 "):
        raising(torch.OutOfMemoryError("no 3 GiB")).train()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        raising(RuntimeError("mat1 and mat2 shapes cannot be multiplied")).train()


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("no 3 GiB"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_running_out_looks_like(error: BaseException, is_it: bool) -> None:
    assert is_out_of_memory(error) is is_it
    assert memory_plan.free_bytes(CPU) != 0
