"""Orthogonalization by a Newton-Schulz iteration with the Polar Express coefficients.

For G = U S V^T, five steps of X <- a X + b A X + c A^2 X with A = X X^T, started at X = G / (1.01 |G|_F), bring every
singular value above 1e-3 of |G|_F into [0.859, 1.141]: an approximation of U V^T, the polar factor, that needs nothing
but matmuls. With rows m, columns n >= m (a tall matrix is transposed) there are two ways to compute it:

    standard    X itself goes through the steps: 4 m^2 n + 2 m^3 FLOPs each
    Gram        on R = X X^T, which is m x m: each step is Z = a I + b R + c R^2, Q <- Z Q, R <- Z R Z, and at the end
                X <- Q X. What is rounded away from R when it is made is amplified by the steps on it, a thousandfold by
                the first two, so that R is made anew from X after some of them: a restart, 4 m^2 n FLOPs

For n = 4 m five steps are 90 m^3 FLOPs in standard form, 60 m^3 in Gram form with one restart and 70 with two; where a
symmetric product costs half, 65, 38 and 47. For n = m they are 30 (20 symmetric) in standard form, which the Gram form
never beats. `vibechat.kernels.cost` counts them.

In Gram form what is rounded to 16 bits is z of Z = a (I + z) and q of Q = s (I + q), where the numbers a and s stay
exact. After three steps Q is 128 on small singular values and 1 on large ones, and 128 on a diagonal would be off by
more than 1 may be. In float16 R is kept 4,096-fold, which keeps its entries off the subnormals.
Sources: Amsel et al. 2025, "The Polar Express", arXiv 2505.16932; Jordan et al. 2024, "Muon"; the Gram form after
Dao-AILab/gram-newton-schulz.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from vibechat.kernels import backend, symmetric_matmul
from vibechat.kernels.normalization import launch as launch_normalization
from vibechat.kernels.normalization import normalized

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
    """How many steps of the Gram form go by between restarts: with five steps (3, 2), in bfloat16 (2, 1, 2).

    The first restart makes good what the steps before it amplified. After three, small singular values are so large
    that float16 loses nothing that matters of the second R: (2, 3) leaves 1.25 as the largest singular value of
    384 x 1536 ones from 1 to 1e-3 where (3, 2) leaves 1.142, as it must be. bfloat16 would need R to be eight times as
    fine: there (3, 2) has left 1.99.
    """
    pattern = itertools.chain((2, 1) if dtype == torch.bfloat16 else (3,), itertools.repeat(2))
    lengths: list[int] = []
    while sum(lengths) < steps:
        lengths.append(min(next(pattern), steps - sum(lengths)))
    return lengths


def reference(g: Tensor, steps: int = 5) -> Tensor:
    """The polynomial of g (count, m, n), m <= n, in standard form and in g's dtype: the definition.

    float16 too is computed in bfloat16, as Muon usually is: that is what the kernels are held against.
    """
    dtype = torch.bfloat16 if g.dtype == torch.float16 else g.dtype
    return standard_form(normalized(g, dtype), steps).to(g.dtype)


def standard_form(x: Tensor, steps: int) -> Tensor:
    """The iteration on normalized x (count, m, n), m <= n, as it is written: the definition."""
    for a, b, c in polynomials(steps):
        gram = x @ x.mT  # (count, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def plain_product(
    a: Tensor, b: Tensor | None = None, *, d: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """alpha a b^T + beta d, rounded once; b of None is a."""
    nothing = a.new_zeros(1, 1, 1)
    return torch.baddbmm(nothing if d is None else d, a, (a if b is None else b).mT, beta=beta, alpha=alpha)


def gram_form(x: Tensor, steps: int, product: Callable[..., Tensor] = plain_product) -> Tensor:
    """The same on the Gram matrix of x, with restarts; `product` is called where the result is symmetric."""
    coefficients = polynomials(steps)
    large = 4096.0 if x.dtype == torch.float16 else 1.0
    for span in spans(steps, x.dtype):
        gram, q, s = product(x, alpha=large), None, 1.0
        for step in range(span):
            a, b, c = coefficients.pop(0)
            z = product(gram, d=gram, alpha=c / a / large**2, beta=b / a / large)
            q = z if q is None else product(z, q, d=z + q, beta=1.0)
            s *= a
            if step + 1 < span:
                half = product(z, gram, d=gram, alpha=a, beta=a)
                gram = product(half, z, d=half, alpha=a, beta=a)
        assert q is not None
        if x.stride(-1) != 1:  # a tall stack that was turned stays as it lies: q is symmetric, but for its rounding
            x = torch.baddbmm(x.mT, x.mT, q, beta=s, alpha=s).mT
        else:
            x = torch.baddbmm(x, q, x, beta=s, alpha=s)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# with the symmetric product


def launch(x: Tensor, steps: int) -> Tensor:
    """The iteration on normalized, contiguous x (count, m, n), m <= n, with the kernel for every symmetric product.

    In standard form and 16 bits a I stands in the kernel's epilogue, so that a step's last product is a plain one,
    which cuBLAS does best; float32, which is for exactness, adds a X in float32, and takes no Gram form.
    """
    product = symmetric_matmul.launch
    if x.dtype != torch.float32 and wide(x):
        return gram_form(x, steps, product)
    for a, b, c in polynomials(steps):
        gram = product(x)
        if x.dtype == torch.float32:
            x = torch.baddbmm(x, product(gram, d=gram, alpha=c, beta=b), x, beta=a)
        else:
            x = torch.bmm(product(gram, d=gram, alpha=c, beta=b, gamma=a), x)
    return x


@torch.library.custom_op("vibechat::newton_schulz", mutates_args=())
def _newton_schulz(g: Tensor, steps: int, is_normalized: bool) -> Tensor:
    """Of g (count, m, n), m <= n, contiguous. bfloat16 is computed in float16, which is eight times as accurate."""
    dtype = torch.float16 if g.dtype == torch.bfloat16 else g.dtype
    if is_normalized:
        x = g.to(dtype)
    else:
        x = torch.empty_like(g, dtype=dtype)
        launch_normalization(g, x)
    x = launch(x, steps)
    return x.to(g.dtype) if x.dtype != g.dtype or x is not g else g.clone()


@_newton_schulz.register_fake
def _(g: Tensor, steps: int, is_normalized: bool) -> Tensor:
    return torch.empty_like(g)


backend.count_no_flops(torch.ops.vibechat.newton_schulz)


def _refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    return f"not in {dtype}" if dtype == torch.float64 else backend.hardware_refusal(device, dtype)


backend.triton_refusals["newton_schulz"] = _refusal

# ---------------------------------------------------------------------------------------------------------------------
# the public face


def wide(x: Tensor) -> bool:
    """Whether the Gram form is the one with fewer FLOPs, at five steps: m < 2 n / 3."""
    return 2 * max(x.shape[-2:]) > 3 * min(x.shape[-2:])


def orthogonalize(x: Tensor, steps: int = 5, *, is_normalized: bool = True) -> Tensor:
    """`newton_schulz` of what is `normalized` already.

    Args:
        x: (count, m, n).
        steps: iterations.
        is_normalized: whether it is.

    Returns:
        (count, m, n), for m > n a transposed view.
    """
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    if backend.takes_kernel("newton_schulz", x):
        why = symmetric_matmul.refusal(x)
        if why is None:
            x = _newton_schulz(x.contiguous(), steps, is_normalized)
            return x.mT if tall else x
        backend.say_fallback("newton_schulz", why)
    x = x if is_normalized else normalized(x)
    x = (gram_form if wide(x) else standard_form)(x, steps)
    return x.mT if tall else x


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Approximate polar factor of each matrix of a stack.

    Args:
        g: (..., m, n), any float dtype; the iteration runs in it (with the kernels in float16 for bfloat16), the
            normalization before it in float32 or wider.
        steps: iterations.

    Returns:
        (..., m, n) in g's dtype; zeros for a zero matrix.
    """
    return orthogonalize(g.reshape(-1, *g.shape[-2:]), steps, is_normalized=False).reshape(g.shape)
