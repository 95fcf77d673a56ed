"""Newton-Schulz in plain PyTorch: the polynomial, in both forms and every dtype. Its kernels: tests/interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.spectra import SPECTRA, check_spectrum, exact, matrix
from vibechat.kernels import newton_schulz
from vibechat.kernels.newton_schulz import gram_form, orthogonalize, polynomials, spans, standard_form
from vibechat.kernels.normalization import normalized

SHAPES = [(48, 48), (24, 96), (96, 24), (40, 56)]  # the last in standard form, though not square


def relative(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), steps=st.integers(0, 7))
def test_it_is_the_polynomial_of_the_singular_values(shape: tuple[int, int], seed: int, steps: int) -> None:
    g = matrix("random", *shape, seed)
    result = newton_schulz(g, steps)
    torch.testing.assert_close(result, exact(g, steps), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_in_float32_singular_values_land_where_the_polynomial_says(kind: str, shape: tuple[int, int]) -> None:
    g = matrix(kind, *shape)
    check_spectrum(newton_schulz(g.float()), g)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_in_bfloat16_they_stay_near_one(kind: str, shape: tuple[int, int]) -> None:
    """bfloat16 rounds small singular values of the input away; large ones must come near 1 all the same."""
    g = matrix(kind, *shape)
    result = newton_schulz(g.bfloat16())
    top = torch.linalg.svd(g.bfloat16().double(), full_matrices=False)
    landed = (top.U * (result.double() @ top.Vh.T)).sum(0)[1e-2 * top.S.norm() < top.S]
    assert landed.sub(1).abs().max() < 0.2
    assert torch.linalg.matrix_norm(result.double(), 2) < 1.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gram_form_is_no_worse_than_the_standard_form(dtype: torch.dtype) -> None:
    for kind in SPECTRA:
        g = torch.stack([matrix(kind, 64, 256, seed) for seed in range(4)])
        truth = torch.stack([exact(one) for one in g])
        x = normalized(g, dtype)
        gram, standard = (relative(form(x, 5), truth) for form in (gram_form, standard_form))
        most = 2.5 if kind in ("random", "harmonic") else 1.5
        assert gram < most * standard + 1e-4, (kind, gram, standard)


def as_the_kernel_rounds(
    a: Tensor, b: Tensor | None = None, *, d: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """alpha a b^T + beta d in float32, rounded once, of which one triangle is the other's mirror."""
    c = alpha * (a.float() @ (a if b is None else b).float().mT) + (0 if d is None else beta * d.float())
    return (c.tril() + c.tril(-1).mT).to(a.dtype)


@pytest.mark.parametrize("kind", SPECTRA)
def test_one_restart_is_enough_for_float16(kind: str) -> None:
    """In the band, and with at most half the error that bfloat16 has in standard form."""
    g = matrix(kind, 256, 1024)[None]
    x, truth = normalized(g, torch.float16), exact(g[0])[None]
    result = gram_form(x, 5, as_the_kernel_rounds)
    check_spectrum(result[0], x[0], floor=3e-4)
    assert relative(result, truth) < 0.5 * relative(standard_form(normalized(g, torch.bfloat16), 5), truth)


def test_a_tall_stack_is_orthogonalized_as_it_lies() -> None:
    """Reading it the other way round is what made the update of the weights slow."""
    x = normalized(torch.stack([matrix("random", 96, 24, seed) for seed in range(2)]), torch.float32)
    result = orthogonalize(x)
    assert result.is_contiguous()
    assert relative(result, torch.stack([exact(one) for one in x])) < 1e-4


def test_a_rotated_matrix_gives_a_rotated_result() -> None:
    g = matrix("random", 32, 128)
    q = torch.linalg.qr(matrix("random", 32, 32, 1)).Q
    assert relative(newton_schulz((q @ g).float()), q @ newton_schulz(g)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_transposition_commutes_exactly(shape: tuple[int, int], dtype: torch.dtype) -> None:
    g = matrix("random", *shape).to(dtype)
    if shape[0] == shape[1]:
        assert relative(newton_schulz(g.mT), newton_schulz(g).mT) < (0.05 if dtype == torch.bfloat16 else 1e-4)
    else:
        torch.testing.assert_close(newton_schulz(g.mT), newton_schulz(g).mT, atol=2e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 16), (16, 64)])
def test_a_stack_is_its_members_one_by_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    stack = torch.stack([matrix(kind, *shape) for kind in SPECTRA[:4]]).to(dtype)
    together = newton_schulz(stack.reshape(2, 2, *shape)).reshape(stack.shape)
    for one, member in zip(together, stack, strict=True):
        assert relative(one, newton_schulz(member)) < {8: 1e-9, 4: 1e-4, 2: 0.1}[dtype.itemsize]
    assert together.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 16), (16, 32)])
@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e-38, 1e37])
def test_the_scale_does_not_matter(shape: tuple[int, int], dtype: torch.dtype, scale: float) -> None:
    g = matrix("random", *shape)
    result = newton_schulz((g * scale).to(dtype))
    assert torch.isfinite(result).all()
    if abs(scale) > 1e-35:
        assert relative(result, newton_schulz(g)) < (0.15 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_stays_zero_and_harms_no_neighbour(dtype: torch.dtype) -> None:
    stack = torch.stack([torch.zeros(8, 24), torch.randn(8, 24)]).to(dtype)
    result = newton_schulz(stack)
    assert result[0].abs().max() == 0
    assert torch.equal(result[1], newton_schulz(stack[1:])[0])


@given(
    st.lists(
        st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False, width=32), min_size=12, max_size=12
    ),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_no_finite_input_gives_nan(numbers: list[float], dtype: torch.dtype) -> None:
    g = torch.tensor(numbers).reshape(2, 6).to(dtype)
    if torch.isfinite(g).all():
        assert torch.isfinite(newton_schulz(g)).all()


def test_restarts_come_after_three_steps_or_two() -> None:
    for dtype in (torch.float32, torch.float16):
        assert [spans(steps, dtype) for steps in (0, 1, 3, 5, 8)] == [[], [1], [3], [3, 2], [3, 2, 2, 1]]
    assert [spans(steps, torch.bfloat16) for steps in (2, 5, 7)] == [[2], [2, 1, 2], [2, 1, 2, 2]]
    assert len(polynomials(7)) == 7
    assert polynomials(7)[4] == polynomials(7)[6]
