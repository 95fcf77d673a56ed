"""Matmuls of linear layers in fp8, with one scale a tensor, found anew each time (Micikevicius et al. 2022, arXiv
2209.05433, "FP8 formats for deep learning").

    forward     y  = x w^T      x, w in e4m3 (4 exponent bits, 3 of mantissa, largest 448)
    backward    dx = dy w       dy in e5m2 (largest 57344), because gradients span more binades
                dw = dy^T x     x and w as the forward rounded them: that is all that it saves, one byte a number of x

A tensor t becomes t8 = round(t / s) with s the power of two next above max |t| / largest, so that dividing by it and
multiplying by it are exact, and a matmul is s_a s_b (a8 b8), added up in float32 and rounded once to the dtype of x.
Nothing is remembered from step to step. Master weights, norms, attention, the residual stream, the head and the loss
are untouched, and where no gradient is recorded (evaluation, sampling) the same layers run without fp8.

Weights are rounded once a step and not at their use (`round_weights`, vibechat/working_weights.py): one copy for each
of the two matmuls that read them, because Hopper multiplies fp8 only where both operands run along the sum. For the
same reason the backward rounds x and dy transposed too, a byte a number.

Where max |t| of the others is found, as torch.compile plans it for an H200 (tests/test_fp8_fusion.py holds it to this):

    forward     what a norm gives to qkv and to the MLP     in the pass that norms
                relu^2                                      from the product that it is of, which rounding reads again:
                                                            in 16 bits it is never written
                output of attention                         nowhere: it is bounded (`bound_of_attention`), because a
                                                            kernel of somebody else's writes it
    backward    gradients of both projections' products     in the backward pass of the norm that follows
                gradient of the hidden layer's product      as relu^2
                gradients of q, k and v                     in the pass that packs them; behind our kernel of QK-norm
                                                            + RoPE they are read for it, and packed when rounded

Behind our kernels of norms the first of each would be read for it too: LEFT_TO_COMPILER leaves norms to torch.compile.
Rounding is one more pass, which writes a byte a number.

On a GPU the matmul is torch._scaled_mm. Elsewhere it is emulated by a matmul in the dtype of x, which holds every fp8
number exactly: the same results but for the order of addition. (The tensor cores' fast accumulation, which the forward
asks for, keeps fewer bits between its partial sums than any emulation here does.)

FLOPs are what they are without it, so that both MFUs remain shares of the bf16 peak.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of every size of an fp8 matmul, says cuBLAS
SMALLEST_SCALE = 2.0**-126  # of a tensor of zeros
# Ops that make what fp8 matmuls read, whose kernels would keep torch.compile from taking the maximum as they make it.
_FUSED = "in fp8 the compiler finds the largest number in the pass that makes the rows"
LEFT_TO_COMPILER = {"rms_norm": _FUSED, "add_rms_norm": _FUSED}


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


def quantize(x: Tensor, dtype: torch.dtype, bound: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(x8, scale) with x = x8 scale but for rounding: x8 in the fp8 `dtype`, scale a power of two, float32, ().

    What is not finite stays so: an infinity, or NaN, becomes NaN. Where a `bound` of |x| is known, float32, (), nobody
    looks for the maximum; each binade that it is too large costs one at the small end, of 14 in e4m3.
    """
    largest = torch.finfo(dtype).max
    scale = _scale_of(x.abs().amax(-1).amax().float() if bound is None else bound, dtype)
    scaled = x.float() / scale
    if bound is not None:
        scaled = torch.where(scaled.isinf(), torch.nan, scaled)
    return scaled.clamp(-largest, largest).to(dtype), scale


@torch.no_grad()
def bound_of_attention(w_v: Tensor) -> Tensor:
    """What no output of attention exceeds, float32, (), for values w_v x of rows x of root mean square 1.

    Attention averages values, and |w_v x| is at most |x| = sqrt(C) times the largest norm of a row of w_v (K D, C).
    Rounding x and w_v to e4m3 adds a sixteenth each, which 1.25 covers. The largest of many such products is some six
    standard deviations, so that for C = 1664 the bound is seven times too large: three binades.
    """
    return 1.25 * w_v.size(1) ** 0.5 * w_v.float().square().sum(1).amax().sqrt()


def _scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The least power of two that is at least amax / largest: any bit of a float32's mantissa carries."""
    ratio = (amax / torch.finfo(dtype).max).clamp(min=SMALLEST_SCALE)
    return ((ratio.view(torch.int32) + 0x007FFFFF) & 0x7F800000).view(torch.float32)


def _matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """scale_a scale_b (a b) in `dtype`; a is (M, K) and b (K, N), and both run along K in memory."""
    if a.is_cuda:
        return torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=dtype, use_fast_accum=fast)
    return ((a.to(dtype) @ b.to(dtype)).float() * scale_a * scale_b).to(dtype)


class Fp8Weight(NamedTuple):
    """A weight w (F, C), rounded, as the two matmuls that read it want it."""

    w8: Tensor
    """(F, C), e4m3"""
    w8_t: Tensor
    """(C, F): the same, transposed in memory"""
    scale: Tensor
    """(), float32: w = w8 scale but for rounding"""

    @classmethod
    def like(cls, w: Tensor) -> "Fp8Weight":
        """Room for w, with nothing in it yet."""
        w8, w8_t = (torch.empty(shape, dtype=E4M3, device=w.device) for shape in (w.shape, w.t().shape))
        return cls(w8, w8_t, torch.empty((), device=w.device))


@torch.no_grad()
def round_weights(weights: Sequence[Tensor], rounded: Sequence[Fp8Weight]) -> None:
    """Round each weight into its place, as `quantize` does.

    Four passes of 11 bytes a number in all, for weights of two bytes: the maxima, one call for all; w / scale, which is
    exact; its rounding; the transposition. Once a step, so that nobody has to fuse them.
    """
    amax = torch.stack(torch._foreach_norm(list(weights), torch.inf)).float()
    torch._foreach_copy_([one.scale for one in rounded], list(_scale_of(amax, E4M3).unbind()))
    for w, one in zip(weights, rounded, strict=True):
        one.w8.copy_(w / one.scale)
        one.w8_t.copy_(one.w8.t())


@torch.compiler.allow_in_graph  # one node, which activation checkpointing can mark to be computed again
class _Fp8Matmul(torch.autograd.Function):
    """x w^T for x (N, C) and w (F, C), whose gradient goes to w, and whose values are those of its rounding."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bound: Tensor | None, w: Tensor, w8: Tensor, w8_t: Tensor, w_scale: Tensor
    ) -> Tensor:
        x8, x_scale = quantize(x, E4M3, bound)
        ctx.save_for_backward(x8, x_scale, w8_t, w_scale)
        ctx.dtypes = x.dtype, w.dtype
        return _matmul(x8, w8.t(), x_scale, w_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor, None, None, None]:
        x8, x_scale, w8_t, w_scale = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        dy8, dy_scale = quantize(dy, E5M2)
        dx = _matmul(dy8, w8_t.t(), dy_scale, w_scale, x_dtype, fast=False)
        dw = _matmul(dy8.t().contiguous(), x8.t().contiguous().t(), dy_scale, x_scale, w_dtype, fast=False)
        return dx, None, dw, None, None, None


def fp8_linear(x: Tensor, w: Tensor, rounded: Fp8Weight | None = None, bound: Tensor | None = None) -> Tensor:
    """x w^T in fp8 where gradients are recorded, else as it is.

    Args:
        x: (..., C), bfloat16 (on a CPU any float dtype).
        w: (F, C), x's dtype or wider (fp32 masters).
        rounded: what `round_weights` made of w; None rounds it here.
        bound: what no |x| exceeds, float32, (); None looks for the largest.

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
    if rounded is None:
        rounded = Fp8Weight.like(w)
        round_weights([w], [rounded])
    return _Fp8Matmul.apply(flat, bound, w, *rounded).view(*x.shape[:-1], w.size(0))


class Fp8Linear(torch.nn.Module):
    """`fp8_linear` for a weight that a training step rounds once for all its micro-batches.

    It puts what `round_weights` made in the place of these buffers (torch.func.functional_call). Where nobody did they
    are None, and each call rounds the weight that it gets.
    """

    w8: Tensor | None
    w8_t: Tensor | None
    scale: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        for name in Fp8Weight._fields:
            self.register_buffer(name, None, persistent=False)

    def forward(self, x: Tensor, w: Tensor, bound: Tensor | None = None) -> Tensor:
        """x w^T, see `fp8_linear`."""
        if self.w8 is None or self.w8_t is None or self.scale is None:
            return fp8_linear(x, w, bound=bound)
        return fp8_linear(x, w, Fp8Weight(self.w8, self.w8_t, self.scale), bound)
