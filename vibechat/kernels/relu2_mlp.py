"""The ReLU^2 MLP: y = relu(x w_fc^T)^2 w_proj^T, saving x and the squared activation only.

    post = relu(x w_fc^T)^2          dpre   = 2 (g w_proj) sqrt(post)        g = the gradient of y
    y    = post w_proj^T             dx     = dpre w_fc,   dw_fc = dpre^T x,   dw_proj = g^T post

The root of post is the relu, so what eager PyTorch keeps of it, as large as post, need not be kept. Two ways to compute
it, chosen per width by measurement (`tuning.tuned_choice`; the first where nobody measured):

    elementwise   cuBLAS, then one kernel in place: relu^2 of the product forward, times 2 sqrt(post) backward
    fused         both in the epilogue of our matmul, on its float32 accumulator, rounded once

All other products are cuBLAS in either way. Elementwise, the relu was rounded before it was squared; post then holds
twice the digits cut to one, and its root, rounded again, is that relu to the last bit: no error is added. Fused, the
root of a post that was rounded once is nearer to the truth than any rounded relu. Float16 squares below 2^-14 lose
digits, and their roots with them: activations under 2^-7, which hardly count beside others.

Bytes of elements of b bytes for N tokens, width C and hidden size H, every operand of a product read once:
    relu2_mlp   forward 2 b (N C + N H + C H)                backward b (4 N C + 5 N H + 4 C H)
and 2 b N H more in each pass for elementwise. FLOPs: forward 4 N C H, backward 8 N C H.
Saved: b (N C + N H) and the weights, where eager saves b (N C + 2 N H).
Sources: So et al. 2021, "Primer", arXiv 2109.08668; the root of the square, modded-nanogpt's record 87.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vibechat.kernels import backend, matmul
from vibechat.kernels.language import INTERPRETING, device_of, tl, triton, triton_dtype, wide_dtype
from vibechat.kernels.matmul import MatmulConfig, tma_refusal
from vibechat.kernels.tuning import FlatConfig, tuned_choice, tuned_config

WAYS = ("elementwise", "fused")
FEWEST_TOKENS = 1024  # below, the fused matmul has too few tiles for a GPU's SMs

# ---------------------------------------------------------------------------------------------------------------------
# the reference


def reference(x: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
    """The definition, as eager PyTorch computes it."""
    return F.linear(F.linear(x, w_fc).relu().square(), w_proj)


@torch.compiler.allow_in_graph  # one node, which activation checkpointing can mark to be computed again
class _KeepTheSquare(torch.autograd.Function):
    """The definition in plain PyTorch, with the same results to the last bit and half of the memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
        post = F.linear(x, w_fc).relu_().square_()
        ctx.save_for_backward(x, w_fc, w_proj, post)
        return F.linear(post, w_proj)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, w_fc, w_proj, post = ctx.saved_tensors
        dpre = (g @ w_proj).mul_(post.sqrt()).mul_(2)
        return _gradients(ctx.needs_input_grad, g, dpre, x, post, w_fc)


def _gradients(
    needed: tuple[bool, ...], g: Tensor, dpre: Tensor | None, x: Tensor, post: Tensor, w_fc: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dw_fc and dw_proj, those that are needed."""
    dw_proj = _rows(g).T @ _rows(post) if needed[2] else None
    if dpre is None:
        return None, None, dw_proj
    return dpre @ w_fc if needed[0] else None, _rows(dpre).T @ _rows(x) if needed[1] else None, dw_proj


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(-1))


# ---------------------------------------------------------------------------------------------------------------------
# the kernels

if triton is not None:

    @triton.jit
    def _relu(x):  # type: ignore[no-untyped-def]
        return tl.where(x < 0, 0.0, x)  # NaN stays NaN, which tl.maximum would hide

    @triton.jit
    def relu2_hook(acc, aux, row, col, M, N, extra):  # type: ignore[no-untyped-def]
        relu = _relu(acc)
        return relu * relu

    @triton.jit
    def relu2_gradient_hook(acc, aux, row, col, M, N, extra):  # type: ignore[no-untyped-def]
        return 2.0 * acc * tl.sqrt(aux.to(acc.dtype))

    @triton.jit
    def relu2_in_place(x_ptr, size, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        relu = _relu(tl.load(x_ptr + i, mask=i < size, other=0.0).to(WIDE))
        tl.store(x_ptr + i, (relu * relu).to(x_ptr.dtype.element_ty), mask=i < size)

    @triton.jit
    def relu2_gradient_in_place(g_ptr, post_ptr, size, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + i, mask=i < size, other=0.0).to(WIDE)
        root = tl.sqrt(tl.load(post_ptr + i, mask=i < size, other=0.0).to(WIDE))
        relu = root.to(g_ptr.dtype.element_ty).to(WIDE)  # what was squared, to the last bit
        tl.store(g_ptr + i, (2.0 * g * relu).to(g_ptr.dtype.element_ty), mask=i < size)


# ---------------------------------------------------------------------------------------------------------------------
# the launchers

FLAT_CONFIGS = (FlatConfig(1024, 4), FlatConfig(2048, 4), FlatConfig(2048, 8), FlatConfig(4096, 8))
FLAT_DEFAULT = FlatConfig(2048, 8)
FORWARD_CONFIGS = matmul.CONFIGS
BACKWARD_CONFIGS = (  # post comes through shared memory too, so that pieces are smaller or stages fewer
    MatmulConfig(128, 256, 64, 8, 3, 8, 2),
    MatmulConfig(128, 256, 64, 8, 3, 8, 4),
    MatmulConfig(128, 256, 64, 8, 4, 8, 4),
    MatmulConfig(256, 128, 64, 8, 4, 8, 4),
    MatmulConfig(128, 128, 64, 8, 4, 8, 2),
    MatmulConfig(128, 128, 64, 8, 3, 8, 4, 2),
)
FORWARD_DEFAULT, BACKWARD_DEFAULT = matmul.DEFAULT, BACKWARD_CONFIGS[0]


def widths(C: int, H: int) -> str:
    """What configurations and the choice of a way are looked up by."""
    return f"{C}x{H}"


def _movable(x: Tensor) -> Tensor:
    """x, or a copy of it if TMA cannot move its rows: an expanded gradient, a transposed weight."""
    return x if tma_refusal(x=x) is None else x.clone(memory_format=torch.contiguous_format)


def launch_forward(x: Tensor, w_fc: Tensor, config: MatmulConfig | None = None) -> Tensor:
    """post (N, H) of x (N, C) and w_fc (H, C): the fused matmul."""
    x, w_fc = _movable(x), _movable(w_fc)
    key = widths(x.size(1), w_fc.size(0))
    config = config or tuned_config("relu2_matmul", key, FORWARD_CONFIGS, x.device) or FORWARD_DEFAULT
    return matmul.launch(x, w_fc, hook=relu2_hook, config=config)


def launch_backward(g: Tensor, w_proj: Tensor, post: Tensor, config: MatmulConfig | None = None) -> Tensor:
    """dpre (N, H) of g (N, C), w_proj (C, H) and post (N, H): the fused matmul."""
    g, w_proj = _movable(g), _movable(w_proj)
    key = widths(*w_proj.shape)
    config = config or tuned_config("relu2_gradient_matmul", key, BACKWARD_CONFIGS, g.device) or BACKWARD_DEFAULT
    return matmul.launch(g, w_proj, hook=relu2_gradient_hook, aux=post, b_is_kn=True, config=config)


def launch_relu2(x: Tensor, config: FlatConfig | None = None) -> Tensor:
    """relu(x)^2 over x, which is dense."""
    block, warps = config or tuned_config("relu2_in_place", "", FLAT_CONFIGS, x.device) or FLAT_DEFAULT
    if x.numel():
        with device_of(x):
            relu2_in_place[(-(-x.numel() // block),)](
                x,
                x.numel(),
                BLOCK=block,
                WIDE=triton_dtype(wide_dtype(x.dtype)),
                num_warps=warps,
                enable_fp_fusion=True,
            )
    return x


def launch_gradient(g: Tensor, post: Tensor, config: FlatConfig | None = None) -> Tensor:
    """2 g sqrt(post) over g, both dense, where post is the square of a rounded relu."""
    block, warps = config or tuned_config("relu2_gradient_in_place", "", FLAT_CONFIGS, g.device) or FLAT_DEFAULT
    if g.numel():
        with device_of(g):
            relu2_gradient_in_place[(-(-g.numel() // block),)](
                g, post, g.numel(), BLOCK=block, WIDE=triton_dtype(wide_dtype(g.dtype)),
                num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    return g


def way_of(tokens: int, C: int, H: int, dtype: torch.dtype, device: torch.device, asked: str = "") -> str:
    """How the op is computed at these sizes, the same forward and backward: as asked, or as was measured, if it can."""
    if tokens == 0 or (not asked and tokens < FEWEST_TOKENS):
        return "elementwise"
    if (asked or tuned_choice("relu2_mlp", widths(C, H), WAYS, device, dtype)) == "elementwise":
        return "elementwise"
    if dtype.itemsize != 2 and not INTERPRETING:
        return "elementwise"  # float32, for which there is no wgmma but in TF32
    if why := fused_refusal(C, H, dtype):
        backend.say_fallback("relu2_mlp", why, "cuBLAS and an elementwise kernel run")
        return "elementwise"
    return "fused"


def fused_refusal(C: int, H: int, dtype: torch.dtype) -> str | None:
    """Why TMA cannot move matrices of these widths, or None."""
    sixteen = 16 // dtype.itemsize
    if C % sixteen or H % sixteen or not C or not H:
        return f"the fused matmul takes widths that are multiples of {sixteen} in {dtype}, not {C} and {H}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# the registration: opaque ops on (N, C); `way` is one of WAYS, or "" for what was measured


@torch.library.custom_op("vibechat::relu2_mlp", mutates_args=())
def _relu2_mlp(x: Tensor, w_fc: Tensor, w_proj: Tensor, way: str) -> tuple[Tensor, Tensor]:
    w_fc, w_proj = w_fc.to(x.dtype), w_proj.to(x.dtype)
    way = way_of(x.size(0), x.size(1), w_fc.size(0), x.dtype, x.device, way)
    post = launch_forward(x, w_fc) if way == "fused" else launch_relu2(torch.mm(x, w_fc.T))
    return torch.mm(post, w_proj.T), post


@torch.library.custom_op("vibechat::relu2_mlp_backward", mutates_args=())
def _relu2_mlp_backward(g: Tensor, w_proj: Tensor, post: Tensor, way: str) -> Tensor:
    way = way_of(g.size(0), g.size(1), post.size(1), g.dtype, g.device, way)
    return launch_backward(g, w_proj, post) if way == "fused" else launch_gradient(torch.mm(g, w_proj), post)


@_relu2_mlp.register_fake
def _(x: Tensor, w_fc: Tensor, w_proj: Tensor, way: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.size(0), w_proj.size(0)), x.new_empty(x.size(0), w_fc.size(0))


@_relu2_mlp_backward.register_fake
def _(g: Tensor, w_proj: Tensor, post: Tensor, way: str) -> Tensor:
    return g.new_empty(post.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w_fc, w_proj, ctx.way = inputs
    ctx.save_for_backward(x, w_fc, w_proj, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, w_fc, w_proj, post = ctx.saved_tensors
    of_x, of_fc, of_proj, _ = ctx.needs_input_grad
    dw_proj = _weight_gradient(g, post, w_proj.dtype) if of_proj else None
    if not (of_x or of_fc):
        return None, None, dw_proj, None
    dpre = _relu2_mlp_backward(g, w_proj.to(g.dtype), post, ctx.way)
    dx = dpre @ w_fc.to(g.dtype) if of_x else None
    return dx, _weight_gradient(dpre, x, w_fc.dtype) if of_fc else None, dw_proj, None


def _weight_gradient(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left^T right: for float32 masters as cuBLAS accumulated it, without a rounding to the operands' dtype."""
    if dtype == torch.float32 and left.dtype.itemsize == 2 and left.is_cuda and torch.version.hip is None:
        return torch.mm(left.T, right, out_dtype=dtype)
    return torch.mm(left.T, right).to(dtype)


def _flops(x: torch.Size, w_fc: torch.Size, w_proj: torch.Size, way: str) -> int:
    return 2 * x[0] * (w_fc.numel() + w_proj.numel())


_relu2_mlp.register_autograd(_differentiate, setup_context=_save)
backend.count_flops(torch.ops.vibechat.relu2_mlp, _flops)
backend.count_flops(
    torch.ops.vibechat.relu2_mlp_backward, lambda g, w_proj, post, way: 2 * g[0] * w_proj[0] * w_proj[1]
)
backend.triton_refusals["relu2_mlp"] = backend.hardware_refusal

# ---------------------------------------------------------------------------------------------------------------------
# the public face


def relu2_mlp(x: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
    """relu(x w_fc^T)^2 w_proj^T, keeping x and the squared activation for the backward.

    Args:
        x: (..., C), any float dtype, any strides; the products run in it.
        w_fc: (H, C), x's dtype or float32 masters, whose gradient is then float32 too.
        w_proj: (C, H), likewise.

    Returns:
        (..., C) in x's dtype.
    """
    if backend.takes_kernel("relu2_mlp", x):
        return with_kernels(x, w_fc, w_proj)
    return _KeepTheSquare.apply(x, w_fc.to(x.dtype), w_proj.to(x.dtype))


def with_kernels(x: Tensor, w_fc: Tensor, w_proj: Tensor, way: str = "") -> Tensor:
    """The op by its kernels, in one of WAYS or the one that was measured to be the fastest."""
    return _relu2_mlp(_rows(x), w_fc, w_proj, way)[0].view(*x.shape[:-1], w_proj.size(0))
