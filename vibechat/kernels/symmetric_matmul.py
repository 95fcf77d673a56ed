"""The batched matrix product whose result is known to be symmetric: one triangle is computed, the other is its mirror.

    c = alpha a b^T + beta d + gamma I        a, b (count, M, K), c, d (count, M, M)

It is symmetric where b is a (a Gram matrix), or where a and b are polynomials of one symmetric matrix, which commute
(and then a b^T = a b). A grid of persistent programs walks the tiles on and below the diagonal of every matrix, no
program is dead; what leaves for the other side is the tile transposed, masked out on the diagonal. Operands arrive by
TMA through 3-D descriptors, which clip the edges.

FLOPs: count M (M + 1) K, half of the full product, plus half of the tiles on the diagonal.
Bytes: each operand once, b count (2 M K + M^2), one more M^2 for d, and half of K-wide operands again where b is not a.
Sources: modded-nanogpt's XXT kernels and microsoft/dion's, which launch the whole square and return early.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vibechat.kernels.language import TensorDescriptor, device_of, tl, triton, triton_dtype, wide_dtype
from vibechat.kernels.matmul import HOPPER_SMS
from vibechat.kernels.tuning import tuned_config


class SymmetricConfig(NamedTuple):
    """How the kernel is launched."""

    block: int
    """rows and columns of a tile"""
    block_k: int
    """of K a step"""
    stages: int
    """steps of operands in flight"""
    warps: int
    """of a program"""
    per_sm: int
    """programs that share an SM"""


DEFAULT = SymmetricConfig(128, 64, 3, 8, 2)
CONFIGS = (  # what bench.tune tries
    DEFAULT,
    SymmetricConfig(128, 64, 4, 8, 1),
    SymmetricConfig(128, 64, 3, 4, 2),
    SymmetricConfig(128, 128, 3, 8, 1),
)

if triton is not None:

    @triton.jit
    def _tile(i, j, M, rows_end, BT: tl.constexpr):  # type: ignore[no-untyped-def]
        """Offsets of tile (i, j) in a matrix of M columns, and which of them lie in its first `rows_end` rows."""
        rows, columns = (i * BT + tl.arange(0, BT))[:, None], (j * BT + tl.arange(0, BT))[None, :]
        return rows * M + columns, (rows < rows_end) & (columns < M)

    @triton.jit(do_not_specialize=["count"])
    def symmetric_matmul(  # type: ignore[no-untyped-def]
        a_desc, b_desc, d_ptr, c_ptr, count, M, K, alpha, beta_over_alpha, gamma,
        BT: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        side, steps = tl.cdiv(M, BT), tl.cdiv(K, BK)
        triangle = side * (side + 1) // 2
        for tile in tl.range(tl.program_id(0), count * triangle, tl.num_programs(0)):
            matrix, t = tile // triangle, tile % triangle
            i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)  # t = i (i + 1) / 2 + j, j <= i
            i = tl.where(i * (i + 1) // 2 > t, i - 1, i)  # the root may be rounded either way
            i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
            j = t - i * (i + 1) // 2
            square = matrix.to(tl.int64) * M * M
            acc = tl.zeros((BT, BT), WIDE)
            if d_ptr is not None:  # first: after the products there are no registers left for it
                at, inside = _tile(i, j, M, M, BT)
                acc = beta_over_alpha * tl.load(d_ptr + square + at, mask=inside, other=0.0).to(WIDE)
            for k in range(steps):
                a = tl.reshape(a_desc.load([matrix, i * BT, k * BK]), (BT, BK))
                b = tl.reshape(b_desc.load([matrix, j * BT, k * BK]), (BT, BK))
                acc = tl.dot(a, b.T, acc, input_precision="ieee", out_dtype=WIDE)
            on_diagonal = (i * BT + tl.arange(0, BT))[:, None] == (j * BT + tl.arange(0, BT))[None, :]
            c = (alpha * acc + tl.where(on_diagonal, gamma, 0.0)).to(c_ptr.dtype.element_ty)
            at, inside = _tile(i, j, M, M, BT)
            tl.store(c_ptr + square + at, c, mask=inside)
            at, inside = _tile(j, i, M, tl.where(i != j, M, 0), BT)
            tl.store(c_ptr + square + at, c.T, mask=inside)


def refusal(x: Tensor) -> str | None:
    """Why TMA cannot move a stack (count, M, K) and the products of it, or None."""
    sixteen = 16 // x.element_size()
    if x.numel() == 0:
        return "it is empty"
    if x.size(-1) % sixteen or x.size(-2) % sixteen:
        return f"rows and columns are not multiples of {sixteen}"
    if x.size(-2) > 32_768 or x.size(0) * (x.size(-2) // 128 + 1) ** 2 > 2**31:
        return "more tiles than 32 bits count"
    return None


def config_for(M: int, device: torch.device) -> SymmetricConfig:
    """The measured configuration, or the default."""
    return tuned_config("symmetric_matmul", key(M), CONFIGS, device) or DEFAULT


def key(M: int) -> str:
    """What the configuration is looked up by: how many tiles of 128 a matrix is high."""
    return str(-(-M // 128))


def launch(
    a: Tensor,
    b: Tensor | None = None,
    *,
    d: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    config: SymmetricConfig | None = None,
) -> Tensor:
    """alpha a b^T + beta d + gamma I, which must be symmetric, computed in float32 (or wider) and rounded once.

    Args:
        a: (count, M, K), contiguous, in float16 or bfloat16 on a GPU for speed, float32 exactly.
        b: the same shape; None for a.
        d: (count, M, M), contiguous; needs beta.
        alpha: of the product; not zero.
        beta: of d.
        gamma: of the identity.
        config: tiles and stages.

    Returns:
        (count, M, M).
    """
    count, M, K = a.shape
    block, block_k, stages, warps, per_sm = config or config_for(M, a.device)
    if a.element_size() > 2:
        block, block_k, stages = min(block, 64), min(block_k, 32), 2  # exactness is asked for, not speed
    c = torch.empty((count, M, M), dtype=a.dtype, device=a.device)
    side = -(-M // block)
    sms = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else HOPPER_SMS
    describe = TensorDescriptor.from_tensor
    shape = [1, block, block_k]
    with device_of(a):
        symmetric_matmul[(min(count * side * (side + 1) // 2, sms * per_sm),)](
            describe(a, shape), describe(a if b is None else b, shape), d, c, count, M, K, alpha, beta / alpha, gamma,
            BT=block, BK=block_k, WIDE=triton_dtype(wide_dtype(a.dtype)),
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
            maxnreg=2048 // (warps * per_sm) if per_sm > 1 else None,  # the epilogue would take more
        )  # fmt: skip
    return c
