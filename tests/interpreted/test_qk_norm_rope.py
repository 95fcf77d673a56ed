"""qk_norm_rope: the kernels, in the interpreter, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.interpreted.numerics import DTYPES, LAYOUTS, check, randn, strided
from vibechat import kernels
from vibechat.kernels import tuning
from vibechat.kernels.qk_norm_rope import CONFIGS, launch_backward, launch_forward, reference

layouts = st.sampled_from(LAYOUTS)


def tables(T: int, D: int, B: int | None = None) -> tuple[Tensor, Tensor]:
    cos, sin = kernels.rotary_tables(T, D, 10_000.0, "cpu")
    return (cos, sin) if B is None else (cos.expand(B, -1, -1), sin.expand(B, -1, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=12)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 7),
    heads=st.sampled_from(((1, 1), (3, 1), (4, 2), (5, 5))),
    D=st.sampled_from((32, 40, 64, 100, 128)),
    per_row=st.booleans(),
    x_as=layouts,
    dy_as=layouts,
)
def test_qk_norm_rope(
    dtype: torch.dtype, B: int, T: int, heads: tuple[int, int], D: int, per_row: bool, x_as: str, dy_as: str
) -> None:
    cos, sin = tables(T, D, B if per_row else None)
    q, k, dq, dk = (randn(B, T, H, D, dtype=dtype, seed=i) for i, H in enumerate(heads * 2))
    inputs = [strided(3 * q, x_as), strided(k, x_as)]
    upstream: list[Tensor | None] = [strided(dq, dy_as), strided(dk, dy_as)]
    check(
        lambda q, k: kernels.qk_norm_rope(q, k, cos, sin),
        lambda q, k: reference(q, k, cos, sin),
        inputs,
        upstream,
    )


def test_views_of_a_packed_projection_and_gradients_as_attention_gives_them() -> None:
    qkv = randn(2, 5, 4 + 2 + 2, 32, dtype=torch.bfloat16)
    cos, sin = tables(9, 32)
    cos, sin = cos[3:8], sin[3:8]  # positions after those that a cache holds
    q, k, _ = qkv.split((4, 2, 2), dim=2)
    dq, dk = (randn(2, H, 5, 32, dtype=torch.bfloat16, seed=1).transpose(1, 2) for H in (4, 2))
    assert not any(x.is_contiguous() for x in (q, k, dq, dk))
    check(lambda q, k: kernels.qk_norm_rope(q, k, cos, sin), lambda q, k: reference(q, k, cos, sin), [q, k], [dq, dk])


@settings(max_examples=10)
@given(D=st.sampled_from((2, 4, 6, 16)), T=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_in_float64_it_is_the_reference(D: int, T: int, seed: int) -> None:
    q, k = randn(1, T, 3, D, seed=seed), randn(1, T, 1, D, seed=seed + 1)
    for mine, true in zip(kernels.qk_norm_rope(q, k, *tables(T, D)), reference(q, k, *tables(T, D)), strict=True):
        torch.testing.assert_close(mine, true, atol=1e-12, rtol=1e-12)


def test_a_table_that_also_scales_has_the_right_gradient() -> None:
    cos, sin = (1.2 * table for table in tables(3, 8))
    q, k = randn(1, 3, 2, 8).requires_grad_(), randn(1, 3, 2, 8, seed=1).requires_grad_()
    weights = randn(1, 3, 2, 8, seed=2)
    ours = torch.autograd.grad([(y * weights).sum() for y in kernels.qk_norm_rope(q, k, cos, sin)], [q, k])
    theirs = torch.autograd.grad([(y * weights).sum() for y in reference(q, k, cos, sin)], [q, k])
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, true, atol=1e-9, rtol=1e-9)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_writes_everything(config: tuning.RowConfig) -> None:
    q, k = randn(2, 5, 3, 24, dtype=torch.bfloat16), randn(2, 5, 1, 24, dtype=torch.bfloat16, seed=1)
    cos, sin = tables(5, 24)
    q_out, k_out, q_rstd, k_rstd = launch_forward(q, k, cos, sin, 1e-6, config)
    for mine, true in zip((q_out, k_out), reference(q, k, cos, sin, 1e-6), strict=True):
        torch.testing.assert_close(mine, true, atol=0.02, rtol=0.01)
    gradients = launch_backward(q, k, q_out, k_out, q_rstd, k_rstd, cos, sin, config)
    leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    expected = torch.autograd.grad(reference(*leaves, cos, sin, 1e-6), leaves, [q, k])
    for mine, true in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, true, atol=0.05, rtol=0.02)


def test_one_output_unused_and_nothing_at_all() -> None:
    q, k = randn(1, 3, 2, 8).requires_grad_(), randn(1, 3, 2, 8).requires_grad_()
    kernels.qk_norm_rope(q, k, *tables(3, 8))[0].sum().backward()
    assert q.grad is not None
    assert q.grad.abs().max() > 0
    assert k.grad is None or k.grad.abs().max() == 0
    empty = torch.empty(0, 3, 2, 8)
    assert kernels.qk_norm_rope(empty, empty, *tables(3, 8))[1].shape == empty.shape


def test_what_the_kernel_cannot_take_falls_back_with_one_line() -> None:
    q, (cos, sin) = randn(1, 3, 2, 8, dtype=torch.float32), tables(3, 8)
    cases = [
        ((q, q.bfloat16(), cos, sin), "one dtype"),
        ((q, q, cos.clone().requires_grad_(), sin), "no gradient for the tables"),
        ((q, q, cos[:1], sin[:1]), "one layout"),
        ((randn(1, 3, 2, 2048, dtype=torch.float32),) * 2 + tables(3, 2048), "up to 1024"),
    ]
    for arguments, why in cases:
        with pytest.warns(UserWarning, match=why) as lines:
            results = kernels.qk_norm_rope(*arguments), kernels.qk_norm_rope(*arguments)
        assert len(lines) == 1
        assert torch.equal(results[1][0], reference(*arguments)[0])
