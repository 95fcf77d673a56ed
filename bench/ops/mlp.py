"""relu2_mlp as rows of the benchmark, in each of its ways, and what the cost model predicts of them. Liger has the
activation alone, between two matmuls of PyTorch."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from bench.ops.entry import Inputs, Launch, Op
from bench.shapes import Shape, Source
from vibechat import kernels
from vibechat.kernels.cost import Cost, relu2_mlp_cost
from vibechat.kernels.relu2_mlp import (
    BACKWARD_CONFIGS,
    BACKWARD_DEFAULT,
    FLAT_CONFIGS,
    FLAT_DEFAULT,
    FORWARD_CONFIGS,
    FORWARD_DEFAULT,
    WAYS,
    launch_backward,
    launch_forward,
    launch_gradient,
    launch_relu2,
    reference,
    widths,
    with_kernels,
)


def _widths(shape: Shape) -> tuple[int, int]:
    return shape.model.channels, 4 * shape.model.channels


def _inputs(shape: Shape, source: Source) -> Inputs:
    C, H = _widths(shape)
    sizes = shape.batch, shape.length, C
    weights = [source.randn(H, C, scale=C**-0.5), source.randn(C, H, scale=H**-0.5)]
    return Inputs([source.randn(*sizes), *weights], [source.randn(*sizes)])


def _cost(shape: Shape, itemsize: int, backward: bool) -> Cost:
    return relu2_mlp_cost(shape.rows, *_widths(shape), itemsize, backward=backward)


def _launches(shape: Shape, source: Source) -> Iterator[Launch]:
    (x, w_fc, w_proj), (g,), _ = _inputs(shape, source)
    C, H = _widths(shape)
    x, g = x.view(-1, C), g.view(-1, C)
    post = source.randn(shape.rows, H)
    post.square_()
    needs = ("wgmma", "tma_loads", "tma_stores")
    for kernel, configs, default, run in (
        ("relu2_matmul", FORWARD_CONFIGS, FORWARD_DEFAULT, lambda c: launch_forward(x, w_fc, c)),
        ("relu2_gradient_matmul", BACKWARD_CONFIGS, BACKWARD_DEFAULT, lambda c: launch_backward(g, w_proj, post, c)),
    ):
        yield Launch(kernel, widths(C, H), configs, run, default, specialization="tma", needs=needs)
    before, worked_on = source.randn(shape.rows, H), source.randn(shape.rows, H)
    for kernel, flat in (
        ("relu2_in_place", lambda c: launch_relu2(worked_on, c)),
        ("relu2_gradient_in_place", lambda c: launch_gradient(worked_on, post, c)),
    ):
        yield Launch(
            kernel, "", FLAT_CONFIGS, flat, FLAT_DEFAULT, specialization="flat",
            needs=("wide_loads", "wide_stores"), restore=lambda: worked_on.copy_(before),
        )  # fmt: skip


def _liger() -> Callable[..., Any]:
    relu2 = importlib.import_module("liger_kernel.ops.relu_squared").LigerReLUSquaredFunction

    def call(x: Tensor, w_fc: Tensor, w_proj: Tensor) -> Any:
        return F.linear(relu2.apply(F.linear(x, w_fc)), w_proj)

    return call


def _way(name: str) -> Callable[..., Tensor]:
    return lambda x, w_fc, w_proj: with_kernels(x, w_fc, w_proj, name)


RELU2_MLP = Op(
    "relu2_mlp",
    kernels.relu2_mlp,
    reference,
    _inputs,
    _cost,
    _launches,
    liger=_liger,
    ways={name: _way(name) for name in WAYS},
    ways_key=lambda shape: widths(*_widths(shape)),
    batches=(32, 16, 1),
    predictions=lambda shape: prediction_lines(shape),
)

# ---------------------------------------------------------------------------------------------------------------------
# predictions

COPY_BYTES_PER_SECOND = 0.9 * 4.3e12  # nine tenths of what an H200 copies, which is what elementwise kernels reach
MATMUL_FLOPS_PER_SECOND = 788e12  # of cuBLAS on it, bfloat16, 8192^3


class Prediction(NamedTuple):
    """Milliseconds of an implementation of relu2_mlp, forward and backward."""

    implementation: str
    forward: float
    backward: float

    @property
    def both(self) -> float:
        """The sum."""
        return self.forward + self.backward


def predictions(shape: Shape) -> list[Prediction]:
    """What the cost model says of bfloat16 on an H200: matmuls at cuBLAS's rate, and between them passes over the
    hidden activations (each reads or writes them once) at copy's; the fused matmuls at a share of cuBLAS, their
    operands and passes hidden behind the multiplication."""
    C, H = _widths(shape)
    matmul = 1e3 * 2 * shape.rows * C * H / MATMUL_FLOPS_PER_SECOND
    one_pass = 1e3 * 2 * shape.rows * H / COPY_BYTES_PER_SECOND
    passes = {"eager": (4, 8), "compiled": (2, 3), "elementwise": (2, 3)}
    # eager: relu and square, each a read and a write; backward 2 r, times dpost, and the mask of relu; compiled: one
    # kernel each way, as ours, but both post and what was squared are kept
    rows = [
        Prediction(name, 2 * matmul + forward * one_pass, 4 * matmul + backward * one_pass)
        for name, (forward, backward) in passes.items()
    ]
    for share in (0.83, 0.9, 0.95, 1.0):
        extra = matmul / share - matmul
        rows.append(Prediction(f"fused at {100 * share:.0f}%", 2 * matmul + extra, 4 * matmul + extra))
    return rows


def prediction_lines(shape: Shape) -> list[str]:
    """The predictions at one shape as text."""
    rows = predictions(shape)
    eager, compiled = rows[0].both, rows[1].both
    C, H = _widths(shape)
    lines = [
        f"relu2_mlp d{shape.model.depth} on {shape.rows} x {C} x {H}: predicted ms on an H200, never measured",
        f"{'':<16}{'forward':>9}{'backward':>10}{'both':>9}{'x eager':>9}{'x compiled':>12}",
    ]
    lines += [
        f"{row.implementation:<16}{row.forward:>9.3f}{row.backward:>10.3f}{row.both:>9.3f}"
        f"{eager / row.both:>9.2f}{compiled / row.both:>12.2f}"
        for row in rows
    ]
    return lines
