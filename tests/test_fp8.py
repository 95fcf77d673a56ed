"""Matmuls in fp8: the rounding, the emulation against torch._scaled_mm, error bounds against float64, and who is left
alone."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.models import fill_projections
from vibechat import fp8
from vibechat.fp8 import E4M3, E5M2, fp8_linear, fp8_obstacle, quantize
from vibechat.gpt import GPT, MLP, GPTConfig
from vibechat.kernels import relu2_mlp
from vibechat.train_step import TrainStep

CONFIG = GPTConfig(sequence_len=16, vocab_size=67, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def relative(mine: Tensor, true: Tensor) -> float:
    mine, true = mine.detach().double(), true.detach().double()
    return float((mine - true).norm() / true.norm())


def dequantized(x: Tensor, dtype: torch.dtype) -> Tensor:
    x8, scale = quantize(x, dtype)
    return x8.double() * scale.double()


# ---------------------------------------------------------------------------------------------------------------------
# rounding


@given(st.integers(0, 2**30), st.integers(-60, 60), st.sampled_from([E4M3, E5M2]))
@settings(max_examples=40, deadline=None)
def test_a_tensor_fills_the_format_and_is_rounded_to_nearest(seed: int, binades: int, dtype: torch.dtype) -> None:
    x = randn(8, 16, seed=seed, scale=2.0**binades)
    x8, scale = quantize(x, dtype)
    largest, mantissa = torch.finfo(dtype).max, {E4M3: 3, E5M2: 2}[dtype]
    assert scale.dtype == torch.float32
    assert scale.shape == ()
    assert math.frexp(scale.item())[0] == 0.5  # a power of two
    top = x.abs().amax().double() / scale.double()
    assert largest / 2 <= top * (1 + 1e-12) <= largest * (1 + 1e-12)
    least = scale.double() * torch.finfo(dtype).tiny  # below this the steps no longer shrink
    bound = x.double().abs().clamp(min=least) * 2.0 ** -(mantissa + 1)
    assert ((x8.double() * scale.double() - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_zeros_and_tiny_numbers(dtype: torch.dtype) -> None:
    x8, scale = quantize(torch.zeros(2, 3, dtype=torch.bfloat16), dtype)
    assert x8.double().abs().max() == 0
    assert scale > 0
    tiny = torch.full((2, 3), 2.0**-120, dtype=torch.bfloat16)
    assert torch.isfinite(quantize(tiny, dtype)[0].double()).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x, w = randn(16, 16), randn(16, 16, seed=1)
    x[3, 4] = bad
    x, w = x.requires_grad_(), w.requires_grad_()
    assert not torch.isfinite(fp8_linear(x, w)).all()
    dy = randn(16, 16, seed=2)
    dy[0, 0] = bad
    clean = randn(16, 16, seed=3).requires_grad_()
    assert not torch.isfinite(torch.autograd.grad(fp8_linear(clean, w), clean, dy)[0]).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_with_a_bound_nobody_looks_for_the_maximum(bad: float) -> None:
    x = randn(8, 16)
    x8, scale = quantize(x, E4M3, torch.tensor(7.0 * 448))
    assert scale == 8
    assert torch.equal(x8.float(), (x.float() / 8).to(E4M3).float())
    x[2, 3] = bad
    assert quantize(x, E4M3, torch.tensor(9.0))[0].float().isnan().sum() == 1


def test_no_output_of_attention_exceeds_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where a row of the input is the row of w_v of the largest norm; and the bound is no more than 16 times it."""
    seen: list[tuple[float, float]] = []
    real = fp8.quantize

    def look(x: Tensor, dtype: torch.dtype, bound: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if bound is not None:
            seen.append((x.abs().amax().item(), bound.item()))
        return real(x, dtype, bound)

    monkeypatch.setattr(fp8, "quantize", look)
    trained = model(on=True)
    trained(*rows())
    attention = next(trained.blocks()).attn
    x = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1))
    w_v = attention.c_v.weight.detach()
    x[0, 0] = w_v[w_v.norm(dim=1).argmax()]
    x = torch.nn.functional.rms_norm(x, (64,)).bfloat16()
    attention(x, trained.cos[:16], trained.sin[:16], None)
    assert len(seen) == CONFIG.n_layer + 1
    assert all(largest < bound < 16 * largest for largest, bound in seen)
    assert seen[-1][0] > 0.7 * seen[-1][1]


# ---------------------------------------------------------------------------------------------------------------------
# the matmul


@pytest.mark.parametrize("first", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32], ids=str)
def test_the_emulation_is_what_pytorch_says_a_scaled_matmul_is(first: torch.dtype, out: torch.dtype) -> None:
    a, a_scale = quantize(randn(32, 48, scale=3), first)
    b, b_scale = quantize(randn(16, 48, seed=1, scale=0.01), E4M3)
    mine = fp8._matmul(a, b.t(), a_scale, b_scale, out, fast=False)
    theirs = torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=out)
    torch.testing.assert_close(mine, theirs, rtol=0 if out == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_error_bounds_against_float64(scale: float) -> None:
    """Forward two roundings of 2^-4 at most, backward one of 2^-4 and one of 2^-3, as root mean squares."""
    x, w, dy = randn(128, 96, scale=scale), randn(64, 96, seed=1, scale=0.05), randn(128, 64, seed=2, scale=1 / scale)
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    y = fp8_linear(*leaves)
    dx, dw = torch.autograd.grad(y, leaves, dy)
    assert y.dtype == dx.dtype == dw.dtype == torch.bfloat16
    assert relative(y, x.double() @ w.double().T) < 0.045
    assert relative(dx, dy.double() @ w.double()) < 0.07
    assert relative(dw, dy.double().T @ x.double()) < 0.07
    # and of the rounded operands it is the product, rounded once
    assert relative(y, dequantized(x, E4M3) @ dequantized(w, E4M3).T) < 2**-8
    assert relative(dx, dequantized(dy, E5M2) @ dequantized(w, E4M3)) < 2**-8
    assert relative(dw, dequantized(dy, E5M2).T @ dequantized(x, E4M3)) < 2**-8


def test_the_mlp_is_the_mlp() -> None:
    x, w_fc, w_proj = randn(2, 16, 32), randn(128, 32, seed=1, scale=0.2), randn(32, 128, seed=2, scale=0.2)
    mlp = MLP(GPTConfig(n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
    mlp.fp8_fc, mlp.fp8_proj = fp8.Fp8Linear(), fp8.Fp8Linear()
    mlp.c_fc.weight.data, mlp.c_proj.weight.data = w_fc, w_proj
    leaves = [x.requires_grad_(), mlp.c_fc.weight, mlp.c_proj.weight]
    mine, true = mlp(x), relu2_mlp(*(t.double() for t in leaves))
    assert mine.shape == x.shape
    assert relative(mine.detach(), true.detach()) < 0.1
    dy = randn(2, 16, 32, seed=3)
    for a, b in zip(torch.autograd.grad(mine, leaves, dy), torch.autograd.grad(true, leaves, dy.double()), strict=True):
        assert relative(a, b) < 0.15


def test_a_byte_a_number_is_saved() -> None:
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    x, w = randn(32, 64).requires_grad_(), randn(48, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        fp8_linear(x, w)
    assert sum(t.nbytes for t in saved) == 32 * 64 + 48 * 64 + 2 * 4


def test_one_graph() -> None:
    torch._dynamo.reset()
    x, w = randn(2, 16, 32).requires_grad_(), randn(48, 32, seed=1).requires_grad_()
    dy = randn(2, 16, 48, seed=2)
    compiled = torch.compile(fp8_linear, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x, w), fp8_linear(x, w)
    assert torch.equal(y, expected)
    for a, b in zip(torch.autograd.grad(y, (x, w), dy), torch.autograd.grad(expected, (x, w), dy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "what"), [(8, 16, 16, "8 rows"), (16, 24, 16, "24 inputs"), (16, 16, 8, "8 outputs")]
)
def test_sizes_that_the_hardware_does_not_take(rows: int, inputs: int, outputs: int, what: str) -> None:
    with pytest.raises(ValueError, match=f"{what} are not a multiple of 16"):
        fp8_linear(randn(rows, inputs), randn(outputs, inputs))


# ---------------------------------------------------------------------------------------------------------------------
# the model


def model(*, on: bool) -> GPT:
    torch.manual_seed(0)
    made = GPT(CONFIG)
    made.init_weights()
    fill_projections(made, 0.1)
    made.set_compute_dtype(torch.bfloat16)
    made.set_fp8(on)
    return made


def rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(CONFIG.vocab_size, (4, CONFIG.sequence_len + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def test_evaluation_runs_without_it() -> None:
    with torch.no_grad():
        assert torch.equal(model(on=True)(*rows()), model(on=False)(*rows()))
        assert list(model(on=True).generate([1, 2, 3], 4)) == list(model(on=False).generate([1, 2, 3], 4))
        x, w = randn(3, 5), randn(7, 5)  # no multiple of anything
        assert torch.equal(fp8_linear(x, w), F.linear(x, w))
    assert not torch.equal(model(on=True)(*rows()), model(on=False)(*rows()))


def test_gradients_of_every_parameter_are_those_of_bfloat16_but_for_rounding() -> None:
    first, second = model(on=True), model(on=False)
    for m in (first, second):
        m(*rows()).backward()
    for (name, mine), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert mine.grad.dtype == torch.float32
        assert relative(mine.grad, theirs.grad) < 0.25, name


def test_head_embedding_and_masters_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    real = fp8._Fp8Matmul.apply
    monkeypatch.setattr(
        fp8._Fp8Matmul, "apply", lambda x, b, w, *rest: seen.append(tuple(w.shape)) or real(x, b, w, *rest)
    )
    trained = model(on=True)
    trained(*rows()).backward()
    assert seen == [(128, 64), (64, 64), (256, 64), (64, 256)] * CONFIG.n_layer
    assert all(p.dtype == torch.float32 for p in trained.parameters())


def test_a_step_trains_and_a_loss_that_is_not_finite_touches_nothing() -> None:
    trained = model(on=True)
    step = TrainStep(trained, trained.setup_optimizers())
    losses = [step([rows(), rows()])[0].item() for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    trained.transformer.wte.weight.data[5] = math.inf
    before = [p.clone() for p in trained.parameters()]
    inputs, targets = rows()
    inputs[0, 0] = 5
    assert step([(inputs, targets), rows()])[2].item() == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trained.parameters(), strict=True))


def test_flops_are_counted_as_without_it() -> None:
    def counted(on: bool) -> int:
        counter, m = FlopCounterMode(display=False), model(on=on)
        with counter:
            m(*rows()).backward()
        return counter.get_total_flops()

    assert counted(True) == counted(False)
    assert model(on=True).estimate_flops() == model(on=False).estimate_flops()


def test_a_width_that_fp8_cannot_take_is_refused() -> None:
    narrow = GPT(GPTConfig(sequence_len=8, vocab_size=32, n_layer=1, n_head=1, n_kv_head=1, n_embd=24))
    narrow.set_fp8(False)
    with pytest.raises(ValueError, match="24 channels are not a multiple of 16"):
        narrow.set_fp8(True)


def test_who_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    assert "this is cpu" in (fp8_obstacle("cpu") or "")
    machine(9, 0)
    assert fp8_obstacle("cuda") is None
    assert "not float32" in (fp8_obstacle("cuda", torch.float32) or "")
    machine(8, 0)
    assert "this GPU has 8.0" in (fp8_obstacle("cuda") or "")


def test_the_quality_bench_prints_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    from bench import fp8_quality

    row: dict[str, Any] = {"seed": 1, "fp8": False, "val_bpb": 1.5}
    fp8_quality.print_table([row, {**row, "fp8": True, "val_bpb": 1.51}, {**row, "seed": 2}])
    text = capsys.readouterr().out
    assert "1    1.5000    1.5100     +0.0100" in text
    assert text.endswith("mean difference +0.0100 bits per byte over 1 seeds\n")
    two = [{"seed": seed, "fp8": fp8, "val_bpb": 1.5 + fp8 * seed / 100} for seed in (1, 3) for fp8 in (False, True)]
    fp8_quality.print_table(two)
    text = capsys.readouterr().out
    assert text.endswith("mean difference +0.0200 bits per byte over 2 seeds, standard deviation 0.0141\n")
