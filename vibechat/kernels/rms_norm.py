"""RMSNorm without a gain, alone and fused with the residual addition before it.

    y = x / sqrt(mean(x^2) + eps)            dx = rstd (dy - y mean(dy y)),   rstd = 1 / sqrt(mean(x^2) + eps)

Saved for the backward: the input (for add_rms_norm the sum, which is an output anyway) and rstd, float32. The backward
of add_rms_norm adds the gradient that reaches the sum from elsewhere, so no residual gradient makes a trip of its own.

Bytes for N rows of C channels at b bytes, which the kernels move and no more (rstd is 4 N of each):
    rms_norm      forward 2 N C b + 4 N (x; y, rstd)            backward 3 N C b + 4 N (dy, x, rstd; dx)
    add_rms_norm  forward 4 N C b + 4 N (residual, x; sum, y)   backward 4 N C b + 4 N (dsum, dy, sum; dx)
FLOPs: 3 N C forward and 6 N C backward, one more for each addition: negligible, these ops are bound by memory.
Everything is deterministic: a row belongs to one program, there are no atomics.
Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", arXiv 1910.07467.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vibechat.kernels import backend
from vibechat.kernels.language import device_of, power_of_two, tl, triton, triton_dtype, wide_dtype
from vibechat.kernels.tuning import RowConfig, tuned_config

EPS = 2.0**-23  # what F.rms_norm takes for float32 (and for bfloat16, which it normalizes in float32)
WIDEST = 16_384  # channels that a program can hold in registers

# ---------------------------------------------------------------------------------------------------------------------
# the reference


def reference(x: Tensor, eps: float = EPS) -> Tensor:
    """x / rms(x) over the last dimension, computed in float32 or wider: the definition."""
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def add_reference(residual: Tensor, x: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """(residual + x, rms_norm(residual + x)), the sum rounded first: the definition."""
    total = residual + x
    return total, reference(total, eps)


# ---------------------------------------------------------------------------------------------------------------------
# the kernels: ROWS rows of one batch element a program, each row whole in registers, BLOCK >= C lanes

if triton is not None:

    @triton.jit
    def _rows(T, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
        """(batch element, positions of this program), in 64 bits: offsets pass 2^31."""
        tiles = tl.cdiv(T, ROWS)
        b = (tl.program_id(0) // tiles).to(tl.int64)
        t = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        return b, t

    @triton.jit
    def rms_norm_forward(  # type: ignore[no-untyped-def]
        x_ptr, residual_ptr, sum_ptr, y_ptr, rstd_ptr, T, C, eps,
        x_b, x_t, x_c, r_b, r_t, r_c,
        ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        b, t = _rows(T, ROWS)
        c = tl.arange(0, BLOCK)[None, :]
        inside = (t < T)[:, None] & (c < C)
        out = (b * T + t)[:, None] * C + c
        x = tl.load(x_ptr + b * x_b + t[:, None] * x_t + c * x_c, mask=inside, other=0.0).to(WIDE)
        if residual_ptr is not None:
            x += tl.load(residual_ptr + b * r_b + t[:, None] * r_t + c * r_c, mask=inside, other=0.0).to(WIDE)
            rounded = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + out, rounded, mask=inside)
            x = rounded.to(WIDE)  # the norm is of what the backward will read
        rstd = tl.rsqrt(tl.sum(x * x, 1) / C + eps)
        tl.store(y_ptr + out, (x * rstd[:, None]).to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(rstd_ptr + b * T + t, rstd, mask=t < T)

    @triton.jit
    def rms_norm_backward(  # type: ignore[no-untyped-def]
        dy_ptr, dsum_ptr, x_ptr, rstd_ptr, dx_ptr, T, C,
        dy_b, dy_t, dy_c, ds_b, ds_t, ds_c, x_b, x_t, x_c,
        ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        b, t = _rows(T, ROWS)
        c = tl.arange(0, BLOCK)[None, :]
        inside = (t < T)[:, None] & (c < C)
        dy = tl.load(dy_ptr + b * dy_b + t[:, None] * dy_t + c * dy_c, mask=inside, other=0.0).to(WIDE)
        x = tl.load(x_ptr + b * x_b + t[:, None] * x_t + c * x_c, mask=inside, other=0.0).to(WIDE)
        rstd = tl.load(rstd_ptr + b * T + t, mask=t < T, other=0.0)[:, None]
        y = x * rstd
        dx = rstd * (dy - y * (tl.sum(dy * y, 1) / C)[:, None])
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + b * ds_b + t[:, None] * ds_t + c * ds_c, mask=inside, other=0.0).to(WIDE)
        tl.store(dx_ptr + (b * T + t)[:, None] * C + c, dx.to(dx_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# the launchers: any strides, nothing copied

CONFIGS = (RowConfig(1, 2), RowConfig(1, 4), RowConfig(2, 4), RowConfig(4, 8))  # what bench.tune tries


def _config(kernel: str, block: int, device: torch.device) -> RowConfig:
    return tuned_config(kernel, str(block), CONFIGS, device) or default_config(block)


@functools.cache
def default_config(block: int) -> RowConfig:
    """Where nothing was measured: 2,048 lanes and four warps, or one row and a warp for each 512 lanes."""
    return RowConfig(min(16, max(1, 2048 // block)), min(16, max(4, block // 512)))


def launch_forward(
    x: Tensor, residual: Tensor | None, eps: float, config: RowConfig | None = None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(sum or None, y, rstd) of x (B, T, C), plus a residual of the same shape and dtype if there is one."""
    B, T, C = x.shape
    y = torch.empty((B, T, C), dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty((B, T, C), dtype=x.dtype, device=x.device)
    wide = wide_dtype(x.dtype)
    rstd = torch.empty((B, T), dtype=wide, device=x.device)
    block = power_of_two(C)
    rows, warps = config or _config("rms_norm_forward", block, x.device)
    grid = (B * -(-T // rows),)
    if grid[0]:
        with device_of(x):
            rms_norm_forward[grid](
                x, residual, total, y, rstd, T, C, eps,
                *x.stride(), *(x if residual is None else residual).stride(),
                ROWS=rows, BLOCK=block, WIDE=triton_dtype(wide), num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    return total, y, rstd


def launch_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, rstd: Tensor, config: RowConfig | None = None
) -> Tensor:
    """dx (B, T, C) from the gradient of y, that of the sum if there is one, and what the forward saved."""
    B, T, C = x.shape
    dx = torch.empty((B, T, C), dtype=x.dtype, device=x.device)
    block = power_of_two(C)
    rows, warps = config or _config("rms_norm_backward", block, x.device)
    grid = (B * -(-T // rows),)
    if grid[0]:
        with device_of(x):
            rms_norm_backward[grid](
                dy, dsum, x, rstd, dx, T, C,
                *dy.stride(), *(dy if dsum is None else dsum).stride(), *x.stride(),
                ROWS=rows, BLOCK=block, WIDE=triton_dtype(rstd.dtype), num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    return dx


# ---------------------------------------------------------------------------------------------------------------------
# the registration: opaque, differentiable ops on (B, T, C)


@torch.library.custom_op("vibechat::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _, y, rstd = launch_forward(x, None, eps)
    return y, rstd


@torch.library.custom_op("vibechat::add_rms_norm", mutates_args=())
def _add_rms_norm(residual: Tensor, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total, y, rstd = launch_forward(x, residual, eps)
    assert total is not None
    return total, y, rstd


@torch.library.custom_op("vibechat::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dy: Tensor, dsum: Tensor | None, x: Tensor, rstd: Tensor) -> Tensor:
    return launch_backward(dy, dsum, x, rstd)


@_rms_norm.register_fake
def _(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=wide_dtype(x.dtype))


@_add_rms_norm.register_fake
def _(residual: Tensor, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=wide_dtype(x.dtype))


@_rms_norm_backward.register_fake
def _(dy: Tensor, dsum: Tensor | None, x: Tensor, rstd: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0], output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, None]:
    return None if dy is None else _rms_norm_backward(dy, None, *ctx.saved_tensors), None


def _differentiate_sum(
    ctx: Any, dsum: Tensor | None, dy: Tensor | None, _: None
) -> tuple[Tensor | None, Tensor | None, None]:
    dx = dsum if dy is None else _rms_norm_backward(dy, dsum, *ctx.saved_tensors)
    return dx, dx, None


_rms_norm.register_autograd(_differentiate, setup_context=_save)
_add_rms_norm.register_autograd(_differentiate_sum, setup_context=_save_sum)
backend.count_no_flops(
    torch.ops.vibechat.rms_norm, torch.ops.vibechat.add_rms_norm, torch.ops.vibechat.rms_norm_backward
)
backend.triton_refusals["rms_norm"] = backend.triton_refusals["add_rms_norm"] = backend.hardware_refusal

# ---------------------------------------------------------------------------------------------------------------------
# the public face


def _as_rows(op: str, *tensors: Tensor) -> list[Tensor] | None:
    """Views (B, T, C) of tensors (..., C), or None after saying why the kernel cannot take them."""
    first = tensors[0]
    if not 0 < first.size(-1) <= WIDEST:
        return backend.say_fallback(op, f"the kernel holds 1 to {WIDEST} channels")
    if any(x.shape != first.shape or x.dtype != first.dtype for x in tensors):
        return backend.say_fallback(op, "the kernel adds tensors of one shape and dtype")
    if first.dim() == 3:
        return list(tensors)
    if first.dim() < 3:
        return [x.view(1, -1, x.size(-1)) if x.dim() == 1 else x.unsqueeze(0) for x in tensors]
    try:
        return [x.view(-1, *x.shape[-2:]) for x in tensors]
    except RuntimeError:
        return backend.say_fallback(op, "the leading dimensions do not merge without a copy")


def rms_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """x / rms(x) over the last dimension, computed in float32 or wider.

    Args:
        x: (..., C), any float dtype, any strides.
        eps: added to the mean square.

    Returns:
        (..., C) in x's dtype.
    """
    if backend.takes_kernel("rms_norm", x) and (rows := _as_rows("rms_norm", x)) is not None:
        y = _rms_norm(rows[0], eps)[0]
        return y if x.dim() == 3 else y.view(x.shape)
    return reference(x, eps)


def add_rms_norm(residual: Tensor, x: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """(residual + x, rms_norm(residual + x)): what stands between two blocks of a transformer.

    Args:
        residual: (..., C), the residual stream.
        x: (..., C), what a block adds to it.
        eps: added to the mean square.

    Returns:
        The sum and the normed sum, both (..., C) in residual's dtype.
    """
    if backend.takes_kernel("add_rms_norm", x) and (rows := _as_rows("add_rms_norm", residual, x)) is not None:
        total, y, _ = _add_rms_norm(*rows, eps)
        return (total, y) if x.dim() == 3 else (total.view(x.shape), y.view(x.shape))
    return add_reference(residual, x, eps)
