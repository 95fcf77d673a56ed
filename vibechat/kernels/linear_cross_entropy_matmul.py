"""The factor of linear_cross_entropy made where the logits are born: in the epilogue of our own matmul.

    u = x w^T,   z = c tanh(u / c),   F = exp(z) (1 - (z / c)^2),   others = sum of exp(z) but the target's

The logits never reach memory: they go from the float32 accumulator through the softcap into F, rounded once, and into a
partial sum for each row and piece of columns. The raw logit of the target is stored by the piece that holds it. A
second, small kernel adds the partial sums in a fixed order, which gives the losses and the row scales, and sets the
target's column of F. Only where exp(z) needs no offset: a softcap of at most 40, and not in float16.

Bytes for R rows: F (R V b), x and the weight, and 8 R V / (columns of a piece) for the partial sums. FLOPs: 2 R V D.
Against cuBLAS and a pass in place, a logit saves a write and a read, 4 of 10 bytes in bfloat16, and is not rounded to
bfloat16 before the softcap.
"""

import torch
from torch import Tensor

from vibechat.kernels import matmul
from vibechat.kernels.language import INTERPRETING, device_of, power_of_two, tl, triton, triton_dtype, wide_dtype
from vibechat.kernels.linear_cross_entropy_triton import is_bounded
from vibechat.kernels.matmul import MatmulConfig
from vibechat.kernels.tuning import tuned_config

if triton is not None:
    from vibechat.kernels.linear_cross_entropy_triton import LOG2_E, capped, capped_at, finish_row, store_target
    from vibechat.kernels.matmul import rows_of_piece

    @triton.jit
    def factor_of_logits(acc, aux, row, col, M, N, extra):  # type: ignore[no-untyped-def]
        """The matmul's hook: F of a piece of raw logits; its sums and its targets' logits go out by pointer."""
        targets_ptr, partial_ptr, raw_ptr, cap = extra
        rows, inside = rows_of_piece(acc, row, col, M, N)
        target = tl.load(targets_ptr + rows, mask=inside, other=-1)
        columns = col + tl.arange(0, acc.shape[1])
        z, slope = capped_at(acc, cap)
        e = tl.exp2(z * LOG2_E)
        hit = columns[None, :] == target[:, None]
        others = tl.sum(tl.where(hit | (columns >= N)[None, :], 0.0, e), 1)
        pieces = tl.cdiv(N, acc.shape[1])
        tl.store(partial_ptr + rows.to(tl.int64) * pieces + col // acc.shape[1], others, mask=inside)
        here = inside & (target >= col) & (target < col + acc.shape[1])
        tl.store(raw_ptr + rows, tl.sum(tl.where(hit, acc, 0.0), 1), mask=here)
        return e * slope

    @triton.jit
    def finish_factor(  # type: ignore[no-untyped-def]
        f_ptr, targets_ptr, weights_ptr, partial_ptr, raw_ptr, losses_ptr, scales_ptr,
        V, width, pieces, ignore_index, z_loss,
        SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets_ptr + row)
        if target == ignore_index:
            tl.store(losses_ptr + row, 0.0)
            tl.store(scales_ptr + row, 0.0)
        else:
            outside = (target < 0) | (target >= V)
            piece = tl.arange(0, BLOCK)
            others = tl.sum(tl.load(partial_ptr + row * pieces + piece, mask=piece < pieces, other=0.0), 0)
            z_y, slope_y = capped(tl.load(raw_ptr + row).to(WIDE), SOFTCAP)
            z_y = tl.where(outside, float("nan"), z_y)
            loss, _, k, e_y = finish_row(others, z_y, 0.0, z_loss)
            scale = tl.load(weights_ptr + row).to(WIDE) * k / (others + e_y)
            factor = ((k - 1.0) * e_y - others) / k * slope_y
            tl.store(losses_ptr + row, loss)
            y = tl.where(outside, 0, target)
            tl.store(scales_ptr + row, store_target(f_ptr + row * width + y, factor, scale))


CONFIGS = (  # what spills no register: the epilogue takes a piece of 64 columns at a time, or there are few of them
    MatmulConfig(128, 256, 64, 8, 3, 8, 4),
    MatmulConfig(128, 256, 64, 16, 3, 8, 4),
    MatmulConfig(128, 256, 64, 8, 4, 8, 4),
    MatmulConfig(128, 128, 64, 8, 4, 8, 2),
    MatmulConfig(128, 128, 64, 8, 3, 4, 4, 2),  # two programs share an SM: one multiplies in the other's epilogue
)
DEFAULT_CONFIG = CONFIGS[0]  # where nothing was measured


def refusal(x: Tensor, weight: Tensor, softcap: float | None) -> str | None:
    """Why the factor of x (R, D) and weight (V, D) cannot be made this way, or None."""
    if not is_bounded(softcap, x.dtype):
        return "the softcap is no bound that the factor keeps its range under"
    if not INTERPRETING and x.dtype != torch.bfloat16:
        return f"not in {x.dtype}"
    return matmul.tma_refusal(x=x, weight=weight)


def launch_fused(
    x: Tensor, weight: Tensor, factor: Tensor, targets: Tensor, weights: Tensor, losses: Tensor, scales: Tensor,
    softcap: float, ignore_index: int, z_loss: float, config: MatmulConfig | None = None,
) -> None:  # fmt: skip
    """The factor of a chunk, its losses and its row scales.

    Args:
        x: (R, D).
        weight: (V, D) in x's dtype.
        factor: (R, V) in x's dtype, rows at multiples of 16 bytes; receives F.
        targets: (R,).
        weights: (R,) row weights.
        losses: (R,), receives the losses.
        scales: (R,), receives the row scales v.
        softcap: as in the public op, but at most 40.
        ignore_index: as in the public op.
        z_loss: as in the public op.
        config: of the matmul.
    """
    partial, raw = launch_factor(x, weight, factor, targets, softcap, config)
    launch_finish(factor, targets, weights, partial, raw, losses, scales, softcap, ignore_index, z_loss)


def launch_factor(
    x: Tensor, weight: Tensor, factor: Tensor, targets: Tensor, softcap: float, config: MatmulConfig | None = None
) -> tuple[Tensor, Tensor]:
    """F without the targets' column, the partial sums (R, pieces) and the targets' raw logits (R,)."""
    (R, D), V = x.shape, weight.size(0)
    config = config or tuned_config("cross_entropy_fused", f"{V}x{D}", CONFIGS, x.device) or DEFAULT_CONFIG
    wide = wide_dtype(x.dtype)
    partial = torch.empty((R, -(-V // config.piece)), dtype=wide, device=x.device)
    raw = torch.empty(R, dtype=wide, device=x.device)
    extra = targets, partial, raw, softcap
    matmul.launch(x, weight, hook=factor_of_logits, extra=extra, out=factor, config=config)
    return partial, raw


def launch_finish(
    factor: Tensor, targets: Tensor, weights: Tensor, partial: Tensor, raw: Tensor, losses: Tensor, scales: Tensor,
    softcap: float, ignore_index: int, z_loss: float,
) -> None:  # fmt: skip
    """Losses and row scales from the partial sums, and the targets' column of F."""
    pieces = partial.size(1)
    with device_of(factor):
        finish_factor[(factor.size(0),)](
            factor, targets, weights, partial, raw, losses, scales,
            factor.size(1), factor.stride(0), pieces, ignore_index, z_loss,
            SOFTCAP=softcap, BLOCK=power_of_two(pieces), WIDE=triton_dtype(partial.dtype),
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
