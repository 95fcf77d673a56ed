"""The Triton half of linear_cross_entropy: logits by cuBLAS, then one pass over them, in place.

For a chunk of rows that fits the workspace, with u = x w^T, z the softcapped logits and t = z / c:

    E_j = exp(z_j)            S = sum_j E_j          lse = log S           k = 1 + 2 lambda lse
    F_j = E_j (1 - t_j^2)     F_y = (E_y - S / k) (1 - t_y^2)              v = k (row weight) / S
    dx  = v (F w)             dw += F^T (v x)

As |z| <= c, exp(z) and its sum stay in range for c <= 40 without a row maximum. So a logit is read once, and F written
over it while the sums are not known yet; what depends on the sums is one column, the target's, and the row scale v,
which is applied outside of both matmuls. Products leave the matmuls in float32, so that nothing is rounded twice. The
sum is taken without the target, so that neither the loss, log(1 + others / E_y), nor the target's factor,
((k - 1) E_y - others) / k, cancels when the target is almost certain. As the target's factor is as large as all others
together, v is divided by what rounding did to it: the error moves to where it counts least.

The safe path, for no softcap, a wider one, or float16, whose range F leaves, reads a chunk once for the maxima and the
sums and once more to write F_j = k p_j - [j = y], times 256 in float16. `again` writes the same from a logsumexp that
was saved: what `reduction="none"` needs, whose row weights come with the backward.

Bytes for N rows, D channels, V words of b bytes in chunks of R rows: 5 N V b (a matmul writes u, the pass reads it and
writes F, two matmuls read F), and for each chunk 2 V D b for the weight and 8 V D to accumulate dw in float32. FLOPs:
6 N D V. The workspace is R V b, plus 6 R D. Everything is deterministic: a row belongs to one program.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vibechat.kernels.language import device_of, power_of_two, tl, triton, triton_dtype
from vibechat.kernels.tuning import tuned_config

WIDEST_OFFSET_FREE_SOFTCAP = 40.0
HALF_UNIT = 256.0  # what a float16 factor is multiplied by: a probability of 1 / 65,536 is no subnormal then

# ---------------------------------------------------------------------------------------------------------------------
# the kernels: one row a program, BLOCK columns at a time

if triton is not None:
    LOG2_E = tl.constexpr(1.4426950408889634)

    @triton.jit
    def capped_at(u, cap):  # type: ignore[no-untyped-def]
        """(z, dz / du) of raw logits: z = c tanh(u / c) as c (1 - 2 r), and 1 - tanh^2 as 4 r (1 - r)."""
        a = u * (2.0 * LOG2_E / cap)
        e = tl.exp2(tl.where(a > 126.0, 126.0, a))  # finite, and NaN stays NaN
        r = 1.0 / (e + 1.0)
        return cap - (2.0 * cap) * r, 4.0 * (e * r) * r

    @triton.jit
    def capped(u, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
        """The same for a constant cap, or none."""
        if SOFTCAP is None:
            return u, u * 0.0 + 1.0
        else:  # noqa: RET505 - what stands after a return is compiled too
            return capped_at(u, SOFTCAP)

    @triton.jit
    def log1p(x):  # type: ignore[no-untyped-def]
        """log(1 + x) for x in [0, 1], right to the last bits for small x too."""
        w = 1.0 + x
        return tl.where(w == 1.0, x, tl.log(w) * (x / tl.where(w == 1.0, 1.0, w - 1.0)))

    @triton.jit
    def one_minus_exp(x):  # type: ignore[no-untyped-def]
        """1 - exp(-x) for x >= 0, likewise."""
        w = tl.exp2(-x * LOG2_E)
        inside = (w != 1.0) & (w > 0.0)
        return tl.where(inside, (1.0 - w) * x / -tl.log(tl.where(inside, w, 0.5)), tl.where(w == 1.0, x, 1.0))

    @triton.jit
    def finish_row(others, z, offset, z_loss):  # type: ignore[no-untyped-def]
        """(loss, lse, k, E_y) of a row from the sum over all words but the target, its logit, and their offset."""
        e = tl.exp2((z - offset) * LOG2_E)
        likely = others <= e
        small = log1p(tl.where(likely, others / tl.where(likely, e, 1.0), 0.0))
        nll = tl.where(likely, small, tl.log(others + e) - (z - offset))
        lse = nll + z
        k = 1.0 + 2.0 * z_loss * lse
        return nll + z_loss * lse * lse, lse, tl.where(k == 0.0, 1e-30, k), e

    @triton.jit
    def store_target(ptr, factor, scale):  # type: ignore[no-untyped-def]
        """Store a target's factor; return the row scale that makes up for its rounding."""
        rounded = factor.to(ptr.dtype.element_ty)
        tl.store(ptr, rounded)
        kept = rounded.to(factor.dtype)
        return tl.where(kept == 0.0, scale, scale * (factor / tl.where(kept == 0.0, 1.0, kept)))

    @triton.jit
    def _clear(row_ptr, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        zeros = tl.zeros((BLOCK,), row_ptr.dtype.element_ty)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            tl.store(row_ptr + columns, zeros, mask=columns < width)

    @triton.jit
    def _offset_and_sum(row_ptr, y, V, width, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
        """The maximum of a row's logits and the sum of exp(z - maximum) without the target's."""
        top = tl.full((), -float("inf"), WIDE)
        total = tl.zeros((), WIDE)
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z, _ = capped(tl.load(row_ptr + columns, mask=columns < width, other=0.0).to(WIDE), SOFTCAP)
            z = tl.where(columns < V, z, -float("inf"))
            higher = tl.maximum(top, tl.max(z, 0))
            e = tl.where(columns == y, 0.0, tl.exp2((z - higher) * LOG2_E))
            total = total * tl.exp2((top - higher) * LOG2_E) + tl.sum(e, 0)
            top = higher
        return top, total

    @triton.jit
    def cross_entropy_rows(  # type: ignore[no-untyped-def]
        u_ptr, targets_ptr, weights_ptr, losses_ptr, lse_ptr, scales_ptr, V, width, ignore_index, z_loss,
        SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr, GRADIENT: tl.constexpr, UNIT: tl.constexpr,
        BLOCK: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        row_ptr = u_ptr + row * width  # rows are padded to `width` columns, so that their loads are wide
        dtype: tl.constexpr = u_ptr.dtype.element_ty
        target = tl.load(targets_ptr + row)
        if target == ignore_index:
            tl.store(losses_ptr + row, 0.0)
            if GRADIENT:
                tl.store(scales_ptr + row, 0.0)
                _clear(row_ptr, width, BLOCK)
            else:
                tl.store(lse_ptr + row, 0.0)
        else:
            outside = (target < 0) | (target >= V)  # nothing may be read there, and nothing be made up
            y = tl.where(outside, 0, target)
            z_y, slope_y = capped(tl.load(row_ptr + y).to(WIDE), SOFTCAP)
            z_y = tl.where(outside, float("nan"), z_y)
            tl.debug_barrier()  # every thread has read it before any writes the factor over it
            offset = tl.zeros((), WIDE)
            if BOUNDED:
                sums = tl.zeros((BLOCK,), WIDE)
                for start in range(0, V, BLOCK):
                    columns = start + tl.arange(0, BLOCK)
                    u = tl.load(row_ptr + columns, mask=columns < width, other=0.0).to(WIDE)
                    z, slope = capped(u, SOFTCAP)
                    e = tl.exp2(z * LOG2_E)
                    sums += tl.where((columns < V) & (columns != y), e, 0.0)
                    if GRADIENT:
                        tl.store(row_ptr + columns, (e * slope).to(dtype), mask=columns < width)
                others = tl.sum(sums, 0)
            else:
                offset, others = _offset_and_sum(row_ptr, y, V, width, SOFTCAP, BLOCK, WIDE)
            loss, lse, k, e_y = finish_row(others, z_y, offset, z_loss)
            tl.store(losses_ptr + row, loss)
            if GRADIENT:
                weight = tl.load(weights_ptr + row).to(WIDE)
                scale = weight / UNIT
                factor = ((k - 1.0) * e_y - others) / (others + e_y) * UNIT
                if BOUNDED:
                    scale = weight * k / (others + e_y)
                    factor = ((k - 1.0) * e_y - others) / k
                else:
                    top = offset * LOG2_E
                    inverse = k / (others + e_y) * UNIT
                    for start in range(0, V, BLOCK):
                        columns = start + tl.arange(0, BLOCK)
                        u = tl.load(row_ptr + columns, mask=columns < width, other=0.0).to(WIDE)
                        z, slope = capped(u, SOFTCAP)
                        f = tl.exp2(z * LOG2_E - top) * inverse * slope
                        tl.store(row_ptr + columns, f.to(dtype), mask=columns < width)
                tl.debug_barrier()  # the target's column is written last
                tl.store(scales_ptr + row, store_target(row_ptr + y, factor * slope_y, scale))
            else:
                tl.store(lse_ptr + row, lse)

    @triton.jit
    def cross_entropy_again(  # type: ignore[no-untyped-def]
        u_ptr, targets_ptr, weights_ptr, losses_ptr, lse_ptr, scales_ptr, V, width, ignore_index, z_loss,
        SOFTCAP: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        row_ptr = u_ptr + row * width
        dtype: tl.constexpr = u_ptr.dtype.element_ty
        target = tl.load(targets_ptr + row)
        if target == ignore_index:
            tl.store(scales_ptr + row, 0.0)
            _clear(row_ptr, width, BLOCK)
        else:
            y = tl.where((target < 0) | (target >= V), 0, target)
            _, slope_y = capped(tl.load(row_ptr + y).to(WIDE), SOFTCAP)
            tl.debug_barrier()
            lse = tl.load(lse_ptr + row)
            nll = tl.load(losses_ptr + row) - z_loss * lse * lse
            k = 1.0 + 2.0 * z_loss * lse
            rest = one_minus_exp(nll)
            factor = ((k - 1.0) * (1.0 - rest) - rest) * slope_y * UNIT
            for start in range(0, V, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                u = tl.load(row_ptr + columns, mask=columns < width, other=0.0).to(WIDE)
                z, slope = capped(u, SOFTCAP)
                f = k * tl.exp2((z - lse) * LOG2_E) * slope * UNIT
                tl.store(row_ptr + columns, f.to(dtype), mask=columns < width)
            tl.debug_barrier()
            scale = tl.load(weights_ptr + row).to(WIDE) / UNIT
            tl.store(scales_ptr + row, store_target(row_ptr + y, factor, scale))


# ---------------------------------------------------------------------------------------------------------------------
# the launchers


class SweepConfig(NamedTuple):
    """How a row is swept."""

    columns: int
    """logits that a program holds at a time"""
    warps: int
    """warps of a program"""


CONFIGS = tuple(SweepConfig(*c) for c in ((2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16)))
DEFAULT_CONFIG = SweepConfig(4096, 8)  # where nothing was measured


def _sweep(kernel: str, vocab: int, device: torch.device, config: SweepConfig | None) -> SweepConfig:
    """The configuration of a kernel, with no more columns than there are words."""
    widest = max(32, power_of_two(vocab))
    columns, warps = config or tuned_config(kernel, str(widest), CONFIGS, device) or DEFAULT_CONFIG
    return SweepConfig(min(columns, widest), warps)


def is_bounded(softcap: float | None, dtype: torch.dtype) -> bool:
    """Whether exp(z) and the factor stay in range without a maximum to subtract."""
    return softcap is not None and softcap <= WIDEST_OFFSET_FREE_SOFTCAP and dtype != torch.float16


def _unit(dtype: torch.dtype) -> float:
    return HALF_UNIT if dtype == torch.float16 else 1.0


def padded(vocab: int) -> int:
    """Columns of a row of logits in memory: rows begin on a boundary of 128 bytes at least."""
    return -(-vocab // 64) * 64


def launch_rows(
    logits: Tensor, vocab: int, targets: Tensor, weights: Tensor | None, losses: Tensor, extra: Tensor,
    softcap: float | None, ignore_index: int, z_loss: float, config: SweepConfig | None = None,
) -> None:  # fmt: skip
    """One pass over the raw logits of a chunk.

    Args:
        logits: (R, padded(vocab)), dense. With weights, the factor is written over it.
        vocab: how many columns are words.
        targets: (R,).
        weights: (R,) row weights, or None where no gradient is wanted.
        losses: (R,), receives the losses.
        extra: (R,), receives the row scales v, or, without weights, the logsumexp.
        softcap: as in the public op.
        ignore_index: as in the public op.
        z_loss: as in the public op.
        config: columns at a time and warps.
    """
    kernel = "cross_entropy_rows" if weights is not None else "cross_entropy_rows_only"
    block, warps = _sweep(kernel, vocab, logits.device, config)
    with device_of(logits):
        cross_entropy_rows[(logits.size(0),)](
            logits, targets, weights, losses, extra, extra, vocab, logits.size(1), ignore_index, z_loss,
            SOFTCAP=softcap, BOUNDED=is_bounded(softcap, logits.dtype), GRADIENT=weights is not None,
            UNIT=_unit(logits.dtype), BLOCK=block, WIDE=triton_dtype(losses.dtype),
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip


def launch_again(
    logits: Tensor, vocab: int, targets: Tensor, weights: Tensor, losses: Tensor, lse: Tensor, scales: Tensor,
    softcap: float | None, ignore_index: int, z_loss: float, config: SweepConfig | None = None,
) -> None:  # fmt: skip
    """Write the factor over a chunk's logits, given its losses and logsumexp, and the row scales into `scales`."""
    block, warps = _sweep("cross_entropy_again", vocab, logits.device, config)
    with device_of(logits):
        cross_entropy_again[(logits.size(0),)](
            logits, targets, weights, losses, lse, scales, vocab, logits.size(1), ignore_index, z_loss,
            SOFTCAP=softcap, UNIT=_unit(logits.dtype), BLOCK=block, WIDE=triton_dtype(losses.dtype),
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
