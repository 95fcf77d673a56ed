"""The elementwise halves of Muon: what stands before the orthogonalization, and what comes after it.

    momentum    m <- m + (1 - mu) (g - m),   u = g + mu (m - g)  (Nesterov; else u = m),   x = u / (1.01 |u|_F)
    update      w <- w - lr o - decay w [o w > 0]                      (o: the orthogonalized x, [.] 1 if true, else 0)

The decay is cautious: it moves a weight only where the update moves it towards zero too. With a second moment, o is
replaced by its rows over their running root mean square (NorMuon), times one number that keeps |o|_F:

    v <- v + (1 - beta) (mean over a row of o^2 - v),   o_i <- o_i / sqrt(v_i),   o <- o |o before|_F / |o|_F

On a CPU a parameter's operations run one after the other while it is in the cache. On a GPU there are kernels, each for
all parameters of a shape at once: those of `normalization` before, and one after, which moves 10 bytes a parameter (o
in 16 bits, w twice), with 2 more before it for the rows of NorMuon. Everything is deterministic.
Sources: Jordan et al. 2024, "Muon"; Li et al. 2025, "NorMuon", arXiv 2510.05491; Chen et al. 2025, "Cautious Weight
Decay", arXiv 2510.12402.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vibechat.kernels import backend
from vibechat.kernels.language import device_of, tl, triton
from vibechat.kernels.normalization import Momentum, TileConfig, addresses, normalized, tile_config
from vibechat.kernels.normalization import launch as launch_normalization

# ---------------------------------------------------------------------------------------------------------------------
# the kernels

if triton is not None:

    @triton.jit
    def muon_update(  # type: ignore[no-untyped-def]
        weights, o_ptr, row_scale_ptr, found_inf_ptr, rows, columns, lr, decay, o_row, o_column,
        DECAY: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        """w <- w - lr o - decay w [o w > 0]."""
        matrix = tl.program_id(2)
        row = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
        column = (tl.program_id(0) * TILE + tl.arange(0, TILE))[None, :]
        inside = (row < rows) & (column < columns)
        if found_inf_ptr is not None:  # nothing is inside; a scalar mask would not do in every Triton
            inside = inside & (row + tl.load(found_inf_ptr).to(tl.int32) * rows < rows)
        w_ptr = tl.multiple_of(tl.load(weights + matrix).to(tl.pointer_type(tl.float32)), 16)
        w = tl.load(w_ptr + row * columns + column, mask=inside, other=0.0)
        base = matrix.to(tl.int64) * rows * columns
        o = tl.load(o_ptr + base + row * o_row + column * o_column, mask=inside, other=0.0).to(tl.float32)
        if row_scale_ptr is not None:
            o *= tl.load(row_scale_ptr + matrix * rows + row, mask=row < rows, other=0.0)
        step = lr * o
        if DECAY:
            step += tl.where(o * w > 0, decay * w, 0.0)
        tl.store(w_ptr + row * columns + column, w - step, mask=inside)


def _takes_kernels(tensors: Sequence[Tensor], stack: Tensor) -> bool:
    if not backend.takes_kernel("newton_schulz", stack):
        return False
    if all(x.dtype == torch.float32 and x.is_contiguous() and x.data_ptr() % 16 == 0 for x in tensors):
        return stack[0].numel() < 2**31
    backend.say_fallback("newton_schulz", "Muon's kernels take contiguous float32 parameters and gradients")
    return False


def launch_update(
    params: Sequence[Tensor],
    ortho: Tensor,
    lr: float,
    decay: float,
    row_scale: Tensor | None,
    found_inf: Tensor | None,
    config: TileConfig | None = None,
) -> None:
    """Step the parameters by ortho (count, rows, cols), of which one of the last two strides is 1."""
    count, rows, cols = ortho.shape
    tile, warps = tile_config("muon_update", ortho, config)
    with device_of(ortho):
        muon_update[(-(-cols // tile), -(-rows // tile), count)](
            addresses(params, ortho.device), ortho, row_scale, found_inf, rows, cols, lr, decay, *ortho.stride()[1:],
            DECAY=decay != 0, TILE=tile, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# the public face


def momentum_pass(
    gradients: Sequence[Tensor],
    momentum: Tensor,
    mu: float,
    nesterov: bool,
    dtype: torch.dtype,
    found_inf: Tensor | None = None,
) -> Tensor:
    """Step the momentum, and make of it what is to be orthogonalized.

    On a CPU one parameter after the other is as fast as a fused pass (1.2 ms for 3.1 million parameters on two cores;
    Inductor's takes 1.3, after 38 s of compiling).

    Args:
        gradients: count matrices (m, n).
        momentum: (count, m, n) in float32, stepped in place.
        mu: the momentum's decay.
        nesterov: look ahead by one step.
        dtype: of the result.
        found_inf: 0-d; where it is not zero the momentum stays as it is.

    Returns:
        (count, m, n) in `dtype`, `normalized`; where kernels run, a tall stack is the transpose of a contiguous one,
        which is what the orthogonalization wants.
    """
    x = torch.empty(momentum.shape, dtype=dtype, device=momentum.device)
    if _takes_kernels(gradients, x):
        if momentum.size(-2) > momentum.size(-1):
            x = x.view(*x.mT.shape).mT
        launch_normalization(momentum, x, Momentum(addresses(gradients, x.device), mu, nesterov, found_inf))
        return x
    for g, m, out in zip(gradients, momentum, x, strict=True):
        if found_inf is not None:
            g = torch.where(found_inf > 0, m, g)  # a lerp towards itself changes nothing
        m.lerp_(g, 1 - mu)
        out.copy_(normalized(g.lerp(m, mu) if nesterov else m))
    return x


def update_pass(
    params: Sequence[Tensor],
    ortho: Tensor,
    lr: float,
    decay: float = 0.0,
    second_moment: Tensor | None = None,
    beta: float = 0.95,
    found_inf: Tensor | None = None,
) -> None:
    """Step the parameters in place.

    Args:
        params: count matrices (m, n).
        ortho: (count, m, n), orthogonalized; any strides.
        lr: the step's length.
        decay: share of a weight that a step takes away where the update agrees.
        second_moment: (count, m, 1) in float32, stepped in place; None for the plain update.
        beta: its decay.
        found_inf: 0-d; where it is not zero nothing changes.
    """
    row_scale = None
    if second_moment is not None:
        row_scale = _row_scale(ortho, second_moment, beta, found_inf)
    if _takes_kernels(params, ortho):
        launch_update(params, ortho, lr, decay, row_scale, found_inf)
        return
    if row_scale is not None:
        ortho = ortho.float() * row_scale
    keep = None if found_inf is None else 1 - found_inf.clamp(max=1)
    if keep is not None:
        ortho = ortho * keep
    if decay:
        for p, o in zip(params, ortho, strict=True):
            agree = (p * o > 0).to(p.dtype)  # nowhere, if nothing is to change
            p.addcmul_(p, agree, value=-decay)
    torch._foreach_add_(list(params), list(ortho.unbind()), alpha=-lr)


def _row_scale(ortho: Tensor, second_moment: Tensor, beta: float, found_inf: Tensor | None) -> Tensor:
    """What NorMuon multiplies each row by, (count, m, 1) in float32; steps the second moment."""
    size = torch.linalg.vector_norm(ortho, dim=-1, keepdim=True, dtype=torch.float32)  # (count, m, 1)
    square = size.square_().div_(ortho.size(-1))
    towards = square if found_inf is None else torch.where(found_inf > 0, second_moment, square)
    second_moment.lerp_(towards, 1 - beta)
    inverse = second_moment.clamp_min(1e-10).rsqrt()
    norm, scaled = square.sum(-2, keepdim=True), (square * inverse.square()).sum(-2, keepdim=True)
    return inverse * (norm / scaled.clamp_min(1e-30)).sqrt()
