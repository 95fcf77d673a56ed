"""rms_norm and add_rms_norm: the kernels, in the interpreter, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.interpreted.numerics import DTYPES, LAYOUTS, check, randn, strided, with_gradients
from vibechat import kernels
from vibechat.kernels import tuning
from vibechat.kernels.rms_norm import CONFIGS, WIDEST, add_reference, launch_backward, launch_forward, reference

channels = st.sampled_from((7, 32, 63, 64, 65, 100, 257))
layouts = st.sampled_from(LAYOUTS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=12)
@given(B=st.integers(1, 3), T=st.integers(1, 19), C=channels, x_as=layouts, dy_as=layouts)
def test_rms_norm(dtype: torch.dtype, B: int, T: int, C: int, x_as: str, dy_as: str) -> None:
    x, dy = strided(3 * randn(B, T, C, dtype=dtype), x_as), strided(randn(B, T, C, dtype=dtype, seed=1), dy_as)
    check(kernels.rms_norm, reference, [x], [dy])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=12)
@given(B=st.integers(1, 3), T=st.integers(1, 19), C=channels, r_as=layouts, x_as=layouts, d_as=layouts)
def test_add_rms_norm(dtype: torch.dtype, B: int, T: int, C: int, r_as: str, x_as: str, d_as: str) -> None:
    r, x = strided(3 * randn(B, T, C, dtype=dtype), r_as), strided(randn(B, T, C, dtype=dtype, seed=1), x_as)
    dsum, dy = (strided(randn(B, T, C, dtype=dtype, seed=seed), d_as) for seed in (2, 3))
    check(kernels.add_rms_norm, add_reference, [r, x], [dsum, dy])
    check(kernels.add_rms_norm, add_reference, [r, x], [None, dy])  # the last block: nobody reads the sum
    check(kernels.add_rms_norm, add_reference, [r, x], [dsum, None])


@settings(max_examples=10)
@given(C=st.sampled_from((1, 2, 3, 8)), T=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_in_float64_it_is_the_reference(C: int, T: int, seed: int) -> None:
    x, r, dy = (randn(1, T, C, seed=seed + i) for i in range(3))  # of one channel only the sign is left
    for mine, true in zip(
        with_gradients(kernels.add_rms_norm, [r, x], [dy, dy]),
        with_gradients(add_reference, [r, x], [dy, dy]),
        strict=True,
    ):
        torch.testing.assert_close(mine, true, atol=1e-10, rtol=1e-10)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_writes_everything(config: tuning.RowConfig) -> None:
    x, r, dy, dsum = (randn(2, 5, 48, dtype=torch.bfloat16, seed=seed) for seed in range(4))
    total, y, rstd = launch_forward(x, r, 1e-6, config)
    assert total is not None
    assert torch.equal(total, r + x)
    torch.testing.assert_close(y, reference(r + x, 1e-6), atol=0.02, rtol=0.01)
    assert rstd.dtype == torch.float32
    assert torch.isfinite(rstd).all()
    dx = launch_backward(dy, dsum, total, rstd, config)
    leaf = total.clone().requires_grad_()
    (expected,) = torch.autograd.grad([leaf * 1, reference(leaf, 1e-6)], leaf, [dsum, dy])
    torch.testing.assert_close(dx, expected, atol=0.05, rtol=0.02)


def test_shapes_of_any_rank_and_of_nothing() -> None:
    for shape in ((8,), (3, 8), (2, 3, 2, 8), (0, 8), (2, 0, 8)):
        x = randn(*shape, dtype=torch.float32).requires_grad_()
        y = kernels.rms_norm(x)
        assert y.shape == x.shape
        torch.testing.assert_close(y, reference(x))
        y.sum().backward()  # the gradient of a sum is one number with stride 0 everywhere
        assert x.grad is not None
        assert x.grad.shape == x.shape


def test_zero_rows_have_no_direction() -> None:
    x = torch.zeros(1, 3, 16, requires_grad=True)
    y = kernels.rms_norm(x)
    y.sum().backward()
    assert y.abs().max() == 0
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_any_scale_is_as_good_as_another(scale: float) -> None:
    x, dy = (scale * randn(1, 6, 96)).bfloat16(), randn(1, 6, 96, dtype=torch.bfloat16, seed=1)
    check(kernels.rms_norm, reference, [x], [dy])


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ((torch.ones(2, WIDEST + 1),), "channels"),
        ((torch.ones(2, 3, 4, 8).transpose(0, 1),), "without a copy"),
        ((torch.ones(2, 8), torch.ones(1, 8)), "one shape and dtype"),
        ((torch.ones(2, 8), torch.ones(2, 8).bfloat16()), "one shape and dtype"),
    ],
)
def test_what_the_kernel_cannot_take_falls_back_with_one_line(tensors: tuple[Tensor, ...], why: str) -> None:
    op = kernels.rms_norm if len(tensors) == 1 else kernels.add_rms_norm
    expected = reference(tensors[0]) if len(tensors) == 1 else add_reference(*tensors)[1]
    with pytest.warns(UserWarning, match=why) as lines:
        results = [op(*tensors) for _ in range(2)]
    result = results[1]
    assert len(lines) == 1
    assert torch.equal(result if isinstance(result, Tensor) else result[1], expected)
