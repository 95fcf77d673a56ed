"""RMSNorm without a gain, alone and fused with the residual addition before it.

    y = x / sqrt(mean(x^2) + eps)            dx = rstd (dy - y mean(dy y))

Bytes for N rows of C channels at b bytes: rms_norm forward reads x and writes y, 2 N C b; backward reads dy and x and
writes dx, 3 N C b. add_rms_norm forward reads residual and x and writes sum and y, 4 N C b. FLOPs are negligible.
Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", arXiv 1910.07467.
"""

import torch.nn.functional as F
from torch import Tensor

EPS = 2.0**-23  # what F.rms_norm takes for float32 (and for bfloat16, which it normalizes in float32)


def rms_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """x / rms(x) over the last dimension, computed in float32 or wider.

    Args:
        x: (..., C), any float dtype.
        eps: added to the mean square.

    Returns:
        (..., C) in x's dtype.
    """
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def add_rms_norm(residual: Tensor, x: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """(residual + x, rms_norm(residual + x)): what stands between two blocks of a transformer.

    Args:
        residual: (..., C), the residual stream.
        x: (..., C), what a block adds to it.
        eps: added to the mean square.

    Returns:
        The sum and the normed sum, both (..., C) in residual's dtype.
    """
    total = residual + x
    return total, rms_norm(total, eps)
