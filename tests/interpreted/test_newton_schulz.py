"""The kernels of Newton-Schulz and Muon in the interpreter: the symmetric product, the properties of the result in
float16, the passes, and Muon over twenty steps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.spectra import SPECTRA, check_spectrum, exact, matrix
from vibechat import kernels
from vibechat.kernels import backend, normalization, symmetric_matmul
from vibechat.kernels.muon_passes import momentum_pass, update_pass
from vibechat.kernels.newton_schulz import orthogonalize, reference
from vibechat.kernels.normalization import TileConfig, normalized
from vibechat.kernels.normalization import launch as launch_normalization
from vibechat.kernels.symmetric_matmul import SymmetricConfig
from vibechat.kernels.tuning import FlatConfig
from vibechat.muon import Muon

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
SMALL = SymmetricConfig(16, 16, 2, 4, 2)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


# ---------------------------------------------------------------------------------------------------------------------
# the symmetric product


@settings(max_examples=6, derandomize=True)
@given(
    count=st.integers(1, 3),
    M=st.sampled_from([8, 16, 40, 56]),
    K=st.sampled_from([8, 24, 64]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    added=st.booleans(),
)
def test_the_symmetric_product_is_the_product(count: int, M: int, K: int, dtype: torch.dtype, added: bool) -> None:
    a = randn(count, M, K).to(dtype)
    d = randn(count, M, M, seed=1).to(dtype)
    d = d + d.mT
    c = symmetric_matmul.launch(a, d=d if added else None, alpha=0.5, beta=-2.0, gamma=3.0, config=SMALL)
    assert torch.equal(c, c.mT)
    truth = 0.5 * (a.double() @ a.mT.double()) + 3 * torch.eye(M).double() - (2 * d.double() if added else 0)
    eps = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 1)  # the sum's own rounding
    assert (c.double() - truth).abs().max() <= eps * truth.abs().max()
    assert torch.equal(
        c, symmetric_matmul.launch(a, d=d if added else None, alpha=0.5, beta=-2.0, gamma=3.0, config=SMALL)
    )


def test_two_polynomials_of_one_matrix_commute_and_so_have_a_symmetric_product() -> None:
    a = randn(2, 40, 40) / 6
    a = a @ a.mT
    b = (torch.eye(40) - a + a @ a).float()
    c = symmetric_matmul.launch(a.float(), b, config=SMALL)
    assert relative(c, a @ b.double()) < 1e-6


def test_every_tile_of_the_triangle_is_walked_once() -> None:
    """Many tiles in one matrix, and more tiles than programs."""
    a = randn(1, 9 * 16, 16).half()
    c = symmetric_matmul.launch(a, config=SMALL)
    assert relative(c, a.double() @ a.mT.double()) < 1e-3
    many = randn(280, 8, 8).half()
    assert relative(symmetric_matmul.launch(many, config=SMALL), many.double() @ many.mT.double()) < 1e-3


def test_what_tma_cannot_move_falls_back_with_a_line() -> None:
    assert (
        symmetric_matmul.refusal(torch.empty(1, 12, 64, dtype=torch.float16))
        == "rows and columns are not multiples of 8"
    )
    assert symmetric_matmul.refusal(torch.empty(0, 16, 64, dtype=torch.float16)) == "it is empty"
    assert symmetric_matmul.refusal(torch.empty(1, 65_536, 65_536, device="meta", dtype=torch.float16)) is not None
    g = randn(2, 6, 10).float()
    with pytest.warns(UserWarning, match="newton_schulz: rows and columns"):
        result = kernels.newton_schulz(g)
    assert relative(result, torch.stack([exact(one) for one in g])) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# normalization


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_normalization_at_any_scale(dtype: torch.dtype, scale: float) -> None:
    g = randn(2, 72, 96) * (min(scale, 1e4) if dtype == torch.float16 else scale)
    g = (g * 1e-4 if dtype == torch.float16 and scale < 1 else g).to(dtype) if dtype == torch.float16 else g.to(dtype)
    g[1] = 0
    x = torch.empty(g.shape, dtype=torch.float32)
    launch_normalization(g, x)
    if g.abs().max() > 0:
        torch.testing.assert_close(x[0].norm().item(), 1 / 1.01, atol=0, rtol=1e-5)
        torch.testing.assert_close(x, normalized(g, torch.float32), atol=1e-7, rtol=1e-5)
    assert x[1].abs().max() == 0


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_matrix_of_more_blocks_than_parts_is_measured_whole(scale: float) -> None:
    """Its largest element lies in the last block of a part, and all of the others are far smaller, or zero."""
    g = randn(2, 72, 100).float() * scale * 1e-3
    g[0, 70, 3], g[1] = scale, 0
    block = FlatConfig(32, 4)
    assert g[0].numel() > 1.5 * normalization.PARTS * block.block
    measured = normalization.launch_measure(g, config=block)
    assert measured.peaks.shape == (2, normalization.PARTS)
    for x in (torch.empty(g.shape), torch.empty(2, 100, 72).mT):
        normalization.launch_normalize(g, x, measured, config=TileConfig(16, 4))
        torch.testing.assert_close(x, normalized(g), atol=1e-9, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Newton-Schulz


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(96, 96), (64, 256), (256, 64)])
def test_in_float16_singular_values_land_where_the_polynomial_says(kind: str, shape: tuple[int, int]) -> None:
    """Those of the rounded input, that is, down to where a step's own rounding drowns them."""
    x = normalized(matrix(kind, *shape), torch.float16)[None]
    check_spectrum(orthogonalize(x)[0], x[0], floor=3e-4)
    assert not backend._said


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(64, 64), (64, 256)])
def test_in_bfloat16_the_error_is_at_most_half_of_eagers(kind: str, shape: tuple[int, int]) -> None:
    """But for 1, 1/2, 1/3 and so on in Gram form: with so many large singular values among so few, what three steps
    make of them, Q, is rounded most. At 256 rows it too is less than half."""
    g = torch.stack([matrix(kind, *shape, seed) for seed in range(2)]).bfloat16()
    truth = torch.stack([exact(one) for one in g])
    x = torch.empty_like(g, dtype=torch.float16)
    launch_normalization(g, x)
    ours = relative(orthogonalize(x), truth)
    most = 2.5 if (kind, *shape) == ("harmonic", 64, 256) else 0.5
    assert ours <= most * relative(reference(g), truth)


@DTYPES
def test_rotation_transposition_stacks_and_zero(dtype: torch.dtype) -> None:
    g = matrix("random", 40, 160)
    q = torch.linalg.qr(matrix("random", 40, 40, 1)).Q
    near = {torch.float16: 1.5e-2, torch.bfloat16: 5e-2, torch.float32: 1e-4}[dtype]
    result = kernels.newton_schulz(g.to(dtype))
    assert relative(kernels.newton_schulz((q @ g).to(dtype)), q @ result.double()) < near
    assert torch.equal(kernels.newton_schulz(g.to(dtype).mT), result.mT)
    stack = torch.stack([matrix(kind, 40, 160) for kind in SPECTRA[:4]] + [torch.zeros(40, 160).double()]).to(dtype)
    together = kernels.newton_schulz(stack)
    assert all(torch.equal(one, kernels.newton_schulz(member)) for one, member in zip(together, stack, strict=True))
    assert together[-1].abs().max() == 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_scale_does_not_matter(dtype: torch.dtype, scale: float) -> None:
    g = matrix("random", 16, 24)
    assert relative(kernels.newton_schulz((g * scale).to(dtype)), exact(g)) < 0.02


def test_registration_graph_and_fake() -> None:
    x = normalized(randn(2, 16, 32), torch.float16)
    torch.library.opcheck(torch.ops.vibechat.newton_schulz.default, (x, 5, True))
    torch.library.opcheck(torch.ops.vibechat.newton_schulz.default, (x.bfloat16(), 2, False))
    compiled = torch.compile(lambda g: kernels.newton_schulz(2 * g), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), kernels.newton_schulz(2 * x))


# ---------------------------------------------------------------------------------------------------------------------
# Muon


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(24, 72), (72, 24)])
def test_the_momentum_pass_is_its_reference(
    shape: tuple[int, int], nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = [randn(*shape, seed=seed).float() for seed in range(2)]
    for flag in (None, torch.tensor(0.0), torch.tensor(1.0)):
        ours, other = (randn(2, *shape, seed=5).float() for _ in range(2))
        x = momentum_pass(gradients, ours, 0.9, nesterov, torch.float16, flag)
        with monkeypatch.context() as plain:
            plain.setattr(backend, "takes_kernel", lambda *_: False)
            expected = momentum_pass(gradients, other, 0.9, nesterov, torch.float16, flag)
        torch.testing.assert_close(ours, other, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(x, expected, atol=1e-6, rtol=2e-3)
        assert (x if shape[0] < shape[1] else x.mT).is_contiguous()


@pytest.mark.parametrize("normuon", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.25])
def test_the_update_pass_is_its_reference(decay: float, normuon: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for tall in (False, True):
        ortho = randn(2, 24, 72).half()
        ortho = ortho.mT if tall else ortho
        for flag in (None, torch.tensor(0.0), torch.tensor(1.0)):
            ours, other = ([randn(*ortho.shape[1:], seed=seed).float() for seed in range(2)] for _ in range(2))
            before = [p.clone() for p in ours]
            mine, its = (torch.ones(2, ortho.size(1), 1) if normuon else None for _ in range(2))
            update_pass(ours, ortho, 0.1, decay, mine, 0.9, flag)
            with monkeypatch.context() as plain:
                plain.setattr(backend, "takes_kernel", lambda *_: False)
                update_pass(other, ortho, 0.1, decay, its, 0.9, flag)
            for p, q, b in zip(ours, other, before, strict=True):
                torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
                assert torch.equal(p, b) == bool(flag)
            assert mine is None or its is None or torch.equal(mine, its)


def test_muon_with_its_kernels_is_the_formula_over_twenty_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIBECHAT_DTYPE", "float32")
    shapes = [(8, 8), (16, 8), (8, 16), (8, 8)]
    params = [randn(*shape, seed=i).float().requires_grad_() for i, shape in enumerate(shapes)]
    expected = [p.detach().double() for p in params]
    momenta = [torch.zeros_like(p) for p in expected]
    muon = Muon(params, lr=0.1, momentum=0.9)
    for step in range(20):
        for i, (p, m, x) in enumerate(zip(params, momenta, expected, strict=True)):
            p.grad = randn(*p.shape, seed=100 * step + i).float()
            m += 0.1 * (p.grad.double() - m)
            x -= 0.1 * max(1, x.size(0) / x.size(1)) ** 0.5 * exact(0.1 * p.grad.double() + 0.9 * m)
        muon.step()
    for p, x in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), x, atol=2e-4, rtol=2e-4)
    assert not backend._said


def test_parameters_that_are_not_contiguous_fall_back_with_a_line() -> None:
    p = randn(32, 16).float().mT.requires_grad_()
    p.grad = randn(32, 16, seed=1).float().mT
    before = p.detach().clone()
    with pytest.warns(UserWarning, match="contiguous float32"):
        Muon([p]).step()
    assert not torch.equal(p, before)
