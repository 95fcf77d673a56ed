"""What is asked of every op of bench.ops, on any device: tests/gpu asks a GPU at real shapes, tests/interpreted asks
Triton's interpreter at small ones, so that the first GPU does not meet questions that were never asked before."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bench.ops import OPS, Inputs, Op
from bench.shapes import Shape, Source
from tests.interpreted.numerics import assert_no_worse, check
from vibechat import kernels
from vibechat.gpt import GPT, GPTConfig

KERNELS = ",".join(("torch", *dict.fromkeys(f"{op.backend_name}=triton" for op in OPS.values())))
"""The backend that insists on each of them."""


QUESTIONED = [
    way
    for op in OPS.values()
    for way in (
        [op]
        if not op.ways
        else [
            dataclasses.replace(op, name=f"{op.name}:{name}", public=public, backend=op.backend_name)
            for name, public in op.ways.items()
        ]
    )
]
"""The ops, and in place of one that chooses between ways each of its ways."""


def tensors(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (y,) if isinstance(y, Tensor) else tuple(y)


def keeps_the_rule(op: Op, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
    """Outputs and gradients against float64 and eager PyTorch."""
    leaves, upstream, rest = op.inputs(shape, Source(device, dtype))
    check(lambda *x: op.public(*x, *rest), lambda *x: op.reference(*x, *rest), leaves, list(upstream))


def passes(op: Op, shape: Shape, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """The op forward, and backward if it has one; what it returns."""
    inputs, upstream, rest = op.inputs(shape, Source(device))
    leaves = [x.detach().requires_grad_(op.differentiable) for x in inputs]

    def run() -> tuple[Tensor, ...]:
        y = tensors(op.public(*leaves, *rest))
        return (*y, *torch.autograd.grad(y, leaves, upstream)) if op.differentiable else y

    return run


def repeats_to_the_last_bit(op: Op, shape: Shape, device: torch.device) -> None:
    """Two runs on the same inputs are equal."""
    run = passes(op, shape, device)
    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def leaves_its_inputs_alone(op: Op, shape: Shape, device: torch.device) -> None:
    """Also where a kernel works in place on what it made itself."""
    inputs, upstream, rest = op.inputs(shape, Source(device))
    everything = [x for x in (*inputs, *upstream, *rest) if isinstance(x, Tensor)]
    before = [x.clone() for x in everything]
    leaves = [x.detach().requires_grad_(op.differentiable) for x in inputs]
    y = tensors(op.public(*leaves, *rest))
    if op.differentiable:
        torch.autograd.grad(y, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(everything, before, strict=True))


def compiles_whole(op: Op, shape: Shape, device: torch.device, compiler: str) -> None:
    """One graph forward and backward, and it computes what the op computes outside of one."""
    torch._dynamo.reset()
    inputs: Inputs = op.inputs(shape, Source(device))

    def value(*leaves: Tensor) -> Tensor:
        y = tensors(op.public(*(2 * x for x in leaves), *inputs.rest))
        return torch.stack([(v.float() * v.float().sin()).sum() for v in y]).sum()

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_(op.differentiable) for x in inputs.leaves]
        y = function(*leaves)
        return [y.detach(), *(torch.autograd.grad(y, leaves) if op.differentiable else ())]

    for mine, other in zip(run(torch.compile(value, fullgraph=True, backend=compiler)), run(value), strict=True):
        assert (mine.float() - other.float()).norm() <= 0.02 * other.float().norm()


# ---------------------------------------------------------------------------------------------------------------------
# a whole model

Sizes = dict[str, int]
SMALL: Sizes = {"sequence_len": 256, "vocab_size": 512, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 512}


def small_model(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> GPT:
    """The same weights each time."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**sizes)).to(device)
    model.init_weights()
    model.set_compute_dtype(dtype)
    return model


def final_loss(
    spec: str, device: torch.device, dtype: torch.dtype, data_seed: int, sizes: Sizes, steps: int, batch: int = 16
) -> float:
    """Mean loss of the last quarter of the steps, on text in which one of four tokens follows each."""
    kernels.set_backend(spec)
    model = small_model(device, dtype, sizes)
    optimizers = model.setup_optimizers()
    rng = torch.Generator().manual_seed(data_seed)
    vocabulary, length = sizes["vocab_size"], sizes["sequence_len"]
    chain = torch.randint(vocabulary, (vocabulary, 4), generator=rng)
    losses = []
    for _ in range(steps):
        tokens = [torch.randint(vocabulary, (batch,), generator=rng)]
        for choice in torch.randint(4, (length, batch), generator=rng):
            tokens.append(chain[tokens[-1], choice])
        rows = torch.stack(tokens, dim=1).to(device)
        loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses[steps * 3 // 4 :]).double().mean().item()


def trains_as_eager_does(
    device: torch.device, sizes: Sizes, steps: int = 200, train: Callable[..., float] = final_loss
) -> None:
    """Over three data seeds, the distances from float32's loss are at most 1.5 times as large as eager bfloat16's."""
    ours = eager = 0.0
    said = []
    for seed in range(3):
        truth = train("torch", device, torch.float32, seed, sizes, steps)
        plain, fused = (train(spec, device, torch.bfloat16, seed, sizes, steps) for spec in ("torch", KERNELS))
        eager, ours = eager + abs(plain - truth), ours + abs(fused - truth)
        said.append(f"float32 {truth:.5f}, eager {plain:.5f}, kernels {fused:.5f}")
    print("\n".join(said))
    assert ours <= 1.5 * eager, "; ".join(said)


def model_gradients_keep_the_rule(device: torch.device, sizes: Sizes) -> None:
    """Every parameter's gradient with the kernels, against float64 and eager bfloat16."""

    def gradients(spec: str, dtype: torch.dtype) -> dict[str, Tensor]:
        kernels.set_backend(spec)
        model = small_model(device, dtype, sizes)
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():  # at initialization half of the gradients are zero
                parameter.copy_(0.04 * torch.randn(parameter.shape, generator=rng))
        model = model.double() if dtype == torch.float64 else model
        tokens = torch.randint(sizes["vocab_size"], (2, sizes["sequence_len"] + 1), generator=rng).to(device)
        model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    truth, eager = gradients("torch", torch.float64), gradients("torch", torch.bfloat16)
    ours = gradients(KERNELS, torch.bfloat16)
    assert ours.keys() == truth.keys()
    for name in truth:
        assert_no_worse(ours[name], eager[name], truth[name])
