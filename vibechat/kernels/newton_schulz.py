"""Orthogonalization by a Newton-Schulz iteration with the Polar Express coefficients.

For G = U S V^T, five steps of X <- a X + (b A + c A^2) X with A = X X^T, started at X = G / (1.01 |G|_F), bring every
singular value above 1e-3 of |G|_F into [0.859, 1.141]: an approximation of U V^T, the polar factor, that needs nothing
but matmuls. FLOPs of a step on (m, n), m <= n: 2 m (2 m n + m m).
Source: Amsel et al. 2025, "The Polar Express", arXiv 2505.16932; Jordan et al. 2024, "Muon".
"""

import torch
from torch import Tensor

# Optimal odd quintics (a, b, c), step by step, for singular values in [1e-3, 1]; the last one repeats past five steps.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Approximate polar factor of each matrix of a stack.

    Args:
        g: (..., m, n), any float dtype; the iteration runs in it, the normalization before it in float32 or
            wider.
        steps: iterations.

    Returns:
        (..., m, n) in g's dtype; zeros for a zero matrix.
    """
    tall = g.size(-2) > g.size(-1)
    x = (g.mT if tall else g).reshape(-1, min(g.shape[-2:]), max(g.shape[-2:]))  # (count, m, n), m <= n
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)  # no square leaves its range
    wide = torch.promote_types(g.dtype, torch.float32)
    x = (x * (1.01 * norm).clamp_min(torch.finfo(torch.float32).tiny).reciprocal().to(wide)).to(g.dtype)
    for step in range(steps):
        a, b, c = POLAR_EXPRESS[min(step, len(POLAR_EXPRESS) - 1)]
        gram = x @ x.mT  # (count, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.reshape(g.mT.shape if tall else g.shape)
    return x.mT if tall else x
