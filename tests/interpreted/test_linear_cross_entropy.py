"""linear_cross_entropy: the kernels, in the interpreter, against float64; and the ops around them."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.interpreted.numerics import DTYPES, assert_no_worse, randn
from vibechat import kernels
from vibechat.kernels.language import INTERPRETING
from vibechat.kernels.linear_cross_entropy import reference
from vibechat.kernels.linear_cross_entropy_matmul import CONFIGS as FUSED_CONFIGS
from vibechat.kernels.linear_cross_entropy_matmul import launch_factor, launch_finish
from vibechat.kernels.linear_cross_entropy_ops import again_op, matmul_into, rows_op, train_op
from vibechat.kernels.linear_cross_entropy_triton import CONFIGS, SweepConfig, launch_again, launch_rows, padded
from vibechat.kernels.matmul import MatmulConfig

if INTERPRETING:
    from triton.runtime.interpreter import InterpreterBuilder

public = importlib.import_module("vibechat.kernels.linear_cross_entropy")
Loss = Callable[[Tensor, Tensor], Tensor]
softcaps = st.sampled_from((15.0, 30.0, 40.0, 60.0, None))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of few rows, the last one ragged."""
    monkeypatch.setattr(public, "rows_per_chunk", lambda *_: 4)


def some_targets(rows: int, vocab: int, ignored: int | None = 3, index: int = -1) -> Tensor:
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(2))
    if ignored is not None:
        targets[::ignored] = index
    return targets


def by_reference(targets: Tensor, reduction: str = "mean", weights: Tensor | None = None, **options: Any) -> Loss:
    """The definition with every option, on all logits at once."""
    row_weights = (targets != options.get("ignore_index", -1)).double()
    row_weights = row_weights if weights is None else row_weights * weights

    def loss(x: Tensor, w: Tensor) -> Tensor:
        losses = reference(x, w, targets, **options)
        weighted = losses if weights is None else losses * weights.to(losses.dtype)
        if reduction == "none":
            return weighted
        return weighted.sum() / (row_weights.sum().to(losses.dtype) if reduction == "mean" else 1)

    return loss


def value_and_gradients(loss: Loss, x: Tensor, weight: Tensor) -> list[Tensor]:
    """The loss, then its gradients under an upstream gradient that is not one."""
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    value = loss(*leaves)
    upstream = randn(*value.shape, seed=9).to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def check(
    targets: Tensor,
    x: Tensor,
    weight: Tensor,
    tokens: Tensor | None = None,
    few: bool = False,
    op: Callable[..., Tensor] = kernels.linear_cross_entropy,
    **options: Any,
) -> None:
    """Gradients keep the rule against eager in the same dtype (bfloat16 where that is float32), on few numbers give or
    take one rounding; the loss is within 1e-6 where the logits are float32, else no further off than eager's."""
    ours = value_and_gradients(lambda x, w: op(x, w, targets, token_weights=tokens, **options), x, weight)
    plain = by_reference(targets, weights=tokens, **options)
    truth = value_and_gradients(plain, x.double(), weight.to(x.dtype).double())
    eager = value_and_gradients(plain, x, weight)
    for mine, other, true in zip(ours, eager, truth, strict=True):
        assert mine.dtype == other.dtype
        assert torch.isfinite(mine).all()
        error, allowed = (mine.double() - true).norm(), (other.double() - true).norm()
        rounding = torch.finfo(x.dtype).eps * true.norm()
        if true.dim() < 2:
            assert error <= (1.5 if few else 1.01) * allowed + (1e-5 if few else 1e-6) * true.norm() + 1e-30
        elif x.dtype == torch.float32:  # bfloat16 may be 20 times further off
            assert error <= 1e-4 * true.norm()
        elif few:
            assert error <= 1.5 * allowed + 5 * rounding  # where rows cancel, one rounding is many
        else:
            assert_no_worse(mine, other, true)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=12)
@given(
    rows=st.integers(1, 9),
    vocab=st.sampled_from((1, 2, 7, 37, 64, 65, 100)),
    D=st.sampled_from((1, 8, 17)),
    softcap=softcaps,
    reduction=st.sampled_from(("mean", "sum", "none")),
    z_loss=st.sampled_from((0.0, 2.0**-7)),
    weighted=st.booleans(),
    master=st.booleans(),
    ignored=st.sampled_from((None, 2, 3)),
    way=st.sampled_from(("cublas", "fused")),
)
def test_every_option(
    dtype: torch.dtype,
    rows: int,
    vocab: int,
    D: int,
    softcap: float | None,
    reduction: str,
    z_loss: float,
    weighted: bool,
    master: bool,
    ignored: int | None,
    way: str,
) -> None:
    x, weight = 2 * randn(rows, D, dtype=dtype), randn(vocab, D, seed=1, dtype=torch.float32 if master else dtype)
    targets = some_targets(rows, vocab, ignored, index=-100)
    if (targets == -100).all():
        targets[0] = 0
    tokens = randn(rows, seed=3, dtype=torch.float32).abs() + 0.1 if weighted else None
    options = {"softcap": softcap, "z_loss": z_loss, "reduction": reduction, "ignore_index": -100}
    checked = functools.partial(kernels.linear_cross_entropy, way=way)
    check(targets, x, weight, tokens, few=True, op=checked, **options)


REGIMES = {"tiny": 0.02, "ordinary": 1.0, "saturated": 12.0, "confident": 1.0}


@pytest.mark.parametrize(
    ("way", "dtype"), [("cublas", torch.bfloat16), ("cublas", torch.float32), ("fused", torch.bfloat16)]
)
@pytest.mark.parametrize("softcap", [15.0, 30.0, 40.0, None])
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime(regime: str, softcap: float | None, way: str, dtype: torch.dtype) -> None:
    targets = some_targets(24, 320, 9)
    weight = randn(320, 32, seed=1) * REGIMES[regime] / 32**0.5
    x = randn(24, 32)
    if regime == "confident":
        x += 12 * weight[targets] / weight[targets].square().sum(-1, keepdim=True) * (targets >= 0).unsqueeze(-1)
    op = functools.partial(kernels.linear_cross_entropy, way=way)
    for reduction in ("mean", "none"):
        check(targets, x.to(dtype), weight.float(), op=op, softcap=softcap, reduction=reduction)
    if way == "fused" and softcap is not None:  # the logits are float32 whatever their operands
        exact = by_reference(targets, softcap=softcap)(x.to(dtype).double(), weight.to(dtype).double())
        trained = op(x.to(dtype).requires_grad_(), weight.float(), targets, softcap=softcap)
        assert abs(trained.item() - exact.item()) <= 1e-6 * exact.item()


def test_an_almost_certain_target_keeps_its_digits() -> None:
    """The loss and its gradient are of the size of what is left to the other words: nothing may cancel."""
    x, weight = torch.tensor([[20.0]]), torch.zeros(50, 1)
    weight[7] = 1.0
    targets = torch.tensor([7])
    ours = value_and_gradients(lambda x, w: kernels.linear_cross_entropy(x, w, targets), x, weight)
    truth = value_and_gradients(by_reference(targets), x.double(), weight.double())
    assert 0 < truth[0] < 1e-3
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("poisoned")  # else the padding of rows holds, and overflows with, whatever memory held
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("softcap", "way"), [(15.0, "cublas"), (60.0, "cublas"), (None, "cublas"), (15.0, "fused")])
def test_gradcheck_in_float64(reduction: str, softcap: float | None, way: str) -> None:
    targets, tokens = torch.tensor([3, -1, 0, 6, 2]), torch.tensor([1.0, 1.0, 0.5, 2.0, 0.0])
    assert torch.autograd.gradcheck(
        lambda x, w: kernels.linear_cross_entropy(
            x, w, targets, softcap=softcap, z_loss=2.0**-5, reduction=reduction, token_weights=tokens, way=way
        ),
        (randn(5, 4).requires_grad_(), randn(7, 4, seed=1).requires_grad_()),
        fast_mode=True,
    )


def test_opcheck() -> None:
    x, weight = randn(5, 8, dtype=torch.float32).requires_grad_(), randn(11, 8, dtype=torch.float32).requires_grad_()
    targets, rows = some_targets(5, 11), torch.rand(5)
    settings_of_loss = (15.0, -1, 0.0, 4, "cublas")
    torch.library.opcheck(train_op, (x, weight, targets, rows, *settings_of_loss))
    torch.library.opcheck(rows_op, (x, weight, targets, *settings_of_loss))
    losses, lse = (t.detach() for t in rows_op(x, weight, targets, *settings_of_loss))
    detached = x.detach(), weight.detach()
    torch.library.opcheck(again_op, (*detached, targets, losses, lse, rows, *settings_of_loss))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_for_training_and_for_evaluation(reduction: str) -> None:
    x, weight, targets = (
        randn(5, 8, dtype=torch.float32),
        randn(11, 8, dtype=torch.float32, seed=1),
        some_targets(5, 11),
    )

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return kernels.linear_cross_entropy(2 * x, w, targets, reduction=reduction)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for mine, other in zip(value_and_gradients(compiled, x, weight), value_and_gradients(loss, x, weight), strict=True):
        torch.testing.assert_close(mine, other)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight), loss(x, weight))


def test_which_op_runs_is_decided_by_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("train_op", "rows_op"):
        op = getattr(public, name)
        monkeypatch.setattr(public, name, lambda *a, op=op, name=name: seen.append(name) or op(*a))
    x, weight, targets = randn(5, 8), randn(11, 8, seed=1), some_targets(5, 11)
    kernels.linear_cross_entropy(x, weight.requires_grad_(), targets)
    kernels.linear_cross_entropy(x, weight, targets, reduction="none")
    kernels.linear_cross_entropy(x, weight.detach(), targets)
    with torch.no_grad():
        kernels.linear_cross_entropy(x, weight, targets)
    assert seen == ["train_op", "rows_op", "rows_op", "rows_op"]


def test_evaluation_writes_no_factor_and_both_ways_agree_to_the_last_bit() -> None:
    x, weight, targets = randn(5, 8).float(), randn(11, 8, seed=1).float(), some_targets(5, 11)
    logits = torch.zeros(5, padded(11))
    torch.mm(x, weight.T, out=logits[:, :11])
    before, (losses, lse) = logits.clone(), torch.empty(2, 5)
    launch_rows(logits, 11, targets, None, losses, lse, 15.0, -1, 0.0)
    assert torch.equal(logits, before)
    expected = (15 * torch.tanh(x @ weight.T / 15)).logsumexp(-1)
    torch.testing.assert_close(lse[targets >= 0], expected[targets >= 0])
    trained = kernels.linear_cross_entropy(x, weight.requires_grad_(), targets)
    assert torch.equal(kernels.linear_cross_entropy(x, weight.detach(), targets), trained.detach())


def test_two_backwards_and_checkpointing() -> None:
    x, weight = randn(9, 8).requires_grad_(), randn(11, 8, seed=1).requires_grad_()
    targets = some_targets(9, 11)
    for reduction in ("mean", "none"):
        loss = kernels.linear_cross_entropy(x, weight, targets, reduction=reduction).sum()
        first = torch.autograd.grad(3 * loss, (x, weight), retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(3 * loss, (x, weight), retain_graph=True)))
        halves = torch.autograd.grad(loss, (x, weight))
        assert all(torch.allclose(a, 3 * b) for a, b in zip(first, halves, strict=True))

        def block(x: Tensor, w: Tensor, reduction: str = reduction) -> Tensor:
            return kernels.linear_cross_entropy(x.sin(), w, targets, reduction=reduction).sum()

        again = torch.utils.checkpoint.checkpoint(block, x, weight, use_reentrant=False)
        ours = torch.autograd.grad(again, (x, weight))
        assert all(map(torch.equal, ours, torch.autograd.grad(block(x, weight), (x, weight))))


def test_any_strides() -> None:
    x, weight, targets = randn(8, 9).T[:, ::2], randn(4, 11, seed=1).T, some_targets(18, 11)[::2]
    for reduction in ("sum", "none"):
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        tokens = torch.ones(1).expand(9)
        ours = kernels.linear_cross_entropy(*leaves, targets, reduction=reduction, token_weights=tokens).sum()
        gradients = torch.autograd.grad(ours, leaves)  # of "none" under an upstream gradient of stride 0
        expected = torch.autograd.grad(by_reference(targets, "sum")(*leaves), leaves)
        for mine, true in zip(gradients, expected, strict=True):
            torch.testing.assert_close(mine, true)


def test_tied_weights_and_gradients_that_nobody_wants() -> None:
    table, tokens, targets = randn(11, 8).requires_grad_(), torch.arange(6), some_targets(6, 11)
    (tied,) = torch.autograd.grad(kernels.linear_cross_entropy(table[tokens], table, targets), table)
    (expected,) = torch.autograd.grad(by_reference(targets)(table[tokens], table), table)
    torch.testing.assert_close(tied, expected)
    x = randn(6, 8, seed=1).requires_grad_()
    kernels.linear_cross_entropy(x, table.detach(), targets).backward()  # a frozen head
    (expected,) = torch.autograd.grad(by_reference(targets)(x, table.detach()), x)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counted_is_zero_not_nan(reduction: str, dtype: torch.dtype) -> None:
    for rows in (5, 0):
        x, weight = randn(rows, 8, dtype=dtype).requires_grad_(), randn(11, 8, dtype=dtype).requires_grad_()
        targets = torch.full((rows,), -1)
        loss = kernels.linear_cross_entropy(x, weight, targets, reduction=reduction).sum()
        loss.backward()
        assert loss.item() == 0
        for leaf in (x, weight):
            assert leaf.grad is not None
            assert not leaf.grad.abs().sum()


@pytest.mark.parametrize("gradient", [False, True])
def test_a_target_that_is_no_word_gives_nan_and_reads_nothing(gradient: bool) -> None:
    x, weight = randn(3, 8).float(), randn(11, 8).float().requires_grad_(gradient)
    for wrong in (11, 2**40, -7):
        losses = kernels.linear_cross_entropy(x, weight, torch.tensor([1, wrong, 2]), reduction="none")
        assert losses.isnan().tolist() == [False, True, False]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's word for the NaN that is meant
def test_logits_that_are_not_finite_show() -> None:
    for bad in (torch.nan, torch.inf):
        x = randn(3, 8).float()
        x[1, 0] = bad
        loss = kernels.linear_cross_entropy(
            x.requires_grad_(), randn(11, 8).float(), torch.tensor([1, 2, 3]), softcap=None
        )
        assert not torch.isfinite(loss)
    x = torch.full((3, 8), torch.nan)
    assert kernels.linear_cross_entropy(x, randn(11, 8).float(), torch.tensor([1, 2, 3])).isnan()


def test_a_token_of_no_weight_is_an_ignored_one() -> None:
    x, weight, targets = randn(6, 8), randn(11, 8, seed=1), some_targets(6, 11, None)
    tokens = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    weighted = value_and_gradients(
        lambda x, w: kernels.linear_cross_entropy(x, w, targets, token_weights=tokens), x, weight
    )
    ignored = value_and_gradients(
        lambda x, w: kernels.linear_cross_entropy(x, w, targets.masked_fill(tokens == 0, -1)), x, weight
    )
    for mine, other in zip(weighted, ignored, strict=True):
        torch.testing.assert_close(mine, other)


def test_the_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = randn(9, 8), randn(11, 8, seed=1), some_targets(9, 11)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return kernels.linear_cross_entropy(x, w, targets)

    many = value_and_gradients(loss, x, weight)
    monkeypatch.setattr(public, "rows_per_chunk", lambda *_: 64)
    for mine, other in zip(value_and_gradients(loss, x, weight), many, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-12)


def test_float16_keeps_gradients_that_eager_loses() -> None:
    """One token of 65,536 has a weight of 1.5e-5, near float16's smallest: the factor and x must not carry it."""
    rows = torch.full((8,), 1 / 65_536)
    x, weight, targets = (
        randn(8, 16, dtype=torch.float16),
        randn(40, 16, dtype=torch.float16),
        some_targets(8, 40, None),
    )
    _, dx, dw = train_op(x, weight.float(), targets, rows, 15.0, -1, 0.0, 4, "")
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    true_dx, true_dw = torch.autograd.grad((reference(*leaves, targets) / 65_536).sum(), leaves)
    assert (dw - true_dw).norm() < 1e-3 * true_dw.norm()
    assert (dx - true_dx).norm() < 1e-2 * true_dx.norm()  # a subnormal number's own rounding


def test_the_matmuls_are_counted() -> None:
    x, weight = randn(5, 8).requires_grad_(), randn(11, 8, seed=1).requires_grad_()
    one = 2 * 5 * 8 * 11

    def counted(call: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    targets = some_targets(5, 11)
    assert counted(lambda: kernels.linear_cross_entropy(x, weight, targets).backward()) == 3 * one
    assert counted(lambda: kernels.linear_cross_entropy(x.detach(), weight.detach(), targets)) == one
    assert (
        counted(lambda: kernels.linear_cross_entropy(x, weight, targets, reduction="none").sum().backward()) == 4 * one
    )
    kernels.set_backend("torch")
    plain = counted(lambda: by_reference(targets)(x, weight).backward())
    assert plain == 3 * one  # an MFU is the same with and without the kernel


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("config", [*CONFIGS, SweepConfig(32, 4)], ids=str)
def test_every_config_gives_the_same(config: SweepConfig) -> None:
    """Rows of three blocks of 32 columns, the last one ragged; the padding is NaN."""
    x, weight, targets = randn(5, 8).float(), randn(70, 8, seed=1).float(), some_targets(5, 70)
    leaf = (x @ weight.T).requires_grad_()
    z = 15 * torch.tanh(leaf / 15)
    losses = torch.nn.functional.cross_entropy(z, targets, ignore_index=-1, reduction="none")
    (expected,) = torch.autograd.grad(losses.sum(), leaf)
    capped = z.detach().requires_grad_()
    again = torch.nn.functional.cross_entropy(capped, targets, ignore_index=-1, reduction="sum")
    (uncapped,) = torch.autograd.grad(again, capped)
    for softcap_of_kernel in (15.0, None):
        source = leaf.detach() if softcap_of_kernel else z.detach()
        true = expected if softcap_of_kernel else uncapped
        logits, mine, scales, lse = torch.empty(5, padded(70)), *torch.empty(3, 5)
        assert logits.isnan().all()
        logits[:, :70] = source
        launch_rows(logits, 70, targets, torch.ones(5), mine, scales, softcap_of_kernel, -1, 0.0, config)
        torch.testing.assert_close(mine, losses.detach())
        torch.testing.assert_close(logits[:, :70] * scales[:, None], true, atol=1e-6, rtol=1e-5)
        logits[:, :70] = source
        launch_rows(logits, 70, targets, None, mine, lse, softcap_of_kernel, -1, 0.0, config)
        launch_again(logits, 70, targets, torch.ones(5), mine, lse, scales, softcap_of_kernel, -1, 0.0, config)
        torch.testing.assert_close(logits[:, :70] * scales[:, None], true, atol=1e-6, rtol=1e-5)


def test_a_logit_is_read_once_and_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {"load": 0, "store": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        moved["load"] += int(np.broadcast_to(mask.data, pointers.data.shape).sum()) * (pointers.data.size > 1)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        moved["store"] += int(np.broadcast_to(mask.data, pointers.data.shape).sum()) * (pointers.data.size > 1)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    logits, targets, rows = randn(6, 128).bfloat16(), some_targets(6, 128, None), torch.ones(6)
    losses, extra = torch.empty(2, 6)

    def elements(*arguments: Any) -> tuple[int, int]:
        moved.update(load=0, store=0)
        launch_rows(logits, 128, targets, *arguments, -1, 0.0, SweepConfig(64, 4))
        return moved["load"], moved["store"]

    n = logits.numel()
    assert elements(rows, losses, extra, 15.0) == (n, n)
    assert elements(rows, losses, extra, None) == (2 * n, n)
    assert elements(None, losses, extra, 15.0) == (n, 0)


def test_rows_past_2_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the row nor the width passes 2^31, their product does: 32-bit offsets would wrap."""
    program_id = InterpreterBuilder.create_get_program_id
    V, near = 4096, randn(1, 4096).bfloat16()
    row = 2**31 // V + 1
    logits = torch.empty(row + 1, V, dtype=torch.bfloat16)  # memory that nobody touches is not really there
    targets, weights, losses, extra = torch.full((row + 1,), 5), *torch.ones(3, row + 1)

    def later(self: Any, axis: int) -> Any:
        handle = program_id(self, axis)
        handle.data = handle.data + np.int32(row)
        return handle

    expected, one = near.clone(), torch.empty(2, 1)
    launch_rows(expected, V, targets[:1], weights[:1], *one, 15.0, -1, 0.0)
    logits[row] = near[0]
    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", later)
    from vibechat.kernels.linear_cross_entropy_triton import cross_entropy_again, cross_entropy_rows, tl

    common = {"SOFTCAP": 15.0, "UNIT": 1.0, "BLOCK": V, "WIDE": tl.float32}
    cross_entropy_rows[(1,)](
        logits, targets, weights, losses, extra, extra, V, V, -1, 0.0, BOUNDED=True, GRADIENT=True, **common
    )  # fmt: skip
    assert torch.equal(logits[row], expected[0])
    assert losses[row] == one[0, 0]
    logits[row] = near[0]
    extra[row] = near.float().logsumexp(-1)
    cross_entropy_again[(1,)](logits, targets, weights, losses, extra, extra, V, V, -1, 0.0, **common)
    assert not torch.equal(logits[row], near[0])


def test_products_leave_in_the_wider_dtype() -> None:
    a, b = randn(3, 4, dtype=torch.bfloat16), randn(4, 5, dtype=torch.bfloat16)
    out = torch.full((3, 5), torch.nan)
    matmul_into(out, a, b, add=False)
    torch.testing.assert_close(out, a.float() @ b.float())
    matmul_into(out, a, b, add=True)
    torch.testing.assert_close(out, 2 * (a.float() @ b.float()))


# ---------------------------------------------------------------------------------------------------------------------
# the factor made by our own matmul


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("config", FUSED_CONFIGS, ids=str)
def test_every_config_of_the_matmul_gives_the_same(config: MatmulConfig) -> None:
    """Tiles that hang over the edges, several pieces of a row, a target in each of them, one ignored, one no word."""
    x, weight = randn(9, 8).float(), randn(300, 8, seed=1).float()
    targets = torch.tensor([0, 63, 64, 128, 255, 256, 299, -1, 300])
    room = torch.empty(9, padded(300))
    factor, losses, scales = room[:, :300], *torch.empty(2, 9)
    partial, raw = launch_factor(x, weight, factor, targets, 15.0, config)
    launch_finish(factor, targets, torch.ones(9), partial, raw, losses, scales, 15.0, -1, 0.0)
    leaf = (x @ weight.T).requires_grad_()
    expected = reference_of_logits(leaf[:7], targets[:7])
    torch.testing.assert_close(losses[:7], expected)
    (true,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close((factor * scales[:, None])[:7], true[:7], atol=1e-6, rtol=1e-4)
    assert losses[7] == scales[7] == 0
    assert losses[8].isnan()
    assert room[:, 300:].isnan().all()


def reference_of_logits(u: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(15 * torch.tanh(u / 15), targets, reduction="none")


def test_what_our_matmul_cannot_take_goes_through_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = importlib.import_module("vibechat.kernels.linear_cross_entropy_ops")
    ways: list[str] = []
    for name in ("launch_fused", "launch_rows"):
        launch = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, launch=launch, name=name: ways.append(name) or launch(*a))
    targets = some_targets(3, 11)

    def way_of(x: Tensor, softcap: float | None = 15.0, way: str = "fused") -> str:
        ways.clear()
        weight = torch.ones(11, x.size(1), dtype=x.dtype).requires_grad_()
        kernels.linear_cross_entropy(x, weight, targets, softcap=softcap, way=way)
        return ways[0]

    assert way_of(torch.ones(3, 8)) == "launch_fused"
    assert way_of(torch.ones(3, 8), way="") == way_of(torch.ones(3, 8), way="cublas") == "launch_rows"
    assert way_of(torch.ones(3, 8), softcap=None) == way_of(torch.ones(3, 8), softcap=41.0) == "launch_rows"
    assert way_of(torch.ones(3, 8).half()) == "launch_rows"
    assert way_of(torch.ones(3, 7)) == "launch_rows"  # its rows begin anywhere
    with pytest.raises(ValueError, match="way 'fast'"):
        way_of(torch.ones(3, 8), way="fast")
