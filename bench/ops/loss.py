"""linear_cross_entropy as rows of the benchmark: mean loss, softcap 15, the head in the activations' dtype.

Beside it stand Liger's op and, where PyTorch has it, F.linear_cross_entropy in chunks, which knows no softcap. Our
gradients are made in the forward, so that a backward alone is no row.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.entry import Inputs, Launch, Op
from bench.shapes import Shape, Source
from vibechat import kernels
from vibechat.kernels.cost import Cost, loss_cost
from vibechat.kernels.linear_cross_entropy_matmul import CONFIGS as FUSED_CONFIGS
from vibechat.kernels.linear_cross_entropy_matmul import DEFAULT_CONFIG as FUSED_DEFAULT
from vibechat.kernels.linear_cross_entropy_matmul import launch_factor
from vibechat.kernels.linear_cross_entropy_ops import WAYS, way_key
from vibechat.kernels.linear_cross_entropy_triton import CONFIGS, DEFAULT_CONFIG, launch_again, launch_rows, padded

SOFTCAP = 15.0
CHUNK = 4096  # rows whose bfloat16 logits fill the 512 MiB of workspace at 65,536 words


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What a model without the op does: every logit at once, in float32 from the softcap on."""
    z = F.linear(x, weight).float() if x.dtype in (torch.bfloat16, torch.float16) else F.linear(x, weight)
    z = SOFTCAP * torch.tanh(z / SOFTCAP)
    return F.cross_entropy(z.flatten(0, -2), targets.flatten(), ignore_index=-1)


def _inputs(shape: Shape, source: Source) -> Inputs:
    """Logits of standard deviation one; the loss is the root, or nearly: the step's 1 / accumulation."""
    model = shape.model
    x = source.randn(shape.batch, shape.length, model.channels)
    weight = source.randn(model.vocabulary, model.channels, scale=model.channels**-0.5)
    one = source.randn(dtype=torch.float32)
    upstream = one if one.is_meta else torch.ones_like(one)
    if source.dtype == torch.float64:
        upstream = upstream.double()
    return Inputs([x, weight], [upstream], (source.randint(model.vocabulary, shape.batch, shape.length),))


def _cost(shape: Shape, itemsize: int, backward: bool) -> Cost:
    sizes = shape.rows, shape.model.channels, shape.model.vocabulary, itemsize
    evaluation, training = (loss_cost(*sizes, training=training) for training in (False, True))
    rest = Cost(training.bytes - evaluation.bytes, training.flops - evaluation.flops)
    return rest if backward else evaluation


def _launches(shape: Shape, source: Source) -> Iterator[Launch]:
    V, rows = shape.model.vocabulary, min(CHUNK, shape.rows)
    raw = source.randn(rows, padded(V))
    logits = raw.clone()  # the factor is written over them
    targets = source.randint(V, rows)
    weights, losses, extra, scales = (source.randn(rows, dtype=torch.float32).abs() for _ in range(4))
    wide = ("wide_loads", "wide_stores")

    def launch(name: str, run: Callable[[Any], Any], needs: tuple[str, ...]) -> Launch:
        key = str(1 << (V - 1).bit_length())
        return Launch(name, key, CONFIGS, run, DEFAULT_CONFIG, needs=needs, restore=lambda: logits.copy_(raw))

    yield launch(
        "cross_entropy_rows",
        lambda c: launch_rows(logits, V, targets, weights, losses, extra, SOFTCAP, -1, 0.0, c),
        wide,
    )
    x, weight = source.randn(rows, shape.model.channels), source.randn(V, shape.model.channels)
    factor = torch.empty_like(logits)[:, :V]
    yield Launch(
        "cross_entropy_fused",
        way_key(V, shape.model.channels),
        FUSED_CONFIGS,
        lambda c: launch_factor(x, weight, factor, targets, SOFTCAP, c),
        FUSED_DEFAULT,
        specialization="bfloat16",
        needs=("wgmma", "tma_loads", "tma_stores"),
    )
    yield launch(
        "cross_entropy_rows_only",
        lambda c: launch_rows(logits, V, targets, None, losses, extra, SOFTCAP, -1, 0.0, c),
        wide[:1],
    )
    yield launch(
        "cross_entropy_again",
        lambda c: launch_again(logits, V, targets, weights, losses, extra, scales, SOFTCAP, -1, 0.0, c),
        wide,
    )


def _liger() -> Callable[..., Any]:
    op = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction

    def call(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        flat = x.reshape(-1, x.size(-1))
        return op.apply(flat, weight, targets.flatten(), None, None, -1, 0.0, 0.0, "mean", SOFTCAP)[0]

    return call


def _torch() -> Callable[..., Any]:
    op, options = getattr(F, "linear_cross_entropy", None), getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if op is None or options is None:
        raise ImportError("this PyTorch has no linear_cross_entropy")

    def call(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        flat = x.reshape(-1, x.size(-1))
        return op(flat, weight, targets.flatten(), ignore_index=-1, options=options(allow_retain_graph=True))

    return call


LINEAR_CROSS_ENTROPY = Op(
    "linear_cross_entropy",
    functools.partial(kernels.linear_cross_entropy, softcap=SOFTCAP),
    plain,
    _inputs,
    _cost,
    _launches,
    liger=_liger,
    others={"torch": _torch},
    ways={way: functools.partial(kernels.linear_cross_entropy, softcap=SOFTCAP, way=way) for way in WAYS},
    ways_key=lambda shape: way_key(shape.model.vocabulary, shape.model.channels),
    batches=(32, 16),
    gradients_in_forward=True,
)
