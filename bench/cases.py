"""The rows of the kernel benchmark: op x implementation x shape x pass, each as calls to be timed.

Implementations: `eager` (the reference), `compiled` (the reference under torch.compile), `ours` (the public op with
its kernel; where Triton runs), `liger` (where liger_kernel is installed and has the op). Passes: `forward` (without a
graph), `backward` (the graph made before) and `both`.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measure import L2_BYTES
from bench.shapes import HEAD_DIM, MODELS, Model
from vibechat import kernels
from vibechat.kernels.cost import Cost, norm_cost, qk_norm_rope_cost

OPS = ("qk_norm_rope", "add_rms_norm", "rms_norm")  # the most is gained at the first
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


def all_cases(device: torch.device) -> Iterator[Case]:
    """The most valuable rows first; small shapes on a CPU."""
    large = device.type == "cuda"
    models = tuple(reversed(MODELS)) if large else (Model(4, 256, 2),)
    length = 2048 if large else 256
    for batch in (16, 32, 1) if large else (2,):
        for direction in PASSES:
            for op in OPS:
                for model in models:
                    for implementation in IMPLEMENTATIONS:
                        if implementation_of(op, implementation, device) is not None:
                            yield Case(op, implementation, model, batch, length, direction)


@functools.cache
def implementation_of(op: str, implementation: str, device: torch.device) -> Callable[..., Any] | None:
    """The function to call, or None if this machine has none."""
    rope = importlib.import_module("vibechat.kernels.qk_norm_rope")
    norm = importlib.import_module("vibechat.kernels.rms_norm")
    references = {"qk_norm_rope": rope.reference, "add_rms_norm": norm.add_reference, "rms_norm": norm.reference}
    if implementation == "eager":
        return references[op]
    if implementation == "compiled":
        return torch.compile(references[op], dynamic=False)
    if implementation == "liger":
        return _liger(op) if device.type == "cuda" else None
    return getattr(kernels, op) if device.type == "cuda" else None  # on a CPU the public op is the reference


def _liger(op: str) -> Callable[..., Any] | None:
    try:
        if op == "rms_norm":
            rms = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        elif op == "add_rms_norm":
            rms = importlib.import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction
        else:
            return None  # it has no norm over heads with rotary in one op
    except ImportError:
        return None

    def call(*tensors: Tensor) -> Any:
        gain = torch.ones(tensors[0].size(-1), dtype=tensors[0].dtype, device=tensors[0].device)
        result = rms.apply(*reversed(tensors), gain, 2**-23, 0.0, "gemma", False)
        return tuple(reversed(result)) if isinstance(result, tuple) else result

    return call


def cost_of(case: Case, itemsize: int = 2) -> Cost:
    """Bytes and FLOPs that the case must take."""
    rows, channels = case.batch * case.length, case.model.channels

    def one(backward: bool) -> Cost:
        if case.op == "qk_norm_rope":
            heads = 2 * case.model.heads
            return qk_norm_rope_cost(case.batch, case.length, heads, HEAD_DIM, itemsize, backward=backward)
        return norm_cost(rows, channels, itemsize, residual=case.op == "add_rms_norm", backward=backward)

    forward, backward = one(False), one(True)
    both = Cost(forward.bytes + backward.bytes, forward.flops + backward.flops)
    return {"forward": forward, "backward": backward, "both": both}[case.direction]


def calls_of(case: Case, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Callable[[], Any]]:
    """The case on as many different inputs as it takes to pass the L2 cache."""
    op = implementation_of(case.op, case.implementation, device)
    assert op is not None
    moved = cost_of(case).bytes
    copies = max(2, min(16, -(-2 * L2_BYTES // moved))) if device.type == "cuda" else 2
    return [_call(case, op, device, dtype, seed) for seed in range(copies)]


def _call(case: Case, op: Callable[..., Any], device: torch.device, dtype: torch.dtype, seed: int) -> Callable[[], Any]:
    rng = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=rng, dtype=torch.float32).to(dtype)

    B, T, C, H = case.batch, case.length, case.model.channels, case.model.heads
    rest: tuple[Tensor, ...] = ()
    if case.op == "qk_norm_rope":
        q, k, _ = randn(B, T, 3 * H, HEAD_DIM).split((H, H, H), dim=2)
        inputs = [q, k]
        upstream = [randn(B, H, T, HEAD_DIM).transpose(1, 2) for _ in range(2)]
        rest = kernels.rotary_tables(T, HEAD_DIM, 10_000.0, device)
    else:
        count = 2 if case.op == "add_rms_norm" else 1
        inputs, upstream = ([randn(B, T, C) for _ in range(count)] for _ in range(2))
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
