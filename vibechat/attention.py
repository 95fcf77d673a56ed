"""Causal attention for training and for decoding with a cache: one function, `attend`.

A query at row i of T stands at position S - T + i of the S keys, and sees the keys up to itself. So T = S is training
or prefill, T = 1 is a decoding step, and anything between is a chunk of a prompt that follows what a cache holds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D), causal) v, by F.scaled_dot_product_attention.

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
    if T == S:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    elif T == 1:
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    else:
        seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
    return y.transpose(1, 2)
