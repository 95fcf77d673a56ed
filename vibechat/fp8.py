"""Matmuls of linear layers in fp8, with one scale a tensor, found anew each time (Micikevicius et al. 2022, arXiv
2209.05433, "FP8 formats for deep learning").

    forward     y  = x w^T      x, w in e4m3 (4 exponent bits, 3 of mantissa, largest 448)
    backward    dx = dy w       dy in e5m2 (largest 57344), because gradients span more binades
                dw = dy^T x     x and w as the forward rounded them: that is all that it saves, one byte a number

A tensor t becomes t8 = round(t / s) with s the power of two next above max |t| / largest, so that dividing by it and
multiplying by it are exact, and a matmul is s_a s_b (a8 b8), added up in float32 and rounded once to the dtype of x.
Nothing is remembered from step to step. Master weights, norms, attention, the residual stream, the head and the loss
are untouched, and where no gradient is recorded (evaluation, sampling) the same layers run without fp8.

Where the numbers' passes are: max |t| is taken along rows first, so that torch.compile joins it to whatever makes the
rows of t (a norm, relu^2); behind a Triton kernel it is one reading of t. Rounding is one more pass, which writes a
byte a number. Hopper multiplies fp8 only where both operands run along the sum, so the backward also transposes x8 and
dy8 (a byte a number) and w8. Weights are rounded once a micro-batch.

On a GPU the matmul is torch._scaled_mm. Elsewhere it is emulated by a matmul in the dtype of x, which holds every fp8
number exactly: the same results but for the order of addition. (The tensor cores' fast accumulation, which the forward
asks for, keeps fewer bits between its partial sums than any emulation here does.)

FLOPs are what they are without it, so that both MFUs remain shares of the bf16 peak.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vibechat.kernels import relu2_mlp

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of every size of an fp8 matmul, says cuBLAS
SMALLEST_SCALE = 2.0**-126  # of a tensor of zeros


def fp8_obstacle(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why that device cannot multiply fp8 numbers, or None if it can."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"it needs a GPU of compute capability 8.9 or later (Hopper is 9.0), and this is {device.type}"
    if torch.version.hip is not None:
        return "it is untested on AMD"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"it needs compute capability 8.9 or later (Hopper is 9.0), and this GPU has {major}.{minor}"
    return None if dtype == torch.bfloat16 else f"it needs bfloat16 around it, not {str(dtype).removeprefix('torch.')}"


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x8, scale) with x = x8 scale but for rounding: x8 in the fp8 `dtype`, scale a power of two, float32, ().

    What is not finite stays so: an infinity, or NaN, becomes NaN.
    """
    largest = torch.finfo(dtype).max
    amax = x.abs().amax(-1).amax().float()
    scale = _power_of_two_above((amax / largest).clamp(min=SMALLEST_SCALE))
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def _power_of_two_above(x: Tensor) -> Tensor:
    """The least power of two that is at least x, for normal float32: any bit of the mantissa carries."""
    return ((x.view(torch.int32) + 0x007FFFFF) & 0x7F800000).view(torch.float32)


def _matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """scale_a scale_b (a b) in `dtype`; a is (M, K) and b (K, N), and both run along K in memory."""
    if a.is_cuda:
        return torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=dtype, use_fast_accum=fast)
    return ((a.to(dtype) @ b.to(dtype)).float() * scale_a * scale_b).to(dtype)


class _Fp8Linear(torch.autograd.Function):
    """x w^T for x (N, C) and w (F, C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        x8, x_scale = quantize(x, E4M3)
        w8, w_scale = quantize(w, E4M3)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.dtypes = x.dtype, w.dtype
        return _matmul(x8, w8.t(), x_scale, w_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        dy8, dy_scale = quantize(dy, E5M2)
        dx = _matmul(dy8, w8.t().contiguous().t(), dy_scale, w_scale, x_dtype, fast=False)
        dw = _matmul(dy8.t().contiguous(), x8.t().contiguous().t(), dy_scale, x_scale, w_dtype, fast=False)
        return dx, dw


def fp8_linear(x: Tensor, w: Tensor) -> Tensor:
    """x w^T in fp8 where gradients are recorded, else as it is.

    Args:
        x: (..., C), bfloat16 (on a CPU any float dtype).
        w: (F, C), x's dtype or wider (fp32 masters).

    Returns:
        (..., F) in x's dtype.

    Raises:
        ValueError: unless C, F and the number of rows are multiples of 16.
    """
    w = w.to(x.dtype)
    if not torch.is_grad_enabled():
        return F.linear(x, w)
    flat = x.reshape(-1, x.size(-1))
    sizes = {"rows": flat.size(0), "inputs": w.size(1), "outputs": w.size(0)}
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise ValueError(f"fp8_linear: {size} {name} are not a multiple of {MULTIPLE}")
    return _Fp8Linear.apply(flat, w).view(*x.shape[:-1], w.size(0))


def fp8_relu2_mlp(x: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
    """relu(x w_fc^T)^2 w_proj^T with both matmuls in fp8; as `vibechat.kernels.relu2_mlp`."""
    if not torch.is_grad_enabled():
        return relu2_mlp(x, w_fc, w_proj)
    return fp8_linear(fp8_linear(x, w_fc).relu().square(), w_proj)
