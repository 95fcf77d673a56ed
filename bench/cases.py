"""The rows of the kernel benchmark: op x implementation x shape x pass, each as calls to be timed.

Implementations: `eager` (the reference), `compiled` (the reference under torch.compile), `ours` (the public op with
its kernel; where Triton runs), `ours:WAY` (each way that the op chooses from, if there are several), `liger` (where
liger_kernel is installed and has the op), and what else the op's entry names. Passes: `forward` (without a graph),
`backward` (the graph made before) and `both`. What an op is stands in bench/ops. In Triton's interpreter, where times
mean nothing, `compiled` is traced only.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measure import L2_BYTES
from bench.ops import OPS
from bench.shapes import Model, Shape, Source, can_run_kernels, scale_of
from vibechat.kernels.cost import Cost
from vibechat.kernels.language import INTERPRETING

IMPLEMENTATIONS = ("ours", "eager", "compiled", "liger")
PASSES = ("both", "forward", "backward")


class Case(NamedTuple):
    """One row."""

    op: str
    implementation: str
    model: Model
    batch: int
    length: int
    direction: str

    @property
    def name(self) -> str:
        """As a test's id and a row's key."""
        return f"{self.op}-{self.implementation}-d{self.model.depth}-B{self.batch}-{self.direction}"

    @property
    def shape(self) -> Shape:
        """The micro-batch."""
        return Shape(self.model, self.batch, self.length)


def all_cases(device: torch.device) -> Iterator[Case]:
    """The most valuable rows first; small shapes on a CPU."""
    scale = scale_of(device)
    batches = [scale.batch] if scale.batch else list(dict.fromkeys(b for op in OPS.values() for b in op.batches))
    for batch in batches:
        for direction in PASSES:
            for op in OPS.values():
                if direction not in op.passes or (scale.batch is None and batch not in op.batches):
                    continue
                for model in scale.models:
                    for implementation in (*IMPLEMENTATIONS, *op.others, *(f"ours:{way}" for way in op.ways)):
                        if implementation_of(op.name, implementation, device) is not None:
                            yield Case(op.name, implementation, model, batch, scale.length, direction)


@functools.cache
def implementation_of(name: str, implementation: str, device: torch.device) -> Callable[..., Any] | None:
    """The function to call, or None if this machine has none."""
    op = OPS[name]
    if implementation == "eager":
        return op.reference
    if implementation == "compiled":
        backend = "aot_eager" if INTERPRETING else "inductor"
        return torch.compile(op.reference, dynamic=False, fullgraph=True, backend=backend)
    if implementation == "liger" or implementation in op.others:
        function = op.liger if implementation == "liger" else op.others[implementation]
        return _imported(function) if device.type == "cuda" else None
    if not can_run_kernels(device):
        return None  # the public op is the reference
    return op.ways[implementation.removeprefix("ours:")] if ":" in implementation else op.public


def _imported(function: Callable[[], Callable[..., Any]] | None) -> Callable[..., Any] | None:
    try:
        return None if function is None else function()
    except ImportError:
        return None


def cost_of(case: Case, itemsize: int = 2) -> Cost:
    """Bytes and FLOPs that the case must take."""
    return OPS[case.op].total_cost(case.shape, itemsize, case.direction)


def calls_of(case: Case, device: torch.device, dtype: torch.dtype) -> list[Callable[[], Any]]:
    """The case on as many different inputs as it takes to pass the L2 cache; one, if they are far larger anyway.

    What was compiled for cases before it is forgotten: after eight shapes of a function torch.compile refuses another.
    """
    torch._dynamo.reset()
    op = implementation_of(case.op, case.implementation, device)
    assert op is not None
    moved = cost_of(case, dtype.itemsize).bytes
    copies = max(1 if moved > 16 * L2_BYTES else 2, min(16, -(-2 * L2_BYTES // moved))) if device.type == "cuda" else 2
    return [_call(case, op, Source(device, dtype, seed)) for seed in range(copies)]


def _call(case: Case, op: Callable[..., Any], source: Source) -> Callable[[], Any]:
    inputs, upstream, rest = OPS[case.op].inputs(case.shape, source)
    if case.direction == "forward":
        return lambda: op(*inputs, *rest)
    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward() -> tuple[Tensor, ...]:
        y = op(*leaves, *rest)
        return (y,) if isinstance(y, Tensor) else y

    if case.direction == "both":
        return lambda: torch.autograd.grad(forward(), leaves, upstream)
    torch._functorch.config.donated_buffer = False  # the graph is walked many times
    made = forward()
    return lambda: torch.autograd.grad(made, leaves, upstream, retain_graph=True)
