"""What each op must move, and what eager PyTorch moves for the same: the printed cost model.

Ours is the formula of `vibechat.kernels.cost`, which tests compare with what the kernels load and store. Eager's is
counted from the operators that the reference dispatches, each reading its inputs and writing its outputs in full, with
RMSNorm one operator, as it is on CUDA since PyTorch 2.9; views and what the caches may save are free.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.shapes import HEAD_DIM, LENGTH, MODELS, Model
from vibechat.kernels.cost import Cost, norm_cost, qk_norm_rope_cost


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


def eager_bytes(op: Callable[..., Any], inputs: list[Tensor], *rest: Any) -> EagerBytes:
    """Count a reference on meta tensors, forward and backward."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with mock.patch.object(F, "rms_norm", lambda x, *_, **__: FusedNorm.apply(x)), CountBytes() as forward:
        outputs = op(*leaves, *rest)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    gradients = [torch.empty_like(y) for y in outputs]
    with CountBytes() as backward:
        torch.autograd.grad(outputs, leaves, gradients)
    return EagerBytes(forward.total, backward.total)


class Row(NamedTuple):
    """One op at one model's shapes."""

    op: str
    model: Model
    forward: Cost
    backward: Cost
    eager: EagerBytes


def cost_rows(batch: int = 16) -> list[Row]:
    """Each op with a kernel at each model's shapes in bfloat16."""
    norm = importlib.import_module("vibechat.kernels.rms_norm")
    rope = importlib.import_module("vibechat.kernels.qk_norm_rope")

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = []
    for model in MODELS:
        x = make(batch, LENGTH, model.channels)
        q = make(batch, LENGTH, model.heads, HEAD_DIM)
        table = make(LENGTH, HEAD_DIM // 2, dtype=torch.float32)
        n, C, H = batch * LENGTH, model.channels, 2 * model.heads
        plain, added = eager_bytes(norm.reference, [x]), eager_bytes(norm.add_reference, [x, x])
        turned = eager_bytes(rope.reference, [q, q], table, table)
        rows += [
            Row("rms_norm", model, norm_cost(n, C, 2), norm_cost(n, C, 2, backward=True), plain),
            Row(
                "add_rms_norm",
                model,
                norm_cost(n, C, 2, residual=True),
                norm_cost(n, C, 2, residual=True, backward=True),
                added,
            ),
            Row(
                "qk_norm_rope",
                model,
                qk_norm_rope_cost(batch, LENGTH, H, HEAD_DIM, 2),
                qk_norm_rope_cost(batch, LENGTH, H, HEAD_DIM, 2, backward=True),
                turned,
            ),
        ]
    return rows


def cost_lines(batch: int = 16) -> list[str]:
    """The table as text."""
    lines = [f"MiB that must move at B={batch}, T={LENGTH}, bfloat16, and what eager PyTorch moves"]
    lines.append(
        f"{'op':<14}{'model':>6}{'forward':>10}{'eager':>9}{'ratio':>7}{'backward':>10}{'eager':>9}{'ratio':>7}"
    )
    for op, model, forward, backward, eager in cost_rows(batch):
        lines.append(
            f"{op:<14}{'d' + str(model.depth):>6}"
            f"{forward.bytes / 2**20:>10.0f}{eager.forward / 2**20:>9.0f}{eager.forward / forward.bytes:>6.1f}x"
            f"{backward.bytes / 2**20:>10.0f}{eager.backward / 2**20:>9.0f}{eager.backward / backward.bytes:>6.1f}x"
        )
    return lines
