"""`attend` against softmax(q k^T) v written out, in every way that it may run."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from vibechat import attention
from vibechat.attention import attend


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T, S, D = q.size(1), k.size(1), q.size(-1)
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / D**0.5
    hidden = torch.arange(S)[None, :] > torch.arange(S - T, S)[:, None]
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def qkv(T: int, S: int, H: int, K: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T + S)
    shapes = ((2, T, H, 8), (2, S, K, 8), (2, S, K, 8))
    q, k, v = (torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize(("T", "S"), [(1, 1), (9, 9), (1, 9), (4, 9)], ids=["one", "training", "decoding", "chunk"])
@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
def test_attend_is_softmax_attention(T: int, S: int, H: int, K: int) -> None:
    q, k, v = qkv(T, S, H, K)
    torch.testing.assert_close(attend(q, k, v), written_out(q, k, v))


@pytest.mark.parametrize("T", [1, 3, 8, 21])
def test_blocked_attention_and_its_gradient(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_blocked_is_faster", lambda q: True)
    monkeypatch.setattr(attention, "QUERIES_PER_BLOCK", 8)
    q, k, v = (x.requires_grad_() for x in qkv(T, T, 2, 2))
    torch.testing.assert_close(attend(q, k, v), written_out(q, k, v))
    assert torch.autograd.gradcheck(attend, (q, k, v))


def test_blocked_attention_in_bfloat16_rounds_like_plain_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_blocked_is_faster", lambda q: True)
    inputs = qkv(96, 96, 2, 2, torch.bfloat16)
    upstream = qkv(96, 96, 2, 2, torch.bfloat16)[1]

    def run(function: Callable[..., Tensor], tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))

    truth = run(written_out, (x.double() for x in inputs))
    for mine, theirs, true in zip(run(attend, inputs), run(written_out, inputs), truth, strict=True):
        assert (mine.double() - true).norm() <= 1.3 * (theirs.double() - true).norm()


def test_blocked_attention_is_for_compiled_training_on_a_cpu() -> None:
    q = torch.zeros(1, 2, 4, 8, requires_grad=True)
    assert not attention._blocked_is_faster(q)  # eager
    taken = []

    def probe(q: Tensor) -> Tensor:
        taken.append(attention._blocked_is_faster(q))
        return q * 2

    torch.compile(probe, backend="eager")(q)
    with torch.no_grad():
        torch.compile(probe, backend="eager")(q)
    assert taken == [True, False]


def test_a_run_can_say_what_attends() -> None:
    assert "blocked matmuls up to 1024 tokens" in attention.attention_backend(torch.device("cpu"))
    assert attention.attention_backend(torch.device("cuda")).startswith("scaled_dot_product_attention (")
    assert attention.attention_backend(torch.device("mps")) == "scaled_dot_product_attention"
