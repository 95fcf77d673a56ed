"""Matrices of known spectra, and what Newton-Schulz must make of them."""

import torch
from torch import Tensor

from vibechat.kernels.newton_schulz import POLAR_EXPRESS

SPECTRA = ("random", "ill-conditioned", "rank-deficient", "dominated", "harmonic")


def matrix(kind: str, m: int, n: int, seed: int = 0) -> Tensor:
    """(m, n) in float64: normal; singular values from 1 to 1e-3; rank m / 8 and 1e-2 of noise; one 1, others 0.003;
    1, 1/2, 1/3 and so on."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=rng)

    if kind == "random":
        return randn(m, n)
    k = min(m, n)
    if kind == "rank-deficient":
        rank = max(1, k // 8)
        return randn(m, rank) @ randn(rank, n) / rank**0.5 + 1e-2 * randn(m, n)
    u, v = (torch.linalg.qr(randn(size, k)).Q for size in (m, n))
    values = torch.logspace(0, -3, k, dtype=torch.float64)
    if kind == "dominated":
        values = torch.full((k,), 3e-3, dtype=torch.float64)
        values[0] = 1
    if kind == "harmonic":
        values = 1 / torch.arange(1, k + 1, dtype=torch.float64)
    return u * values @ v.T


def polynomial(sigma: Tensor, steps: int = 5) -> Tensor:
    """What becomes of a normalized singular value."""
    for step in range(steps):
        a, b, c = POLAR_EXPRESS[min(step, 4)]
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


def exact(g: Tensor, steps: int = 5) -> Tensor:
    """The iteration in float64, through the singular values."""
    u, s, vh = torch.linalg.svd(g.double(), full_matrices=False)
    return u * polynomial(s / (1.01 * s.norm()).clamp_min(1e-300), steps) @ vh


def check_spectrum(result: Tensor, g: Tensor, floor: float = 1e-5) -> None:
    """Assert that along the singular vectors of g, singular values of at least 1e-3 of |g|_F land in [0.85, 1.15], and
    smaller ones, down to `floor`, follow the polynomial within 5%."""
    u, s, vh = torch.linalg.svd(g.double(), full_matrices=False)
    share = s / s.norm()
    assert torch.linalg.matrix_norm(result.double(), 2) <= 1.15
    landed = (u * (result.double() @ vh.T)).sum(0)  # (k,): u_i^T result v_i
    large = share >= 1e-3
    assert large.any()
    if not ((landed[large] >= 0.85) & (landed[large] <= 1.15)).all():
        raise AssertionError(f"singular values landed in [{landed[large].min():.4f}, {landed[large].max():.4f}]")
    tiny = (share < 1e-3) & (share > floor)
    off = (landed[tiny] / polynomial(share[tiny] / 1.01) - 1).abs()
    assert not (off > 0.05).any(), f"small singular values are off by {off.max():.3f}"
