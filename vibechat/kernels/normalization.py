"""Division of each matrix of a stack by its Frobenius norm, with Muon's momentum stepped on the way.

    m <- m + (1 - mu) (g - m),   u = g + mu (m - g)  (Nesterov; else u = m),   x = u / (1.01 |u|_F)

The norm is taken of u over its largest element, so that no square leaves the range of float32 at any scale, and zero
stays zero. The kernels need two walks, since x can be written only when the norm is known: one steps m and leaves, of
each block of BLOCK elements, the largest |u| and the sum of squares over it; the other reads g and m again, adds the
sums up in a fixed order and writes x, transposed if its strides say so. All matrices of a shape go together: those of
a stack, and gradients by a table of their addresses.

Bytes of an element: 12 + 10 with gradients and momentum in float32 and x in 16 bits; of a plain stack b + b + 2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vibechat.kernels.language import device_of, power_of_two, tl, triton
from vibechat.kernels.tuning import FlatConfig, tuned_config


class TileConfig(NamedTuple):
    """How an elementwise kernel that may have to transpose is launched."""

    tile: int
    """rows and columns of a program"""
    warps: int
    """of a program"""


PARTS = 128  # of a matrix, each measured by one program: enough to fill a GPU, few enough to be read by every tile
FLAT_CONFIGS = (FlatConfig(4096, 8), FlatConfig(2048, 4))  # what bench.tune tries; the first where nobody measured
TILE_CONFIGS = (TileConfig(64, 8), TileConfig(64, 4), TileConfig(32, 4))


def normalized(g: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Each matrix of g (..., m, n) over 1.01 times its Frobenius norm, in `dtype` (None: g's); zero stays zero.

    Computed in float32, or wider for wider g, of the matrix over its largest element, so that no square leaves the
    range of float32 whatever the scale.
    """
    tiny = torch.finfo(torch.float32).tiny
    x = g.to(torch.promote_types(g.dtype, torch.float32))
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    norm = torch.linalg.vector_norm(x.flatten(-2), dim=-1)[..., None, None]
    return x.mul_((1.01 * norm).clamp_min(tiny).reciprocal_()).to(dtype or g.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# the kernels

if triton is not None:

    @triton.jit
    def _looked_ahead(g, m, mu, NESTEROV: tl.constexpr):  # type: ignore[no-untyped-def]
        return g + mu * (m - g) if NESTEROV else m

    @triton.jit
    def muon_measure(  # type: ignore[no-untyped-def]
        gradients, momentum_ptr, found_inf_ptr, peak_ptr, square_ptr, size, mu,
        NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Step m, if there are gradients; peak = max |u| and square = sum (u / peak)^2 of a part of a matrix."""
        matrix, part, parts = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
        m_ptr = momentum_ptr + matrix.to(tl.int64) * size
        peak, square = 0.0, 0.0
        for block in tl.range(part, tl.cdiv(size, BLOCK), parts):
            at = block * BLOCK + tl.arange(0, BLOCK)
            inside = at < size
            u = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if gradients is not None:
                g_ptr = tl.multiple_of(tl.load(gradients + matrix).to(tl.pointer_type(tl.float32)), 16)
                g = tl.load(g_ptr + at, mask=inside, other=0.0)
                if found_inf_ptr is not None:
                    g = tl.where(tl.load(found_inf_ptr) > 0, u, g)  # a step towards itself changes nothing
                m = u + (1 - mu) * (g - u)
                tl.store(m_ptr + at, m, mask=inside)
                u = _looked_ahead(g, m, mu, NESTEROV)
            before = peak
            peak = tl.maximum(peak, tl.max(tl.abs(u), 0))
            scale = tl.maximum(peak, 1.1754944e-38)
            share, scaled = before / scale, u / scale
            square = square * share * share + tl.sum(scaled * scaled, 0)
        tl.store(peak_ptr + matrix * parts + part, peak)
        tl.store(square_ptr + matrix * parts + part, square)

    @triton.jit
    def muon_normalize(  # type: ignore[no-untyped-def]
        gradients, momentum_ptr, found_inf_ptr, peak_ptr, square_ptr, x_ptr, rows, columns, parts, mu, x_row, x_column,
        NESTEROV: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """x = u / (1.01 |u|_F), into any strides."""
        matrix = tl.program_id(2)
        p = tl.arange(0, PARTS)
        peaks = tl.load(peak_ptr + matrix * parts + p, mask=p < parts, other=0.0)
        squares = tl.load(square_ptr + matrix * parts + p, mask=p < parts, other=0.0)
        peak = tl.maximum(tl.max(peaks, 0), 1.1754944e-38)
        share = peaks / peak
        norm = 1.01 * tl.sqrt(tl.sum(squares * share * share, 0))
        row = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
        column = (tl.program_id(0) * TILE + tl.arange(0, TILE))[None, :]
        inside = (row < rows) & (column < columns)
        at = row * columns + column
        base = matrix.to(tl.int64) * rows * columns
        u = tl.load(momentum_ptr + base + at, mask=inside, other=0.0).to(tl.float32)
        if NESTEROV:
            g_ptr = tl.multiple_of(tl.load(gradients + matrix).to(tl.pointer_type(tl.float32)), 16)
            g = tl.load(g_ptr + at, mask=inside, other=0.0)
            if found_inf_ptr is not None:
                g = tl.where(tl.load(found_inf_ptr) > 0, u, g)
            u = _looked_ahead(g, u, mu, NESTEROV)
        u = u / peak / tl.maximum(norm, 1.1754944e-38)
        tl.store(x_ptr + base + row * x_row + column * x_column, u.to(x_ptr.dtype.element_ty), mask=inside)


def addresses(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The addresses of matrices, (count,) in int64."""
    table = torch.tensor([x.data_ptr() for x in tensors], dtype=torch.int64)
    if device.type == "cuda":
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)


class Measured(NamedTuple):
    """Of each part of each matrix, (count, parts) in float32."""

    peaks: Tensor
    """the largest |u|"""
    squares: Tensor
    """the sum of (u / peak)^2"""


class Momentum(NamedTuple):
    """What steps a stack of momenta before it is normalized."""

    gradients: Tensor
    """the `addresses` of count matrices (m, n), contiguous, in float32, which whoever made this keeps alive"""
    mu: float
    """the momentum's decay"""
    nesterov: bool
    """look ahead by one step"""
    found_inf: Tensor | None = None
    """0-d; where it is not zero, the momentum stays as it is"""


NO_MOMENTUM = None, 0.0, False, None


def launch_measure(stack: Tensor, momentum: Momentum | None = None, config: FlatConfig | None = None) -> Measured:
    """The first walk, over a contiguous stack (count, m, n): in float32 with momentum, which is stepped in place."""
    (count, rows, columns), device = stack.shape, stack.device
    block, warps = config or tuned_config("muon_measure", "", FLAT_CONFIGS, device) or FLAT_CONFIGS[0]
    parts = min(PARTS, -(-rows * columns // block))
    measured = Measured(*(torch.empty((count, parts), dtype=torch.float32, device=device) for _ in range(2)))
    gradients, mu, nesterov, found_inf = momentum or NO_MOMENTUM
    with device_of(stack):
        muon_measure[(parts, count)](
            gradients, stack, found_inf, *measured, rows * columns, mu,
            NESTEROV=nesterov, BLOCK=block, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return measured


def launch_normalize(
    stack: Tensor, x: Tensor, measured: Measured, momentum: Momentum | None = None, config: TileConfig | None = None
) -> None:
    """The second walk: fill x (count, m, n), any dtype, one of whose last two strides is 1, its matrices m n apart."""
    (count, rows, columns), parts = stack.shape, measured.peaks.size(1)
    tile, warps = tile_config("muon_normalize", x, config)
    gradients, mu, nesterov, found_inf = momentum or NO_MOMENTUM
    with device_of(stack):
        muon_normalize[(-(-columns // tile), -(-rows // tile), count)](
            gradients, stack, found_inf, *measured, x, rows, columns, parts, mu, *x.stride()[1:],
            NESTEROV=nesterov, TILE=tile, PARTS=power_of_two(parts), num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip


def launch(stack: Tensor, x: Tensor, momentum: Momentum | None = None) -> None:
    """Both walks: x becomes the normalized stack, after the momentum's step if there is one."""
    launch_normalize(stack, x, launch_measure(stack, momentum), momentum)


def tile_config(kernel: str, x: Tensor, config: TileConfig | None = None) -> TileConfig:
    """The given configuration, the measured one or the default, of a kernel that reads or writes x of any strides."""
    key = "straight" if x.stride(-1) == 1 else "transposed"
    return config or tuned_config(kernel, key, TILE_CONFIGS, x.device) or TILE_CONFIGS[0]
