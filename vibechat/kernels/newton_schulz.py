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
Sources: Amsel et al. 2025, "The Polar Express", arXiv 2505.16932; Jordan et al. 2024, "Muon"; the Gram form after
Dao-AILab/gram-newton-schulz.
"""

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
    """How many steps of the Gram form go by between restarts: with five steps (2, 3), in 16 bits (2, 1, 2).

    On 384 x 1536 with singular values from 1 to 1e-3, one restart leaves an error of 0.068 of the norm and a largest
    singular value of 1.23 in float16 (0.27 and 1.58 in bfloat16, on 256 x 1024); two leave 0.0074 and 1.142 (0.07 and
    1.15), what the standard form leaves.
    """
    lengths: list[int] = []
    while sum(lengths) < steps:
        usual = 3 if dtype.itemsize > 2 else 1 if len(lengths) == 1 else 2
        lengths.append(min(2 if not lengths else usual, steps - sum(lengths)))
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
        # a tall stack that was turned stays as it lies: product is symmetric, but for its rounding
        x = (x.mT @ product).mT if x.stride(-1) != 1 else product @ x
    return x


# ---------------------------------------------------------------------------------------------------------------------
# with the symmetric product


def launch(x: Tensor, steps: int) -> Tensor:
    """The iteration on normalized, contiguous x (count, m, n), m <= n, with the kernel for every symmetric product.

    In 16 bits a I stands in the kernel's epilogue, so that a step's last product is a plain one, which cuBLAS does
    best; float32, which is for exactness, adds a X in float32, and takes no Gram form.
    """
    product = symmetric_matmul.launch
    if x.dtype == torch.float32 or not wide(x):
        for a, b, c in polynomials(steps):
            gram = product(x)
            if x.dtype == torch.float32:
                x = torch.baddbmm(x, product(gram, d=gram, alpha=c, beta=b), x, beta=a)
            else:
                x = torch.bmm(product(gram, d=gram, alpha=c, beta=b, gamma=a), x)
        return x
    coefficients = polynomials(steps)
    for span in spans(steps, x.dtype):
        gram, total = product(x), None
        for step in range(span):
            a, b, c = coefficients.pop(0)
            z = product(gram, d=gram, alpha=c, beta=b, gamma=a)
            total = z if total is None else product(z, total)
            if step + 1 < span:
                gram = product(product(z, gram), z)
        assert total is not None
        x = torch.bmm(total, x)
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
