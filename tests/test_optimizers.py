"""Muon and AdamW against the formulas written out in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.spectra import exact
from vibechat.adamw import DistAdamW
from vibechat.kernels.muon_passes import momentum_pass, update_pass
from vibechat.muon import DistMuon, Muon

SHAPES = [(8, 8), (16, 8), (8, 16), (8, 8), (16, 8)]


def matrices(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def set_gradients(params: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIBECHAT_DTYPE", "float32")


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("optimizer", [Muon, DistMuon])
def test_muon_is_the_formula_over_twenty_steps(optimizer: type[Muon], nesterov: bool) -> None:
    params = matrices()
    expected = [p.detach().double() for p in params]
    momenta = [torch.zeros_like(p) for p in expected]
    muon = optimizer(params, lr=0.1, momentum=0.9, nesterov=nesterov)
    for step in range(20):
        set_gradients(params, step)
        for p, m, x in zip(params, momenta, expected, strict=True):
            assert p.grad is not None
            g = p.grad.double()
            m += 0.1 * (g - m)
            u = 0.1 * g + 0.9 * m if nesterov else m
            x -= 0.1 * max(1, x.size(0) / x.size(1)) ** 0.5 * exact(u)
        muon.step()
    for p, x in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), x, atol=2e-4, rtol=2e-4)


def test_adamw_is_the_formula_over_twenty_steps() -> None:
    params = matrices()
    expected = [p.detach().double() for p in params]
    moments = [(torch.zeros_like(x), torch.zeros_like(x)) for x in expected]
    adamw = DistAdamW([{"params": params[:2], "lr": 0.1}, {"params": params[2:]}], 0.01, (0.8, 0.95), 1e-10, 0.1)
    for step in range(20):
        set_gradients(params, step)
        for i, (p, (m, v), x) in enumerate(zip(params, moments, expected, strict=True)):
            assert p.grad is not None
            g, lr = p.grad.double(), 0.1 if i < 2 else 0.01
            m += 0.2 * (g - m)
            v += 0.05 * (g * g - v)
            x *= 1 - lr * 0.1
            x -= lr * (m / (1 - 0.8 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-10)
        adamw.step()
    for p, x in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), x, atol=1e-5, rtol=1e-5)


Make = Callable[[list[Tensor]], torch.optim.Optimizer]
MAKERS = {
    "muon": lambda params: Muon(params),
    "muon with everything": lambda params: Muon(params, weight_decay=0.1, normuon=True),
    "adamw": lambda params: DistAdamW([{"params": params}]),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_touches_nothing(make: Make, poison: float) -> None:
    params = matrices()
    optimizer = make(params)
    set_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    states = {i: {k: v.clone() for k, v in optimizer.state[p].items()} for i, p in enumerate(params)}
    set_gradients(params, 1)
    assert params[0].grad is not None
    params[0].grad[3, 3] = poison
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    for i, p in enumerate(params):
        assert all(torch.equal(v, states[i][k]) for k, v in optimizer.state[p].items())
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    set_gradients(params, 1)
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_state_copied_in_place_continues_bitwise(make: Make) -> None:
    def run(params: list[Tensor], optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            set_gradients(params, step)
            optimizer.step()

    params = matrices()
    optimizer = make(params)
    run(params, optimizer, range(3))
    again = [p.detach().clone().requires_grad_() for p in params]
    other = make(again)
    for p, q in zip(params, again, strict=True):
        for key, value in optimizer.state[p].items():
            other.state[q][key].copy_(value)
    run(params, optimizer, range(3, 6))
    run(again, other, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))


@pytest.mark.usefixtures("in_float32")
def test_muon_keeps_gradients_and_follows_a_changed_rate() -> None:
    params, others = matrices(), matrices()
    muon, other = Muon(params, lr=0.5, momentum=0.5), Muon(others, lr=0.1)
    for group in muon.param_groups:
        group |= {"lr": 0.1, "momentum": 0.95}
    for step in range(2):
        set_gradients(params, step)
        set_gradients(others, step)
        gradients = [p.grad.clone() for p in params if p.grad is not None]
        muon.step()
        other.step()
        assert all(p.grad is not None and torch.equal(p.grad, g) for p, g in zip(params, gradients, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.usefixtures("in_float32")
def test_cautious_decay_and_equal_rows_are_the_formulas_over_twenty_steps() -> None:
    params = matrices()
    expected = [p.detach().double() for p in params]
    momenta, rows = [torch.zeros_like(p) for p in expected], [torch.zeros(p.size(0), 1).double() for p in expected]
    muon = Muon(params, lr=0.1, momentum=0.9, weight_decay=0.5, normuon=True, beta2=0.8)
    assert all(muon.state[p]["second_moment"].shape == (p.size(0), 1) for p in params)
    for step in range(20):
        set_gradients(params, step)
        for p, m, v, x in zip(params, momenta, rows, expected, strict=True):
            assert p.grad is not None
            m += 0.1 * (p.grad.double() - m)
            o = exact(0.1 * p.grad.double() + 0.9 * m)
            v += 0.2 * ((o * o).mean(1, keepdim=True) - v)
            equal = o / v.sqrt()
            equal *= o.norm() / equal.norm()
            lr = 0.1 * max(1, x.size(0) / x.size(1)) ** 0.5
            x -= torch.where(x * equal > 0, 0.1 * 0.5 * x, 0) + lr * equal
        muon.step()
    for p, x in zip(params, expected, strict=True):
        assert (p.detach() - x).norm() / x.norm() < 1e-3  # a weight next to zero may fall on the other side


def test_decay_shrinks_only_what_the_update_shrinks() -> None:
    params = [torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    plain, cautious = Muon(params[:1], lr=0.01), Muon(params[1:], lr=0.01, weight_decay=1.0)
    before = params[0].detach().clone()
    for muon, p in ((plain, params[0]), (cautious, params[1])):
        p.grad = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
        muon.step()
    towards_zero = (params[0] - before) * before < 0
    assert 0 < towards_zero.sum() < 36
    torch.testing.assert_close(params[1] - params[0], torch.where(towards_zero, -0.01 * before, 0.0))


def test_equal_rows_keep_the_size_of_the_update() -> None:
    p = torch.zeros(8, 24, requires_grad=True)
    muon = Muon([p], lr=1.0, normuon=True)
    p.grad = torch.randn(8, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 8)[:, None]
    plain = torch.zeros(8, 24, requires_grad=True)
    plain.grad = p.grad.clone()
    muon.step()
    Muon([plain], lr=1.0).step()
    rows = p.detach().norm(dim=1)
    torch.testing.assert_close(rows, rows.mean().expand(8), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(p.detach().norm(), plain.detach().norm(), atol=1e-2, rtol=1e-2)
    assert plain.detach().norm(dim=1).std() > 10 * rows.std()


def test_the_passes_change_nothing_where_the_flag_on_the_device_is_set() -> None:
    """What a GPU does, where the host does not look at the flag."""
    rng = torch.Generator().manual_seed(0)
    params, grads, momentum = (torch.randn(2, 4, 6, generator=rng) for _ in range(3))
    second_moment = torch.rand(2, 4, 1, generator=rng)
    before = [x.clone() for x in (params, momentum, second_moment)]
    grads[0, 1, 1] = torch.nan
    x = momentum_pass(list(grads), momentum, 0.9, True, torch.float32, torch.tensor(1.0))
    update_pass(list(params), x, 0.1, 0.01, second_moment, 0.9, torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, (params, momentum, second_moment), strict=True))
    x = momentum_pass(list(grads[1:]), momentum[1:], 0.9, True, torch.float32, torch.tensor(0.0))
    update_pass(list(params[1:]), x, 0.1, 0.01, second_moment[1:], 0.9, torch.tensor(0.0))
    assert not any(torch.equal(a[1], b[1]) for a, b in zip(before, (params, momentum, second_moment), strict=True))


def test_muon_refuses_what_is_no_matrix_and_half_a_stack() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) is no matrix"):
        Muon([torch.zeros(3)])
    params = matrices()
    muon = Muon(params)
    set_gradients(params, 0)
    params[0].grad = None  # its stack of (8, 8) is now incomplete
    with pytest.raises(ValueError, match="some parameters of one shape"):
        muon.step()
