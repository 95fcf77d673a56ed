"""QK-norm and rotary position embedding in one op: what stands between the qkv projection and attention.

    n = x / rms(x) over each head;   with halves (n1, n2):   y1 = n1 cos + n2 sin,   y2 = n2 cos - n1 sin

Call that y = R n. The rotation preserves the norm, so norm-then-rotate equals rotate-then-norm. Tables are float32:
rounded to bfloat16 they move attention logits by 3e-3. The backward needs nothing but what attention keeps anyway, y,
and the float32 rstd = 1 / rms(x):

    dx = rstd (R^T dy - n mean(dy y)),     n = R^-1 y = R^T y / (cos^2 + sin^2),     mean over the D of a head

Bytes for q and k of N elements together at b bytes, in heads of D, which the kernels move and no more but for the
tables (8 B T D/2 at least once, then out of the caches; rstd is 4 N / D of each):
    qk_norm_rope  forward 2 N b + 4 N / D (x; y, rstd)          backward 3 N b + 4 N / D (dy, y, rstd; dx)
FLOPs: 6 N forward and 11 N backward. A row belongs to one program; there are no atomics.
Source: Su et al. 2021, "RoFormer", arXiv 2104.09864; Henry et al. 2020, "Query-Key Normalization", arXiv 2010.04245.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from vibechat.kernels import backend
from vibechat.kernels.language import device_of, power_of_two, tl, triton, triton_dtype, wide_dtype
from vibechat.kernels.rms_norm import EPS
from vibechat.kernels.rms_norm import reference as norm_reference
from vibechat.kernels.tuning import RowConfig, tuned_config

WIDEST = 1024  # channels of a head that a program can hold in registers


def rotary_tables(length: int, head_dim: int, base: float, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(cos, sin) of position t times base^(-2i / head_dim), each (length, head_dim / 2) in float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim  # (D/2,)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), 1.0 / base**exponents)  # (T, D/2)
    return angles.cos(), angles.sin()


# ---------------------------------------------------------------------------------------------------------------------
# the reference


def _normed_and_rotated(x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    x1, x2 = norm_reference(wide, eps).chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).to(x.dtype)


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """q and k normed in float32 or wider, rotated, and rounded once: the definition."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (T, 1, D/2) or (B, T, 1, D/2)
    return _normed_and_rotated(q, cos, sin, eps), _normed_and_rotated(k, cos, sin, eps)


# ---------------------------------------------------------------------------------------------------------------------
# the kernels: a row is a head at a position; ROWS rows of one batch element a program, first those of q, then of k

if triton is not None:

    @triton.jit
    def _place(pid, T, H, D, ROWS: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
        """(batch element, rows, their times, their heads, pairs of a head, what of that exists), in 64 bits but for
        the rows of one batch element: offsets pass 2^31."""
        tiles = tl.cdiv(T * H, ROWS)
        b = (pid // tiles).to(tl.int64)
        row = (pid % tiles) * ROWS + tl.arange(0, ROWS)
        t, h = (row // H).to(tl.int64)[:, None], (row % H).to(tl.int64)[:, None]
        d = tl.arange(0, HALF)[None, :]
        return b, row, t, h, d, (row < T * H)[:, None] & (d < D // 2)

    @triton.jit
    def _norm_rotate(  # type: ignore[no-untyped-def]
        pid, x_ptr, y_ptr, rstd_ptr, cos_ptr, sin_ptr, T, H, D, eps, x_b, x_t, x_h, x_d, c_b, c_t, c_d,
        ROWS: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        b, row, t, h, d, inside = _place(pid, T, H, D, ROWS, HALF)
        x = x_ptr + b * x_b + t * x_t + h * x_h + d * x_d
        x1 = tl.load(x, mask=inside, other=0.0).to(WIDE)
        x2 = tl.load(x + (D // 2) * x_d, mask=inside, other=0.0).to(WIDE)
        angle = b * c_b + t * c_t + d * c_d
        cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(WIDE)
        sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(WIDE)
        rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / D + eps)
        n1, n2 = x1 * rstd[:, None], x2 * rstd[:, None]
        out = b * T * H + row
        y = y_ptr + out[:, None] * D + d
        tl.store(y, (n1 * cos + n2 * sin).to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(y + D // 2, (n2 * cos - n1 * sin).to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(rstd_ptr + out, rstd, mask=row < T * H)

    @triton.jit
    def qk_norm_rope_forward(  # type: ignore[no-untyped-def]
        q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_rstd_ptr, k_rstd_ptr, cos_ptr, sin_ptr, B, T, H, K, D, eps,
        q_b, q_t, q_h, q_d, k_b, k_t, k_h, k_d, c_b, c_t, c_d,
        ROWS: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        pid = tl.program_id(0)
        of_q = B * tl.cdiv(T * H, ROWS)
        if pid < of_q:
            _norm_rotate(
                pid, q_ptr, q_out_ptr, q_rstd_ptr, cos_ptr, sin_ptr, T, H, D, eps, q_b, q_t, q_h, q_d, c_b, c_t, c_d,
                ROWS, HALF, WIDE,
            )  # fmt: skip
        else:
            _norm_rotate(
                pid - of_q, k_ptr, k_out_ptr, k_rstd_ptr, cos_ptr, sin_ptr, T, K, D, eps, k_b, k_t, k_h, k_d,
                c_b, c_t, c_d, ROWS, HALF, WIDE,
            )  # fmt: skip

    @triton.jit
    def _unrotate_unnorm(  # type: ignore[no-untyped-def]
        pid, dy_ptr, y_ptr, rstd_ptr, dx_ptr, cos_ptr, sin_ptr, T, H, D, dy_b, dy_t, dy_h, dy_d, c_b, c_t, c_d,
        ROWS: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        b, row, t, h, d, inside = _place(pid, T, H, D, ROWS, HALF)
        dy = dy_ptr + b * dy_b + t * dy_t + h * dy_h + d * dy_d
        dy1 = tl.load(dy, mask=inside, other=0.0).to(WIDE)
        dy2 = tl.load(dy + (D // 2) * dy_d, mask=inside, other=0.0).to(WIDE)
        out = b * T * H + row
        place = out[:, None] * D + d
        y1 = tl.load(y_ptr + place, mask=inside, other=0.0).to(WIDE)
        y2 = tl.load(y_ptr + place + D // 2, mask=inside, other=0.0).to(WIDE)
        rstd = tl.load(rstd_ptr + out, mask=row < T * H, other=0.0)[:, None]
        angle = b * c_b + t * c_t + d * c_d
        cos = tl.load(cos_ptr + angle, mask=inside, other=1.0).to(WIDE)
        sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(WIDE)
        mean = (tl.sum(dy1 * y1 + dy2 * y2, 1) / D)[:, None]
        shrunk = mean / (cos * cos + sin * sin)
        u1, u2 = dy1 - shrunk * y1, dy2 - shrunk * y2
        tl.store(dx_ptr + place, (rstd * (u1 * cos - u2 * sin)).to(dx_ptr.dtype.element_ty), mask=inside)
        tl.store(dx_ptr + place + D // 2, (rstd * (u2 * cos + u1 * sin)).to(dx_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def qk_norm_rope_backward(  # type: ignore[no-untyped-def]
        dq_ptr, dk_ptr, q_out_ptr, k_out_ptr, q_rstd_ptr, k_rstd_ptr, q_grad_ptr, k_grad_ptr, cos_ptr, sin_ptr,
        B, T, H, K, D, dq_b, dq_t, dq_h, dq_d, dk_b, dk_t, dk_h, dk_d, c_b, c_t, c_d,
        ROWS: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        pid = tl.program_id(0)
        of_q = B * tl.cdiv(T * H, ROWS)
        if pid < of_q:
            _unrotate_unnorm(
                pid, dq_ptr, q_out_ptr, q_rstd_ptr, q_grad_ptr, cos_ptr, sin_ptr, T, H, D, dq_b, dq_t, dq_h, dq_d,
                c_b, c_t, c_d, ROWS, HALF, WIDE,
            )  # fmt: skip
        else:
            _unrotate_unnorm(
                pid - of_q, dk_ptr, k_out_ptr, k_rstd_ptr, k_grad_ptr, cos_ptr, sin_ptr, T, K, D,
                dk_b, dk_t, dk_h, dk_d, c_b, c_t, c_d, ROWS, HALF, WIDE,
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# the launchers: any strides, nothing copied

CONFIGS = (RowConfig(16, 2), RowConfig(16, 4), RowConfig(32, 4), RowConfig(32, 8))  # what bench.tune tries


def _config(kernel: str, half: int, device: torch.device) -> RowConfig:
    return tuned_config(kernel, str(half), CONFIGS, device) or default_config(half)


@functools.cache
def default_config(half: int) -> RowConfig:
    """Where nothing was measured: 1,024 pairs a program, eight to a thread."""
    return RowConfig(min(64, max(1, 1024 // half)), 4)


def _grid(B: int, T: int, H: int, K: int, rows: int) -> tuple[int]:
    return (B * -(-T * H // rows) + B * -(-T * K // rows),)


def _table_strides(cos: Tensor) -> tuple[int, ...]:
    return (0, *cos.stride()) if cos.dim() == 2 else cos.stride()


def launch_forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, eps: float, config: RowConfig | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q' (B, T, H, D), k' (B, T, K, D) and their rstd (B, T, H), (B, T, K); cos and sin have the same strides."""
    (B, T, H, D), K = q.shape, k.size(2)
    q_out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    k_out = torch.empty((B, T, K, D), dtype=q.dtype, device=q.device)
    wide = wide_dtype(q.dtype)
    q_rstd = torch.empty((B, T, H), dtype=wide, device=q.device)
    k_rstd = torch.empty((B, T, K), dtype=wide, device=q.device)
    half = power_of_two(D // 2)
    rows, warps = config or _config("qk_norm_rope_forward", half, q.device)
    grid = _grid(B, T, H, K, rows)
    if grid[0]:
        with device_of(q):
            qk_norm_rope_forward[grid](
                q, k, q_out, k_out, q_rstd, k_rstd, cos, sin, B, T, H, K, D, eps,
                *q.stride(), *k.stride(), *_table_strides(cos),
                ROWS=rows, HALF=half, WIDE=triton_dtype(wide), num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    return q_out, k_out, q_rstd, k_rstd


def launch_backward(
    dq: Tensor, dk: Tensor, q_out: Tensor, k_out: Tensor, q_rstd: Tensor, k_rstd: Tensor, cos: Tensor, sin: Tensor,
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of q (B, T, H, D) and k (B, T, K, D), from those of the outputs and what the forward saved."""
    (B, T, H, D), K = q_out.shape, k_out.size(2)
    q_grad = torch.empty((B, T, H, D), dtype=q_out.dtype, device=q_out.device)
    k_grad = torch.empty((B, T, K, D), dtype=q_out.dtype, device=q_out.device)
    half = power_of_two(D // 2)
    rows, warps = config or _config("qk_norm_rope_backward", half, q_out.device)
    grid = _grid(B, T, H, K, rows)
    if grid[0]:
        with device_of(q_out):
            qk_norm_rope_backward[grid](
                dq, dk, q_out, k_out, q_rstd, k_rstd, q_grad, k_grad, cos, sin, B, T, H, K, D,
                *dq.stride(), *dk.stride(), *_table_strides(cos),
                ROWS=rows, HALF=half, WIDE=triton_dtype(q_rstd.dtype), num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    return q_grad, k_grad


# ---------------------------------------------------------------------------------------------------------------------
# the registration


@torch.library.custom_op("vibechat::qk_norm_rope", mutates_args=())
def _qk_norm_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_forward(q, k, cos, sin, eps)


@torch.library.custom_op("vibechat::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
    dq: Tensor, dk: Tensor, q_out: Tensor, k_out: Tensor, q_rstd: Tensor, k_rstd: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return launch_backward(dq, dk, q_out, k_out, q_rstd, k_rstd, cos, sin)


@_qk_norm_rope.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = wide_dtype(q.dtype)
    q_rstd, k_rstd = (x.new_empty(x.shape[:-1], dtype=wide) for x in (q, k))
    return q.new_empty(q.shape), k.new_empty(k.shape), q_rstd, k_rstd


@_qk_norm_rope_backward.register_fake
def _(
    dq: Tensor, dk: Tensor, q_out: Tensor, k_out: Tensor, q_rstd: Tensor, k_rstd: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return q_out.new_empty(q_out.shape), k_out.new_empty(k_out.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, inputs[2], inputs[3])
    ctx.mark_non_differentiable(output[2], output[3])


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor, _: Tensor, __: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    return *_qk_norm_rope_backward(dq, dk, *ctx.saved_tensors), None, None, None


_qk_norm_rope.register_autograd(_differentiate, setup_context=_save)
backend.count_no_flops(torch.ops.vibechat.qk_norm_rope, torch.ops.vibechat.qk_norm_rope_backward)
backend.triton_refusals["qk_norm_rope"] = backend.hardware_refusal

# ---------------------------------------------------------------------------------------------------------------------
# the public face


def _no(why: str) -> bool:
    backend.say_fallback("qk_norm_rope", why)
    return False


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel can take these, saying why if it cannot."""
    B, T, _, D = q.shape
    if D > WIDEST or D % 2:
        return _no(f"the kernel holds heads of an even size up to {WIDEST}")
    if q.dtype != k.dtype or k.shape[:2] != (B, T) or k.size(3) != D:
        return _no("the kernel takes q and k of one dtype, batch, time and head size")
    if cos.shape not in ((T, D // 2), (B, T, D // 2)) or cos.shape != sin.shape or cos.stride() != sin.stride():
        return _no("the kernel takes cos and sin of one layout, (T, D/2) or (B, T, D/2)")
    if cos.requires_grad or sin.requires_grad:
        return _no("the kernel has no gradient for the tables")
    return True


def qk_norm_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """RMSNorm over each head of q and k, then rotary, rounding once.

    Args:
        q: (B, T, H, D), any strides: views of a packed qkv projection are not copied.
        k: (B, T, H_kv, D).
        cos: (T, D/2) or (B, T, D/2), float32.
        sin: like cos; nowhere are both zero.
        eps: added to the mean square.

    Returns:
        q and k, normed and rotated, in their dtypes.
    """
    if backend.takes_kernel("qk_norm_rope", q) and _fits(q, k, cos, sin):
        return _qk_norm_rope(q, k, cos, sin, eps)[:2]
    return reference(q, k, cos, sin, eps)
