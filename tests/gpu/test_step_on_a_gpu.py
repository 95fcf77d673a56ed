"""The training step on a real GPU: no wait for the device, the memory plan against the allocator, CUDA graphs."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vibechat import fp8 as eight
from vibechat.fp8 import fp8_obstacle
from vibechat.gpt import GPT
from vibechat.memory_plan import memory_plan
from vibechat.scaling import model_config
from vibechat.train_step import MicroBatch, TrainStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
LENGTH, VOCABULARY, ROWS = 1024, 8192, 8


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or fp8_obstacle("cuda") is not None, reason="no GPU that multiplies fp8"
)


def make_step(depth: int = 4, fp8: bool = False, **kwargs: bool) -> TrainStep:
    torch.manual_seed(0)
    model = GPT(model_config(depth, LENGTH, VOCABULARY)).cuda()
    model.init_weights()
    model.set_fp8(fp8)
    return TrainStep(model, model.setup_optimizers(), say=lambda text: None, **kwargs)


def batches() -> Iterator[MicroBatch]:
    for seed in itertools.count():
        rng = torch.Generator("cuda").manual_seed(seed)
        tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), device="cuda", generator=rng)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@pytest.mark.parametrize("fp8", [False, pytest.param(True, marks=hopper)])
@pytest.mark.parametrize("compile", [False, True])
def test_a_step_never_waits_for_the_device(compile: bool, fp8: bool) -> None:
    step, source = make_step(compile=compile, fp8=fp8), batches()
    rows = [next(source) for _ in range(4)]
    step(rows[:2], 0.5, 0.9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        numbers = step(rows[2:], 0.4, 0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert numbers[2].item() == 0
    assert step.compiled is compile


@pytest.mark.parametrize("compile", [False, True])
def test_the_plan_is_what_the_allocator_saw(compile: bool) -> None:
    """Within a quarter: the plan is for the largest tensors, and the allocator rounds up."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step, source = make_step(12, compile=compile), batches()
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        step([next(source), next(source)])
    peak = torch.cuda.max_memory_allocated() - before
    planned = memory_plan(model_config(12, LENGTH, VOCABULARY), ROWS, "compiled" if compile else "eager").total
    assert peak == pytest.approx(planned, rel=0.25)


def test_cuda_graphs_train_the_same() -> None:
    def losses(**kwargs: bool) -> Tensor:
        step, source = make_step(compile=True, **kwargs), batches()
        return torch.stack([step([next(source), next(source)])[0] for _ in range(6)])

    torch.testing.assert_close(losses(cuda_graphs=True), losses(), rtol=1e-3, atol=1e-3)


@hopper
def test_the_hardware_multiplies_fp8_as_the_emulation_does() -> None:
    """Without fast accumulation, which keeps fewer bits between partial sums; with it within 2^-7 of the largest."""
    rng = torch.Generator("cuda").manual_seed(0)
    x, w = (torch.randn(shape, device="cuda", generator=rng).bfloat16() for shape in ((512, 1024), (768, 1024)))
    (x8, x_scale), (w8, w_scale) = eight.quantize(x, eight.E5M2), eight.quantize(w, eight.E4M3)
    emulated = (x8.bfloat16() @ w8.bfloat16().t()).float() * x_scale * w_scale
    for fast, error in ((False, 2**-8), (True, 2**-7)):
        y = eight._matmul(x8, w8.t(), x_scale, w_scale, torch.bfloat16, fast=fast).float()
        assert (y - emulated).abs().max() <= error * emulated.abs().max()


@hopper
def test_fp8_compiled_trains_as_fp8_eager_does() -> None:
    def losses(**kwargs: bool) -> Tensor:
        step, source = make_step(fp8=True, **kwargs), batches()
        return torch.stack([step([next(source), next(source)])[0] for _ in range(6)])

    torch.testing.assert_close(losses(compile=True), losses(compile=False), rtol=1e-2, atol=1e-2)
