"""Causal attention for training and for decoding with a cache: one function, `attend`.

A query at row i of T stands at position S - T + i of the S keys, and sees the keys up to itself. So T = S is training
or prefill, T = 1 is a decoding step, and anything between is a chunk of a prompt that follows what a cache holds.

Everything runs in F.scaled_dot_product_attention but training on a CPU under torch.compile. There PyTorch's flash
kernel takes a fifth of a small model's step, and matmuls on blocks of 256 queries, with the exponentiated scores kept
for the backward, take 0.6 of its time: e = exp(s - max s), y = (e v) / sum e, and with d = rowsum(dy y) as in Dao et
al. 2022, "FlashAttention", arXiv 2205.14135, ds = e (dy v^T - d) / sum e. Scores are rounded to the inputs' dtype, as
plain matmuls round them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES_PER_BLOCK = 256  # keys after a block's last query are never multiplied
LONGEST_BLOCKED = 1024  # the kept scores grow with T^2; past this the flash kernel wins on memory and on time


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D), causal) v.

    Args:
        q: (B, T, H, D).
        k: (B, S, H_kv, D), S >= T, H a multiple of H_kv (grouped-query attention shares each key head).
        v: like k.

    Returns:
        (B, T, H, D).
    """
    T, S = q.size(1), k.size(1)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    grouped = q.size(1) != k.size(1)
    if T == S and not grouped and _blocked_is_faster(q):
        y = _BlockedCausalAttention.apply(q, k, v)
    elif T == S:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    elif T == 1:
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    else:
        seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
    return y.transpose(1, 2)


def attention_backend(device: torch.device) -> str:
    """What `attend` runs in training on this device, in the words of the table that a run begins with."""
    sdpa = "scaled_dot_product_attention"
    if device.type == "cpu":
        return f"blocked matmuls up to {LONGEST_BLOCKED} tokens where compiled, else {sdpa}"
    if device.type != "cuda":
        return sdpa
    cuda = torch.backends.cuda
    enabled = {
        "cuDNN": cuda.cudnn_sdp_enabled(),
        "flash": cuda.flash_sdp_enabled(),
        "memory-efficient": cuda.mem_efficient_sdp_enabled(),
    }
    return f"{sdpa} ({', '.join(name for name, on in enabled.items() if on) or 'unfused'})"


def _blocked_is_faster(q: Tensor) -> bool:
    training = torch.is_grad_enabled() and q.requires_grad
    return training and q.device.type == "cpu" and torch.compiler.is_compiling() and q.size(2) <= LONGEST_BLOCKED


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERIES_PER_BLOCK, length)) for start in range(0, length, QUERIES_PER_BLOCK)]


class _BlockedCausalAttention(torch.autograd.Function):
    """Causal attention on (B, H, T, D), block of queries by block of queries."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T, D = q.shape[-2:]
        wide = torch.promote_types(q.dtype, torch.float32)
        outputs, exponentials, sums = [], [], []
        for start, stop in _blocks(T):
            scores = (q[:, :, start:stop] @ k[:, :, :stop].mT).to(wide) * D**-0.5  # (B, H, stop - start, stop)
            seen = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).tril(start)
            scores = torch.where(seen, scores, -torch.inf)
            e = (scores - scores.amax(-1, keepdim=True)).exp()
            total = e.sum(-1, keepdim=True)  # (B, H, stop - start, 1)
            e = e.to(q.dtype)
            outputs.append((e @ v[:, :, :stop] / total).to(q.dtype))
            exponentials.append(e)
            sums.append(total)
        y = torch.cat(outputs, dim=2)
        ctx.save_for_backward(q, k, v, y, *exponentials, *sums)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y, *kept = ctx.saved_tensors
        T, D = q.shape[-2:]
        wide = torch.promote_types(q.dtype, torch.float32)
        d = (dy.to(wide) * y.to(wide)).sum(-1, keepdim=True)  # (B, H, T, 1)
        dq, dk, dv = [], torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        count = len(kept) // 2
        for (start, stop), e, total in zip(_blocks(T), kept[:count], kept[count:], strict=True):
            scaled_dy = (dy[:, :, start:stop] / total).to(q.dtype)
            de = (scaled_dy @ v[:, :, :stop].mT).to(wide)
            ds = (e.to(wide) * (de - d[:, :, start:stop] / total) * D**-0.5).to(q.dtype)
            dq.append(ds @ k[:, :, :stop])
            rest = (0, 0, 0, T - stop)  # keys that this block did not see
            dk = dk + F.pad(ds.mT @ q[:, :, start:stop], rest)
            dv = dv + F.pad(e.mT @ scaled_dy, rest)
        return torch.cat(dq, dim=2), dk.to(k.dtype), dv.to(v.dtype)
