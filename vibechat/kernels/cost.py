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


LOSS_CHUNK = 4096  # rows whose bfloat16 logits fill the default workspace at 65,536 words


def loss_cost(rows: int, channels: int, vocab: int, itemsize: int, *, training: bool, fused: bool = False) -> Cost:
    """Of linear_cross_entropy: training, both gradients made, or evaluation.

    The logits are written and read once, the factor is written once and read by two matmuls; with `fused`, the matmul
    that makes the logits writes the factor itself. Each chunk of rows reads the weight for each of its matmuls, and
    adds to dw in float32.
    """
    chunks = -(-rows // LOSS_CHUNK)
    logits, x, weight = (itemsize * size for size in (rows * vocab, rows * channels, vocab * channels))
    if not training:
        return Cost(2 * logits + x + chunks * weight, 2 * rows * channels * vocab)
    wide = max(4, itemsize)
    products = (itemsize + 2 * wide) * rows * channels  # dx, by way of a wider product
    dw = (2 * chunks - 1) * wide * vocab * channels
    moved = (3 if fused else 5) * logits + 4 * x + products + 2 * chunks * weight + dw
    return Cost(moved, 6 * rows * channels * vocab)


def loss_designs(rows: int, channels: int, vocab: int, itemsize: int = 2) -> dict[str, Cost]:
    """Training's bytes and FLOPs of this op and of how others compute it; eager's stands in bench.cost_table.

    Liger: chunks of its own size; two reads and a write where we have one of each, dw summed in the weight's dtype. A
    recomputing design (CCE, Liger for sm_90) keeps no logit, makes them again in the backward and writes their gradient
    once for two matmuls.
    """
    logits, x, weight = (itemsize * size for size in (rows * vocab, rows * channels, vocab * channels))
    matmul = 2 * rows * channels * vocab
    liger_rows = 1 << (-(-rows // -(-vocab // channels)) - 1).bit_length()
    liger_chunks = -(-rows // liger_rows)

    return {
        "ours, cuBLAS logits": loss_cost(rows, channels, vocab, itemsize, training=True),
        "ours, fused": loss_cost(rows, channels, vocab, itemsize, training=True, fused=True),
        "Liger": Cost(6 * logits + 3 * x + liger_chunks * 4 * weight, 3 * matmul),
        "recomputing": Cost(3 * logits + 4 * x + 4 * weight, 4 * matmul),
    }


def newton_schulz_flops(
    count: int, m: int, n: int, steps: int = 5, *, symmetric: bool = True, restarts: int = -1
) -> int:
    """FLOPs of orthogonalizing `count` matrices (m, n), m <= n: in standard form, or with `restarts` of 0 and more in
    Gram form. A symmetric product counts as a triangle, or as all of it if not `symmetric`."""
    square, outer = (m**3, m * m * n) if symmetric else (2 * m**3, 2 * m * m * n)
    full = 2 * m * m * n
    if restarts < 0:
        return count * steps * (outer + square + full)
    spans = restarts + 1
    return count * (spans * (outer + full) + steps * square + (steps - spans) * 3 * square)


def newton_schulz_cost(count: int, m: int, n: int, itemsize: int) -> Cost:
    """Of the op, in 16 bits inside: the normalization's walks, then what each product reads and writes once."""
    gram, x = count * m * m * 2, count * m * n * 2
    walks = 2 * count * m * n * itemsize + x
    if 2 * n <= 3 * m:
        return Cost(walks + 5 * ((x + gram) + 2 * gram + (gram + 2 * x)), newton_schulz_flops(count, m, n))
    products = 2 * ((x + gram) + (gram + 2 * x)) + 5 * 2 * gram + 3 * (4 + 3 + 2 * 3) * gram
    return Cost(walks + products, newton_schulz_flops(count, m, n, restarts=1))
