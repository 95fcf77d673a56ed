"""Orthogonalization by a Newton-Schulz iteration with the Polar Express coefficients.

For G = U S V^T, five steps of X <- a X + b A X + c A^2 X with A = X X^T, started at X = G / (1.01 |G|_F), bring every
singular value above 1e-3 of |G|_F into [0.859, 1.141]: an approximation of U V^T, the polar factor, that needs nothing
but matmuls. With rows m, columns n >= m (a tall matrix is transposed) there are two ways to compute it:

    standard    X itself goes through the steps: 4 m^2 n + 2 m^3 FLOPs each
    Gram        on R = X X^T, which is m x m: each step is Z = a I + b R + c R^2, Q <- Z Q, R <- Z R Z, and at the end
                X <- Q X. What is rounded away from R when it is made is amplified by the steps on it, a thousandfold by
                the first two, so that R is made anew from X after some of them: a restart, 4 m^2 n FLOPs

For n = 4 m five steps are 90 m^3 FLOPs in standard form and 60 m^3 in Gram form with one restart; where a symmetric
product costs half, 65 and 38. For n = m they are 30 (20 symmetric) in standard form, which the Gram form never beats.
Sources: Amsel et al. 2025, "The Polar Express", arXiv 2505.16932; Jordan et al. 2024, "Muon"; the Gram form after
Dao-AILab/gram-newton-schulz.
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
Quintic = tuple[float, float, float]


def polynomials(steps: int) -> list[Quintic]:
    """The coefficients of each step."""
    return [POLAR_EXPRESS[min(step, len(POLAR_EXPRESS) - 1)] for step in range(steps)]


def spans(steps: int, dtype: torch.dtype) -> list[int]:
    """How many steps of the Gram form go by between restarts.

    float16 and wider take one restart, after two steps. In bfloat16 that leaves singular values of up to 1.58 on
    spectra from 1 to 1e-3, and no restart 25; with (2, 1, 2) they stay below 1.15, and the error is the standard form's
    (0.072 and 0.074 of the norm there, 0.15 and 0.19 on rank 32 plus noise, 0.035 and 0.010 on random ones).
    """
    lengths: list[int] = []
    while sum(lengths) < steps:
        usual = 2 if dtype == torch.bfloat16 and len(lengths) != 1 else 1 if dtype == torch.bfloat16 else 3
        lengths.append(min(2 if not lengths else usual, steps - sum(lengths)))
    return lengths


def normalized(g: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Each matrix of g (..., m, n) over 1.01 times its Frobenius norm, in `dtype` (None: g's); zero stays zero.

    Computed in float32, or wider for wider g, of the matrix over its largest element, so that no square leaves the
    range of float32 whatever the scale.
    """
    tiny = torch.finfo(torch.float32).tiny
    x = g.to(torch.promote_types(g.dtype, torch.float32))
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    norm = torch.linalg.vector_norm(x.flatten(-2), dim=-1)[..., None, None]
    return x.mul_((1.01 * norm).clamp_min(tiny).reciprocal_()).to(dtype or g.dtype)


def standard_form(x: Tensor, steps: int) -> Tensor:
    """The iteration on normalized x (count, m, n), m <= n, as it is written: the definition."""
    for a, b, c in polynomials(steps):
        gram = x @ x.mT  # (count, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def gram_form(x: Tensor, steps: int) -> Tensor:
    """The same on the Gram matrix of x, with restarts."""
    coefficients = polynomials(steps)
    for span in spans(steps, x.dtype):
        gram, product = x @ x.mT, None  # (count, m, m) both
        for step in range(span):
            a, b, c = coefficients.pop(0)
            z = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            z.diagonal(dim1=-2, dim2=-1).add_(a)
            product = z if product is None else z @ product
            if step + 1 < span:
                gram = z @ gram @ z
        assert product is not None
        x = product @ x
    return x


def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """`newton_schulz` of what is `normalized` already, in the dtype that it is in.

    Args:
        x: (count, m, n).
        steps: iterations.

    Returns:
        (count, m, n), for m > n a transposed view.
    """
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    form = gram_form if 2 * x.size(-1) > 3 * x.size(-2) else standard_form  # by FLOPs, at five steps and full products
    x = form(x, steps)
    return x.mT if tall else x


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Approximate polar factor of each matrix of a stack.

    Args:
        g: (..., m, n), any float dtype; the iteration runs in it, the normalization before it in float32 or
            wider.
        steps: iterations.

    Returns:
        (..., m, n) in g's dtype; zeros for a zero matrix.
    """
    return orthogonalize(normalized(g.reshape(-1, *g.shape[-2:])), steps).reshape(g.shape)
