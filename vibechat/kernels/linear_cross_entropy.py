"""Softcapped cross-entropy of a linear head, without ever holding all the logits.

    u = x w^T,   z = c tanh(u / c),   lse = log sum_j exp(z_j),   loss = lse - z_y + lambda lse^2
    dloss / du_j = (k exp(z_j - lse) - [j = y]) (1 - (z_j / c)^2)   with k = 1 + 2 lambda lse

Rows go in chunks of three matmuls each (u = x w^T; dx = du w; dw += du^T x), all done in the forward, so that nothing
of size rows x vocabulary outlives its chunk. FLOPs for N rows, D channels and V words: 6 N D V, with no recomputation.
As z <= c, exp(z - c) cannot overflow and needs no row maximum: a chunk is swept once for the sums and once for du.
On a CPU, without a compiler, `linear_cross_entropy_eager` does it in place; on a GPU there are kernels
(`linear_cross_entropy_ops`).
Without a softcap, or with one so wide that exp(-2 c) leaves float32 (c > 40), a sweep for the maxima comes before.
Where the weights of the rows are not known before the backward (`reduction="none"`), the backward computes the logits
again: 8 N D V.
Sources: chunks with gradients in the forward, Hsu et al. 2024, "Liger Kernel", arXiv 2410.10989; z-loss, Chowdhery et
al. 2022, "PaLM", arXiv 2204.02311.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vibechat.kernels import backend
from vibechat.kernels.linear_cross_entropy_eager import EagerChunks
from vibechat.kernels.linear_cross_entropy_ops import WAYS, rows_op, train_op
from vibechat.kernels.linear_cross_entropy_triton import WIDEST_OFFSET_FREE_SOFTCAP

LOG2_E = 1.4426950408889634
CPU_CHUNK_BYTES = {
    True: 16 * 2**20,
    False: 8 * 2**20,
}  # compiled and eager: what ran fastest; a laptop's peak stays low
FEWEST_ROWS = 256  # below this a matmul no longer runs at speed


def reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = 15.0,
    ignore_index: int = -1,
    z_loss: float = 0.0,
) -> Tensor:
    """The definition: the loss of each row, (N,), zero where ignored. Holds every logit, in float32 or wider."""
    z = F.linear(x, weight.to(x.dtype)).to(torch.promote_types(x.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(z, targets, ignore_index=ignore_index, reduction="none")
    if z_loss:
        loss = loss + torch.where(targets == ignore_index, 0.0, z_loss * z.logsumexp(-1).square())
    return loss


class _Loss(NamedTuple):
    """The loss's settings, the same for every chunk, and what one chunk of raw logits gives under them.

    Exponentials are written as exp2: Inductor's CPU backend keeps a reused exp in memory, in float32, and recomputes a
    reused exp2 in registers, which makes one pass over the logits out of three.
    """

    softcap: float | None
    ignore_index: int
    z_loss: float

    def cap(self, u: Tensor) -> tuple[Tensor, Tensor | float]:
        """Capped logits z of raw logits u, in float32 or wider, and dz / du = 1 - t^2, with t = 1 - 2 r."""
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        if self.softcap is None:
            return u, 1.0
        r = 1 / (torch.exp2(u * (2 * LOG2_E / self.softcap)) + 1)  # half the time of the vectorized tanh
        return self.softcap * (1 - 2 * r), 4 * r * (1 - r)

    def offset(self, u: Tensor) -> Tensor | float:
        """What to subtract before exponentiating: the cap where exp(z - cap) keeps its range, else row maxima."""
        if self.softcap is not None and self.softcap <= WIDEST_OFFSET_FREE_SOFTCAP and u.dtype != torch.float16:
            return self.softcap
        return self.cap(u)[0].amax(-1, keepdim=True)

    def rows(self, u: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """Of raw logits u (R, V) and targets (R,): the loss (R,), S (R, 1) and the offset that S was taken with."""
        offset = self.offset(u)
        total = torch.exp2((self.cap(u)[0] - offset) * LOG2_E).sum(-1, keepdim=True)
        lse = (total.log() + offset).squeeze(-1)
        ignored = targets == self.ignore_index
        z_target, _ = self.cap(u.gather(-1, targets.masked_fill(ignored, 0).unsqueeze(-1)))
        loss = lse - z_target.squeeze(-1)
        if self.z_loss:
            loss = loss + self.z_loss * lse.square()
        return loss.masked_fill(ignored, 0.0), total, offset

    def gradients(
        self, x: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted loss of one chunk, summed, and its gradients.

        Args:
            x: (R, D).
            weight: (V, D) in x's dtype.
            targets: (R,).
            row_weights: (R,), what the loss of each row is multiplied by.

        Returns:
            loss (), dx (R, D) and dw (V, D), the gradients in x's dtype.
        """
        u = x @ weight.T  # (R, V)
        loss, total, offset = self.rows(u, targets)
        k = 1 + 2 * self.z_loss * (total.log() + offset)  # (R, 1)
        z, slope = self.cap(u)
        hit = torch.arange(u.size(1), device=u.device) == targets.unsqueeze(-1)  # (R, V)
        du = (torch.exp2((z - offset) * LOG2_E) * (k / total) - hit.to(z.dtype)) * slope
        scale = row_weights.unsqueeze(-1).masked_fill(targets.unsqueeze(-1) == self.ignore_index, 0.0)  # (R, 1)
        du = (du * scale).to(x.dtype)
        return (loss * row_weights).sum(), du @ weight, du.T @ x


def _compiling() -> bool:
    """Whether Inductor will fuse these operators; without it, `EagerChunks` computes the same in fewer passes."""
    return torch.compiler.is_compiling()


class _GradientsInForward(torch.autograd.Function):
    """Weighted sum of the losses, with both gradients made while each chunk's logits are there."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, loss: _Loss, rows: int
    ) -> Tensor:
        total, dx, dw = _all_gradients(x, weight, targets, row_weights, loss, rows)
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        return (dx * grad).to(dx.dtype), dw * grad, None, None, None, None


class _GradientsInBackward(torch.autograd.Function):
    """The loss of each row; its weights come with the backward, which computes the logits again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, loss: _Loss, rows: int) -> Tensor:
        ctx.save_for_backward(x, weight, targets)
        ctx.loss, ctx.rows = loss, rows
        return _all_losses(x, weight, targets, loss, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, targets = ctx.saved_tensors
        _, dx, dw = _all_gradients(x, weight, targets, grad, ctx.loss, ctx.rows)
        return dx, dw, None, None, None


def _all_losses(x: Tensor, weight: Tensor, targets: Tensor, loss: _Loss, rows: int) -> Tensor:
    """(N,) losses, a chunk of rows at a time."""
    w = weight.to(x.dtype)
    if not _compiling():
        eager = EagerChunks(x, w, rows, *loss)
        parts = zip(x.split(rows), targets.split(rows), strict=True)
        return torch.cat([eager.losses(xs, ts) for xs, ts in parts])
    return torch.cat([loss.rows(xs @ w.T, ts)[0] for xs, ts in zip(x.split(rows), targets.split(rows), strict=True)])


def _all_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, loss: _Loss, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss (), dx (N, D) in x's dtype and dw (V, D) in weight's, summed over chunks in float32 or wider."""
    w = weight.to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    total, dx, dw = torch.zeros((), dtype=wide, device=x.device), [], None
    chunks = zip(x.split(rows), targets.split(rows), row_weights.to(wide).split(rows), strict=True)
    if not _compiling():
        eager = EagerChunks(x, w, rows, *loss)
        whole_dx, whole_dw = torch.empty_like(x), torch.zeros(w.shape, dtype=wide, device=x.device)
        for (x_rows, target_rows, weights), dx_rows in zip(chunks, whole_dx.split(rows), strict=True):
            total = total + eager.gradients(x_rows, target_rows, weights, dx_rows, whole_dw)
        return total, whole_dx, whole_dw.to(weight.dtype)
    for x_rows, target_rows, weights in chunks:
        chunk_total, chunk_dx, chunk_dw = loss.gradients(x_rows, w, target_rows, weights)
        total = total + chunk_total
        dx.append(chunk_dx)
        dw = chunk_dw.to(wide) if dw is None else dw + chunk_dw
    assert dw is not None
    return total, torch.cat(dx), dw.to(weight.dtype)


def rows_per_chunk(rows: int, vocab: int, itemsize: int, workspace_bytes: int) -> int:
    """How many rows' logits fit the workspace: even shares of `rows`, a multiple of 64, never below FEWEST_ROWS."""
    most = max(FEWEST_ROWS, workspace_bytes // (vocab * itemsize))
    chunks = max(1, -(-rows // most))
    return -(-rows // (64 * chunks)) * 64


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = 15.0,
    ignore_index: int = -1,
    z_loss: float = 0.0,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    workspace_mb: int = 512,
    way: str = "",
) -> Tensor:
    """Cross-entropy of softcap(x weight^T) against targets, a chunk of rows at a time.

    Args:
        x: (..., D), any float dtype; the matmuls run in it.
        weight: (V, D), x's dtype or wider (fp32 masters).
        targets: (...), int64 in [0, V) or ignore_index.
        softcap: logits are capped to (-softcap, softcap); None leaves them as they are.
        ignore_index: a target that contributes neither loss nor gradient nor count.
        z_loss: lambda of lambda lse^2, added to each row's loss.
        reduction: "mean" over what is not ignored (weighted mean under token_weights), "sum", or "none".
        token_weights: (...), multiplies each row's loss; no gradient flows into it.
        workspace_mb: MiB that one chunk's logits may take (a CPU takes 16 at most).
        way: of the kernel: "cublas", "fused" (where it can), or "", which is what measured faster on this device.

    Returns:
        () in float32 or wider, or (...) for "none". Zero, with zero gradients, if every target is ignored.

    Raises:
        ValueError: for an unknown reduction or way, or shapes that do not fit.
    """
    if way not in ("", *WAYS):
        raise ValueError(f"linear_cross_entropy: way {way!r} must be one of {', '.join(WAYS)}, or empty")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: reduction {reduction!r} must be mean, sum or none")
    if x.shape[:-1] != targets.shape or x.size(-1) != weight.size(-1):
        raise ValueError(
            f"linear_cross_entropy: x {tuple(x.shape)}, weight {tuple(weight.shape)} and targets "
            f"{tuple(targets.shape)} must be (..., D), (V, D) and (...)"
        )
    flat_x, flat_targets = x.reshape(-1, x.size(-1)), targets.reshape(-1)
    loss = _Loss(softcap, ignore_index, z_loss)
    workspace = workspace_mb * 2**20
    if x.device.type == "cpu":
        workspace = min(workspace, CPU_CHUNK_BYTES[_compiling()])
    rows = rows_per_chunk(flat_x.size(0), weight.size(0), x.element_size(), workspace)
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    with_kernel = backend.takes_kernel("linear_cross_entropy", x)

    def all_losses() -> Tensor:
        if with_kernel:
            return rows_op(flat_x, weight, flat_targets, *loss, rows, way)[0]
        arguments = (flat_x, weight, flat_targets, loss, rows)
        return _GradientsInBackward.apply(*arguments) if wants_gradient else _all_losses(*arguments)

    if reduction == "none":
        losses = all_losses()
        return (losses if token_weights is None else losses * token_weights.detach().reshape(-1)).view(targets.shape)

    valid = (flat_targets != ignore_index).to(torch.promote_types(x.dtype, torch.float32))
    row_weights = valid if token_weights is None else valid * token_weights.detach().reshape(-1)
    if reduction == "mean":
        count = row_weights.sum()
        row_weights = row_weights / torch.where(count == 0, 1.0, count)
    if not wants_gradient:
        return (all_losses() * row_weights).sum()
    if with_kernel:
        return train_op(flat_x, weight, flat_targets, row_weights, *loss, rows, way)[0]
    return _GradientsInForward.apply(flat_x, weight, flat_targets, row_weights, loss, rows)
