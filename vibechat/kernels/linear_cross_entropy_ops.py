"""The ops of linear_cross_entropy: chunks of rows, three matmuls each, and their registration with PyTorch.

A chunk's factor F and row scales v come from `linear_cross_entropy_triton` (logits by cuBLAS, one pass over them in
place) or from `linear_cross_entropy_matmul` (made in the epilogue of our own matmul); what follows is the same:

    dx = v (F w),    dw += F^T (v x)

Both products leave the matmuls in float32, so that dx is rounded once and dw is summed over the chunks unrounded.
There is one op for training, which returns the gradients with the loss, and one that returns the loss of each row: for
evaluation, and for `reduction="none"`, whose gradients a third op makes when their weights are known.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vibechat.kernels import backend
from vibechat.kernels.language import wide_dtype
from vibechat.kernels.linear_cross_entropy_matmul import launch_fused
from vibechat.kernels.linear_cross_entropy_matmul import refusal as fused_refusal
from vibechat.kernels.linear_cross_entropy_triton import HALF_UNIT, launch_again, launch_rows, padded
from vibechat.kernels.tuning import tuned_choice

WAYS = ("cublas", "fused")  # to make the factor; the first where nobody measured


def way_key(vocab: int, channels: int) -> str:
    """What the measured way is looked up by."""
    return f"{vocab}x{channels}"


@functools.cache
def _leaves_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matmuls of this dtype can return and accumulate float32 here."""
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(a.float(), a, a, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


def matmul_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out = a b, or out += a b, in out's dtype, which is a's or wider: nothing is rounded to a's dtype on the way,
    where PyTorch can do so."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.is_meta:  # nothing is there to multiply, and PyTorch 2.11's own shape rule for this addmm is wrong
        pass
    elif a.is_cpu:  # under the interpreter
        matmul_into(out, a.to(out.dtype), b.to(out.dtype), add=add)
    elif _leaves_wide(a.device, a.dtype):
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif add:
        out += a @ b
    else:
        out.copy_(a @ b)


class _Gradients:
    """dx and dw, accumulated over chunks from their factors."""

    def __init__(self, x: Tensor, weight: Tensor, rows: int, row_weights: Tensor) -> None:
        self.weight = weight  # (V, D) in x's dtype
        wide = row_weights.dtype
        self.dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self.dw = torch.empty(weight.shape, dtype=wide, device=x.device)
        self.product = torch.empty((rows, x.size(1)), dtype=wide, device=x.device)
        self.scaled = torch.empty((rows, x.size(1)), dtype=x.dtype, device=x.device)
        self.boost: Tensor | None = None
        if x.dtype == torch.float16 and x.size(0):
            # x times 1 / (number of tokens) is next to nothing in float16: the largest weight is applied to dw at last
            largest = row_weights.abs().amax()
            self.boost = HALF_UNIT / torch.where(largest > 0, largest, 1.0)

    def add(self, part: slice, x: Tensor, factor: Tensor, scales: Tensor) -> None:
        """One chunk of rows: dx = scales (F w), dw += F^T (scales x), for x (R, D), F (R, V) and scales (R,)."""
        rows = x.size(0)
        product, scaled = self.product[:rows], self.scaled[:rows]
        matmul_into(product, factor, self.weight, add=False)
        torch.mul(product, scales.unsqueeze(1), out=self.dx[part])
        boosted = scales if self.boost is None else scales * self.boost
        torch.mul(x, boosted.unsqueeze(1), out=scaled)
        matmul_into(self.dw, factor.T, scaled, add=part.start > 0)

    def finish(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """dx, and dw in the weight's dtype."""
        if self.dx.size(0) == 0:
            self.dw.zero_()
        if self.boost is not None:
            self.dw /= self.boost
        return self.dx, self.dw.to(dtype)


class _Settings(NamedTuple):
    """The loss's settings."""

    softcap: float | None
    ignore_index: int
    z_loss: float


class _Chunks:
    """One chunk of rows after the other, in one room for its logits or factor."""

    def __init__(self, x: Tensor, weight: Tensor, targets: Tensor, settings: _Settings, rows: int, way: str) -> None:
        self.x, self.rows, self.settings = x, rows, settings
        self.weight, self.targets = weight.to(x.dtype), targets.contiguous()
        V = self.vocab = weight.size(0)
        self.room = torch.empty((min(rows, x.size(0)), padded(V)), dtype=x.dtype, device=x.device)
        way = way or tuned_choice("linear_cross_entropy", way_key(V, x.size(1)), WAYS, x.device, x.dtype)
        self.fused = way == "fused" and fused_refusal(x, self.weight, settings.softcap) is None

    def __iter__(self) -> Iterator[slice]:
        """Their rows."""
        for start in range(0, self.x.size(0), self.rows):
            yield slice(start, min(start + self.rows, self.x.size(0)))

    def _logits(self, part: slice) -> Tensor:
        logits = self.room[: part.stop - part.start]
        torch.mm(self.x[part], self.weight.T, out=logits[:, : self.vocab])
        return logits

    def factor(self, part: slice, weights: Tensor, losses: Tensor, scales: Tensor) -> Tensor:
        """F (R, V) of a chunk with row weights (R,); its losses and row scales are written to (R,) and (R,)."""
        factor = self.room[: part.stop - part.start, : self.vocab]
        if self.fused:
            assert self.settings.softcap is not None
            fused = self.x[part], self.weight, factor, self.targets[part], weights, losses, scales
            launch_fused(*fused, self.settings.softcap, *self.settings[1:])
        else:
            launch_rows(self._logits(part), self.vocab, self.targets[part], weights, losses, scales, *self.settings)
        return factor

    def factor_again(self, part: slice, weights: Tensor, losses: Tensor, lse: Tensor, scales: Tensor) -> Tensor:
        """The same, given the losses and the logsumexp."""
        if self.fused:
            return self.factor(part, weights, torch.empty_like(losses), scales)
        of_rows = weights, losses, lse, scales
        launch_again(self._logits(part), self.vocab, self.targets[part], *of_rows, *self.settings)
        return self.room[: part.stop - part.start, : self.vocab]

    def evaluate(self, part: slice, losses: Tensor, lse: Tensor) -> None:
        """The losses and the logsumexp of a chunk; no factor is written."""
        launch_rows(self._logits(part), self.vocab, self.targets[part], None, losses, lse, *self.settings)


def train(
    x: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor,
    softcap: float | None, ignore_index: int, z_loss: float, rows: int, way: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Weighted sum of the losses (), dx (N, D) and dw (V, D), `rows` rows at a time."""
    chunks = _Chunks(x, weight, targets, _Settings(softcap, ignore_index, z_loss), rows, way)
    row_weights = row_weights.contiguous()
    gradients = _Gradients(x, chunks.weight, chunks.room.size(0), row_weights)
    losses, scales = (torch.empty_like(row_weights) for _ in range(2))
    for part in chunks:
        factor = chunks.factor(part, row_weights[part], losses[part], scales[part])
        gradients.add(part, x[part], factor, scales[part])
    return (losses * row_weights).sum(), *gradients.finish(weight.dtype)


def evaluate(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, ignore_index: int, z_loss: float, rows: int
) -> tuple[Tensor, Tensor]:
    """Losses (N,) and logsumexp (N,), `rows` rows at a time."""
    chunks = _Chunks(x, weight, targets, _Settings(softcap, ignore_index, z_loss), rows, "cublas")
    losses, lse = (torch.empty(x.size(0), dtype=wide_dtype(x.dtype), device=x.device) for _ in range(2))
    for part in chunks:
        chunks.evaluate(part, losses[part], lse[part])
    return losses, lse


def recompute(
    x: Tensor, weight: Tensor, targets: Tensor, losses: Tensor, lse: Tensor, row_weights: Tensor,
    softcap: float | None, ignore_index: int, z_loss: float, rows: int, way: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx (N, D) and dw (V, D) of losses whose weights came later."""
    chunks = _Chunks(x, weight, targets, _Settings(softcap, ignore_index, z_loss), rows, way)
    row_weights = row_weights.contiguous()
    gradients = _Gradients(x, chunks.weight, chunks.room.size(0), row_weights)
    scales = torch.empty_like(losses)
    for part in chunks:
        factor = chunks.factor_again(part, row_weights[part], losses[part], lse[part], scales[part])
        gradients.add(part, x[part], factor, scales[part])
    return gradients.finish(weight.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# the registration


@torch.library.custom_op("vibechat::linear_cross_entropy", mutates_args=())
def train_op(
    x: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor,
    softcap: float | None, ignore_index: int, z_loss: float, rows: int, way: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`train`, differentiable in x and weight through its first result."""
    return train(x, weight, targets, row_weights, softcap, ignore_index, z_loss, rows, way)


@torch.library.custom_op("vibechat::linear_cross_entropy_rows", mutates_args=())
def rows_op(
    x: Tensor, weight: Tensor, targets: Tensor,
    softcap: float | None, ignore_index: int, z_loss: float, rows: int, way: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`evaluate`; its first result is differentiable, by computing the logits again, in the given way."""
    return evaluate(x, weight, targets, softcap, ignore_index, z_loss, rows)


@torch.library.custom_op("vibechat::linear_cross_entropy_again", mutates_args=())
def again_op(
    x: Tensor, weight: Tensor, targets: Tensor, losses: Tensor, lse: Tensor, row_weights: Tensor,
    softcap: float | None, ignore_index: int, z_loss: float, rows: int, way: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`recompute`."""
    return recompute(x, weight, targets, losses, lse, row_weights, softcap, ignore_index, z_loss, rows, way)


@train_op.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return row_weights.new_empty(()), x.new_empty(x.shape), weight.new_empty(weight.shape)


@rows_op.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(x.dtype)
    return x.new_empty(x.size(0), dtype=wide), x.new_empty(x.size(0), dtype=wide)


@again_op.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """The saved gradients times the incoming scalar, on the device, into new tensors: a second backward may follow."""
    nothing = (None,) * 7
    if grad is None:
        return None, None, *nothing
    dx, dw = ctx.saved_tensors
    return dx * grad if ctx.needs_input_grad[0] else None, dw * grad if ctx.needs_input_grad[1] else None, *nothing


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.settings = inputs[3:]
    ctx.set_materialize_grads(False)


def _differentiate_rows(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    dx, dw = (None, None) if grad is None else again_op(*ctx.saved_tensors, grad, *ctx.settings)
    return dx, dw, *(None,) * 6


train_op.register_autograd(_scale_gradients, setup_context=_save_gradients)
rows_op.register_autograd(_differentiate_rows, setup_context=_save_rows)
backend.count_flops(torch.ops.vibechat.linear_cross_entropy, lambda x, w, *_: 6 * x[0] * x[1] * w[0])
backend.count_flops(torch.ops.vibechat.linear_cross_entropy_rows, lambda x, w, *_: 2 * x[0] * x[1] * w[0])
backend.count_flops(torch.ops.vibechat.linear_cross_entropy_again, lambda x, w, *_: 6 * x[0] * x[1] * w[0])
backend.triton_refusals["linear_cross_entropy"] = backend.hardware_refusal
