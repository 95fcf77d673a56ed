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

import torch
from torch import Tensor

from vibechat.kernels.language import device_of, power_of_two, tl, triton

BLOCK = 4096  # elements of a program that measures
TILE = 64  # rows and columns of a program that may have to transpose


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
        """Step m, if there are gradients; peak = max |u| and square = sum (u / peak)^2 of a block of a matrix."""
        matrix, part = tl.program_id(1), tl.program_id(0)
        at = part * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        m_ptr = momentum_ptr + matrix.to(tl.int64) * size
        u = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if gradients is not None:
            g_ptr = tl.multiple_of(tl.load(gradients + matrix).to(tl.pointer_type(tl.float32)), 16)
            g = tl.load(g_ptr + at, mask=inside, other=0.0)
            if found_inf_ptr is not None:
                g = tl.where(tl.load(found_inf_ptr) > 0, u, g)  # a step towards itself changes nothing
            m = u + (1 - mu) * (g - u)
            tl.store(m_ptr + at, m, mask=inside)
            u = _looked_ahead(g, m, mu, NESTEROV)
        peak = tl.max(tl.abs(u), 0)
        scaled = u / tl.maximum(peak, 1.1754944e-38)
        tl.store(peak_ptr + matrix * tl.num_programs(0) + part, peak)
        tl.store(square_ptr + matrix * tl.num_programs(0) + part, tl.sum(scaled * scaled, 0))

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


def launch(
    stack: Tensor,
    x: Tensor,
    *,
    gradients: Sequence[Tensor] | None = None,
    mu: float = 0.0,
    nesterov: bool = False,
    found_inf: Tensor | None = None,
) -> None:
    """Fill x (count, m, n), any dtype, one of whose last two strides is 1, from a contiguous stack of its shape.

    Args:
        stack: what is normalized; with gradients the momentum, in float32, stepped in place.
        x: the result; its stacks lie m n elements apart.
        gradients: count matrices (m, n), contiguous, in float32.
        mu: the momentum's decay.
        nesterov: look ahead by one step.
        found_inf: 0-d; where it is not zero, the momentum stays as it is.
    """
    count, rows, columns = stack.shape
    parts = -(-rows * columns // BLOCK)
    table = None if gradients is None else addresses(gradients, stack.device)
    peaks, squares = (torch.empty((count, parts), dtype=torch.float32, device=stack.device) for _ in range(2))
    with device_of(stack):
        muon_measure[(parts, count)](
            table, stack, found_inf, peaks, squares, rows * columns, mu,
            NESTEROV=nesterov, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
        muon_normalize[(-(-columns // TILE), -(-rows // TILE), count)](
            table, stack, found_inf, peaks, squares, x, rows, columns, parts, mu, *x.stride()[1:],
            NESTEROV=nesterov, TILE=TILE, PARTS=power_of_two(parts), num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
