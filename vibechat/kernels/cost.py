"""What each kernel must move and compute: the formulas of the ops' docstrings, as the benchmarks report against them.

Bytes are those that reach device memory when every operand is read or written once; tests count what the kernels
really load and store and find the same.
"""

from typing import NamedTuple


class Cost(NamedTuple):
    """Of one call of an op, forward or backward."""

    bytes: int
    flops: int


def norm_cost(rows: int, channels: int, itemsize: int, *, residual: bool = False, backward: bool = False) -> Cost:
    """Of rms_norm, or of add_rms_norm with a residual, on (rows, channels) of `itemsize` bytes."""
    passes = (4 if residual else 3) if backward else (4 if residual else 2)
    flops = (6 if backward else 3) + residual
    return Cost(passes * rows * channels * itemsize + 4 * rows, flops * rows * channels)


def qk_norm_rope_cost(
    batch: int, length: int, heads: int, head_dim: int, itemsize: int, *, backward: bool = False
) -> Cost:
    """Of qk_norm_rope on q and k with `heads` heads together; the tables are shared by the batch and read once."""
    rows = batch * length * heads
    tables = 2 * 4 * length * head_dim // 2
    passes, flops = (3, 11) if backward else (2, 6)
    return Cost(passes * rows * head_dim * itemsize + 4 * rows + tables, flops * rows * head_dim)


def relu2_mlp_cost(
    tokens: int, channels: int, hidden: int, itemsize: int, *, backward: bool = False, fused: bool = True
) -> Cost:
    """Of relu2_mlp on (tokens, channels) with `hidden` activations a token, every operand of a product read once."""
    outer, inner, weights = (4, 5, 4) if backward else (2, 2, 2)
    inner += 0 if fused else 2
    elements = outer * tokens * channels + inner * tokens * hidden + weights * channels * hidden
    return Cost(elements * itemsize, (8 if backward else 4) * tokens * channels * hidden)
