"""linear_cross_entropy in plain PyTorch without a compiler: few passes, in place, in room that every chunk uses again.

The same numbers as the reference that Inductor fuses, from PyTorch's own vectorized operators, for one chunk of rows:

    t = tanh(u / c)   E = exp(c t)   F = E (1 - t^2)   du = v F, but in the target's column   dx = du w   dw += du^T x

A pass reads or writes float32, and the row scale v = k (row weight) / sum E is applied before du is rounded to x's
dtype. Without a softcap, or with one above 40, or in float16, E is taken relative to the row's maximum.
"""

import torch
from torch import Tensor

from vibechat.kernels.linear_cross_entropy_triton import is_bounded

tanh_backward = torch.ops.aten.tanh_backward.grad_input


class EagerChunks:
    """Room for a chunk, and what is done with it."""

    def __init__(self, x: Tensor, weight: Tensor, rows: int, softcap: float | None, ignore_index: int, z_loss: float):
        self.weight, self.ignore_index, self.z_loss, self.softcap = weight, ignore_index, z_loss, softcap
        self.bounded = is_bounded(softcap, x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        rows, V = min(rows, x.size(0)), weight.size(0)
        self.u = torch.empty(rows, V, dtype=x.dtype, device=x.device)
        self.t, self.e = (torch.empty(rows, V, dtype=wide, device=x.device) for _ in range(2))

    def sums(self, x: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Of x (R, D): the loss, k and sum E, each (R, 1); E and 1 - t^2 of the targets, (R, 1); t and E stay here."""
        rows = x.size(0)
        u, t, e = self.u[:rows], self.t[:rows], self.e[:rows]
        torch.mm(x, self.weight.T, out=u)
        t.copy_(u)
        z = t
        if self.softcap is not None:
            t.div_(self.softcap).tanh_()
            z = torch.mul(t, self.softcap, out=e)
        ignored = (targets == self.ignore_index).unsqueeze(-1)
        index = targets.unsqueeze(-1).masked_fill(ignored, 0)
        z_target, t_target = z.gather(-1, index), t.gather(-1, index)
        slope = torch.ones_like(t_target) if self.softcap is None else 1 - t_target.square()
        if self.bounded:
            e.exp_()
            offset = torch.zeros_like(z_target)
        else:
            offset = z.amax(-1, keepdim=True)
            torch.sub(z, offset, out=e).exp_()
        total = e.sum(-1, keepdim=True)
        lse = total.log() + offset
        loss = lse - z_target
        if self.z_loss:
            loss = loss + self.z_loss * lse.square()
        loss = loss.masked_fill(ignored, 0.0)
        return loss, 1 + 2 * self.z_loss * lse, total, (z_target - offset).exp(), slope, index, ignored

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """(R,)."""
        return self.sums(x, targets)[0].squeeze(-1)

    def gradients(self, x: Tensor, targets: Tensor, weights: Tensor, dx: Tensor, dw: Tensor) -> Tensor:
        """The weighted loss of x (R, D), summed; writes dx (R, D) and adds to dw (V, D), which is float32 or wider."""
        rows = x.size(0)
        loss, k, total, e_target, slope, index, ignored = self.sums(x, targets)
        du, t, e = self.u[:rows], self.t[:rows], self.e[:rows]
        weights = weights.unsqueeze(-1).masked_fill(ignored, 0.0)
        if self.softcap is not None:
            tanh_backward(e, t, grad_input=e)
        e.mul_(weights * k / total)
        e.scatter_(-1, index, (e_target * k / total - 1) * slope * weights)
        du.copy_(e)
        torch.mm(du, self.weight, out=dx)
        if du.dtype == dw.dtype:
            dw.addmm_(du.T, x)
        else:
            dw += du.T @ x
        return (loss * weights).sum()
