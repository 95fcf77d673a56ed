"""Causal attention as matmuls on blocks of queries: what a CPU trains with under torch.compile.

There PyTorch's flash kernel takes a fifth of a small model's step, and matmuls on blocks of 256 queries, with the
exponentiated scores kept for the backward, take 0.6 of its time: e = exp(s - max s), y = (e v) / sum e, and with
d = rowsum(dy y) as in Dao et al. 2022, "FlashAttention", arXiv 2205.14135, ds = e (dy v^T - d) / sum e. Scores are
rounded to the inputs' dtype, as plain matmuls round them. Keys that no query of a block sees are never multiplied.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES_PER_BLOCK = 256
LONGEST = 1024  # the kept scores grow with T^2; past this the flash kernel wins on memory and on time


class Block(NamedTuple):
    """Queries start to stop, which see no key but those from `first` to stop."""

    start: int
    stop: int
    first: int


def blocks(length: int, window: int | None = None, size: int | None = None) -> list[Block]:
    """Queries 0 to `length` in blocks, each with the keys that causal attention over `window` keys may see."""
    size = size or QUERIES_PER_BLOCK
    starts = range(0, length, size)
    return [Block(s, min(s + size, length), 0 if window is None else max(0, s - window + 1)) for s in starts]


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, documents: Tensor | None) -> Tensor:
    """Causal attention on q, k, v (B, H, T, D); `window` and `documents` (B, T) as `attend` takes them."""
    return _BlockedCausalAttention.apply(q, k, v, window, documents)


def _seen(block: Block, window: int | None, documents: Tensor | None, device: torch.device) -> Tensor:
    """(stop - start, stop - first), or (B, 1, ...) with documents: which keys each query of a block sees."""
    start, stop, first = block
    seen = torch.ones(stop - start, stop - first, dtype=torch.bool, device=device).tril(start - first)
    if window is not None:
        seen = seen & torch.ones_like(seen).triu(start - first - window + 1)
    if documents is not None:
        seen = seen & (documents[:, None, start:stop, None] == documents[:, None, None, first:stop])
    return seen


@torch.compiler.allow_in_graph  # one node, which activation checkpointing can mark to be computed again
class _BlockedCausalAttention(torch.autograd.Function):
    """Causal attention on (B, H, T, D), block of queries by block of queries."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None, documents: Tensor | None) -> Tensor:
        T, D = q.shape[-2:]
        wide = torch.promote_types(q.dtype, torch.float32)
        outputs, exponentials, sums = [], [], []
        for block in blocks(T, window):
            start, stop, first = block
            scores = (q[:, :, start:stop] @ k[:, :, first:stop].mT).to(wide) * D**-0.5  # (B, H, queries, keys)
            scores = torch.where(_seen(block, window, documents, q.device), scores, -torch.inf)
            e = (scores - scores.amax(-1, keepdim=True)).exp()
            total = e.sum(-1, keepdim=True)  # (B, H, queries, 1)
            e = e.to(q.dtype)
            outputs.append((e @ v[:, :, first:stop] / total).to(q.dtype))
            exponentials.append(e)
            sums.append(total)
        y = torch.cat(outputs, dim=2)
        ctx.save_for_backward(q, k, v, y, *exponentials, *sums)
        ctx.window = window
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, y, *kept = ctx.saved_tensors
        T, D = q.shape[-2:]
        wide = torch.promote_types(q.dtype, torch.float32)
        d = (dy.to(wide) * y.to(wide)).sum(-1, keepdim=True)  # (B, H, T, 1)
        dq, dk, dv = [], torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        count = len(kept) // 2
        for (start, stop, first), e, total in zip(blocks(T, ctx.window), kept[:count], kept[count:], strict=True):
            scaled_dy = (dy[:, :, start:stop] / total).to(q.dtype)
            de = (scaled_dy @ v[:, :, first:stop].mT).to(wide)
            ds = (e.to(wide) * (de - d[:, :, start:stop] / total) * D**-0.5).to(q.dtype)
            dq.append(ds @ k[:, :, first:stop])
            rest = (0, 0, first, T - stop)  # keys that this block did not see
            dk = dk + F.pad(ds.mT @ q[:, :, start:stop], rest)
            dv = dv + F.pad(e.mT @ scaled_dy, rest)
        return torch.cat(dq, dim=2), dk.to(k.dtype), dv.to(v.dtype), None, None
