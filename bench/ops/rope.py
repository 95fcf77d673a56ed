"""qk_norm_rope as rows of the benchmark. Liger has no norm over heads with rotary in one op."""

from collections.abc import Iterator

import torch

from bench.ops.entry import Inputs, Launch, Op
from bench.shapes import HEAD_DIM, Shape, Source
from vibechat import kernels
from vibechat.kernels.cost import Cost, qk_norm_rope_cost
from vibechat.kernels.qk_norm_rope import CONFIGS, default_config, launch_backward, launch_forward, reference
from vibechat.kernels.rms_norm import EPS


def _inputs(shape: Shape, source: Source) -> Inputs:
    """q and k as views of one packed projection, their gradients as attention gives them, (B, H, T, D)."""
    B, T, H = shape.batch, shape.length, shape.model.heads
    q, k, _ = source.randn(B, T, 3 * H, HEAD_DIM).split((H, H, H), dim=2)
    upstream = [source.randn(B, H, T, HEAD_DIM).transpose(1, 2) for _ in range(2)]
    return Inputs([q, k], upstream, kernels.rotary_tables(T, HEAD_DIM, 10_000.0, source.device))


def _cost(shape: Shape, itemsize: int, backward: bool) -> Cost:
    heads = 2 * shape.model.heads
    return qk_norm_rope_cost(shape.batch, shape.length, heads, HEAD_DIM, itemsize, backward=backward)


def _launches(shape: Shape, source: Source) -> Iterator[Launch]:
    B, T, H = shape.batch, shape.length, shape.model.heads
    (q, k), (dq, dk), (cos, sin) = _inputs(shape, source)
    q_out, k_out = (source.randn(B, T, H, HEAD_DIM) for _ in range(2))
    q_rstd, k_rstd = (source.randn(B, T, H, dtype=torch.float32) for _ in range(2))
    half = HEAD_DIM // 2
    for kernel, run in (
        ("qk_norm_rope_forward", lambda c: launch_forward(q, k, cos, sin, EPS, c)),
        ("qk_norm_rope_backward", lambda c: launch_backward(dq, dk, q_out, k_out, q_rstd, k_rstd, cos, sin, c)),
    ):
        yield Launch(kernel, str(half), CONFIGS, run, default_config(half))


QK_NORM_ROPE = Op("qk_norm_rope", kernels.qk_norm_rope, reference, _inputs, _cost, _launches)
