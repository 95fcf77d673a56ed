"""`python -m bench.cost_table`: what each op must move, what eager PyTorch moves for the same, and what follows of it.

Ours is the formula of `vibechat.kernels.cost`, which tests compare with what the kernels load and store. Eager's is
counted from the operators that the reference dispatches, each reading its inputs and writing its outputs in full, with
RMSNorm one operator, as it is on CUDA since PyTorch 2.9; views and what the caches may save are free.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.ops import OPS
from bench.shapes import LENGTH, MODELS, Model, Shape, Source
from vibechat.kernels.cost import Cost, loss_designs


def tensor_bytes(x: Tensor) -> int:
    """Bytes of the elements that a tensor's view touches; what is expanded counts once."""
    sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride != 0]
    return torch.Size(sizes).numel() * x.element_size()


class CountBytes(TorchDispatchMode):
    """Adds up what the operators that run under it read and write."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func) and "detach" not in str(func):
            read = {id(x): x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)}
            wrote = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            self.total += sum(map(tensor_bytes, [*read.values(), *wrote]))
        return result


class FusedNorm(torch.autograd.Function):
    """Moves what PyTorch's fused CUDA RMSNorm moves: reads x, writes y; backward reads dy and x, writes dx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.neg()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * ctx.saved_tensors[0]


class EagerBytes(NamedTuple):
    """What the eager reference moves."""

    forward: int
    backward: int


def eager_bytes(op: Callable[..., Any], inputs: list[Tensor], *rest: Any, differentiable: bool = True) -> EagerBytes:
    """Count a reference on meta tensors, forward and backward."""
    leaves = [x.detach().requires_grad_(differentiable) for x in inputs]
    with mock.patch.object(F, "rms_norm", lambda x, *_, **__: FusedNorm.apply(x)), CountBytes() as forward:
        outputs = op(*leaves, *rest)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if not differentiable:
        return EagerBytes(forward.total, 0)
    gradients = [torch.empty_like(y) for y in outputs]
    with CountBytes() as backward:
        torch.autograd.grad(outputs, leaves, gradients)
    return EagerBytes(forward.total, backward.total)


class Row(NamedTuple):
    """One pass of an op at one model's shapes."""

    op: str
    model: Model
    direction: str
    ours: Cost
    eager_bytes: int


def cost_rows(batch: int = 16) -> list[Row]:
    """Each op with a kernel at each model's shapes in bfloat16."""
    rows = []
    for op in OPS.values():
        for model in MODELS:
            shape = Shape(model, batch if batch in op.batches else op.batches[0])
            inputs, _, rest = op.inputs(shape, Source("meta"))
            eager = eager_bytes(op.reference, inputs, *rest, differentiable=op.differentiable)
            of_eager = {"forward": eager.forward, "backward": eager.backward, "both": sum(eager)}
            for direction in reversed(op.passes):
                if direction != "both" or op.gradients_in_forward:
                    ours = op.total_cost(shape, 2, direction)
                    rows.append(Row(op.name, model, direction, ours, of_eager[direction]))
    return rows


def loss_rows(shape: Shape) -> dict[str, Cost]:
    """What training with linear_cross_entropy moves and computes, beside other ways to compute it."""
    model = shape.model
    inputs, _, rest = OPS["linear_cross_entropy"].inputs(shape, Source("meta"))
    moved = sum(eager_bytes(OPS["linear_cross_entropy"].reference, inputs, *rest))
    sizes = shape.rows, model.channels, model.vocabulary
    return {"eager": Cost(moved, 6 * math.prod(sizes)), **loss_designs(*sizes)}


def cost_lines(batch: int = 16) -> list[str]:
    """The table as text."""
    lines = [f"MiB that must move at B={batch}, T={LENGTH}, bfloat16, what eager PyTorch moves, and GFLOPs"]
    lines.append(f"{'op':<22}{'model':>6} {'pass':<9}{'ours':>8}{'eager':>9}{'ratio':>7}{'GFLOPs':>10}")
    for op, model, direction, ours, eager in cost_rows(batch):
        lines.append(
            f"{op:<22}{'d' + str(model.depth):>6} {direction:<9}{ours.bytes / 2**20:>8.0f}{eager / 2**20:>9.0f}"
            f"{eager / ours.bytes:>6.1f}x{ours.flops / 1e9:>10.1f}"
        )
    for entry in OPS.values():
        for model in MODELS:
            lines += entry.predictions(Shape(model, entry.batches[0]))
    shape = Shape(MODELS[-1], 32)
    lines.append(f"linear_cross_entropy, forward + backward of {shape.rows} tokens at d26, bfloat16")
    lines.append(f"{'design':<22}{'GB':>8}{'bytes a logit':>15}{'TFLOPs':>9}")
    for design, cost in loss_rows(shape).items():
        a_logit = cost.bytes / shape.rows / shape.model.vocabulary
        lines.append(f"{design:<22}{cost.bytes / 1e9:>8.1f}{a_logit:>15.1f}{cost.flops / 1e12:>9.1f}")
    return lines


if __name__ == "__main__":
    print("\n".join(cost_lines()))
