"""QK-norm and rotary position embedding in one op: what stands between the qkv projection and attention.

    n = x / rms(x) over each head;   with halves (n1, n2):   y1 = n1 cos + n2 sin,   y2 = n2 cos - n1 sin

The rotation preserves the norm, so norm-then-rotate equals rotate-then-norm. Tables are float32: rounded to bfloat16
they move attention logits by 3e-3. Bytes for q and k of N elements at b bytes: forward 2 N b, backward 3 N b.
Source: Su et al. 2021, "RoFormer", arXiv 2104.09864; Henry et al. 2020, "Query-Key Normalization", arXiv 2010.04245.
"""

import torch
from torch import Tensor

from vibechat.kernels.rms_norm import EPS, rms_norm


def rotary_tables(length: int, head_dim: int, base: float, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(cos, sin) of position t times base^(-2i / head_dim), each (length, head_dim / 2) in float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim  # (D/2,)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), 1.0 / base**exponents)  # (T, D/2)
    return angles.cos(), angles.sin()


def _normed_and_rotated(x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    x1, x2 = rms_norm(wide, eps).chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).to(x.dtype)


def qk_norm_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """RMSNorm over each head of q and k, then rotary, rounding once.

    Args:
        q: (B, T, H, D), any batch and time strides.
        k: (B, T, H_kv, D).
        cos: (T, D/2) or (B, T, D/2), float32.
        sin: like cos.
        eps: added to the mean square.

    Returns:
        q and k, normed and rotated, in their dtypes.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (T, 1, D/2) or (B, T, 1, D/2)
    return _normed_and_rotated(q, cos, sin, eps), _normed_and_rotated(k, cos, sin, eps)
