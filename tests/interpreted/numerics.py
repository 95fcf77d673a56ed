"""The rule that every kernel's numbers keep, and inputs to hold it against.

Against float64, the relative L2 error is at most 1.5 times eager PyTorch's in the same dtype, and the largest absolute
error at most 3 times eager's largest: L2 alone hides one wrong edge of a tile. Eager's own error is taken to be at
least what rounding a random result to the dtype makes, since on a handful of numbers it can be zero by luck; in float32
the steps before it round as coarsely as the result, in another order than eager's.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Op = Callable[..., Tensor | tuple[Tensor, ...]]


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same in every dtype but for the rounding."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strided(x: Tensor, kind: str) -> Tensor:
    """The same values in another layout: "dense", "gapped" (every other element of a larger tensor, along the last
    dimension), "padded" (rows that stand apart, as in a packed projection) or "swapped" (two dimensions exchanged)."""
    if kind == "dense":
        return x.contiguous()
    if kind == "swapped":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    shape = list(x.shape)
    shape[-1] = 2 * shape[-1] if kind == "gapped" else shape[-1] + 8
    room = torch.full(shape, torch.nan, dtype=x.dtype)
    view = room[..., ::2] if kind == "gapped" else room[..., 3 : 3 + x.size(-1)]
    return view.copy_(x)


LAYOUTS = ("dense", "gapped", "padded", "swapped")


def assert_no_worse(ours: Tensor, eager: Tensor, truth: Tensor) -> None:
    """The rule, for one result of a kernel."""
    assert ours.shape == truth.shape
    assert ours.dtype == eager.dtype
    assert torch.isfinite(ours).all(), "something was not written, or not finite"
    eps = torch.finfo(eager.dtype).eps
    mine, other, truth = ours.double() - truth, eager.double() - truth, truth.double()
    everywhere, anywhere = (1.0, 1.0) if eager.dtype == torch.float32 else (0.2, 0.25)  # of eps
    bound = 1.5 * max(other.norm().item(), everywhere * eps * truth.norm().item())
    assert mine.norm() <= bound, f"L2 error {mine.norm():.3e} against eager's {other.norm():.3e}"
    largest = 3 * max(other.abs().max().item(), anywhere * eps * truth.abs().max().item())
    assert mine.abs().max() <= largest, f"largest error {mine.abs().max():.3e}, eager's {other.abs().max():.3e}"


def with_gradients(op: Op, inputs: Iterable[Tensor], upstream: Iterable[Tensor | None]) -> list[Tensor]:
    """Outputs of op(*inputs), then the gradients of the inputs under these gradients of the outputs; with no upstream
    at all, as for an op without a backward, the outputs alone."""
    upstream = list(upstream)
    leaves = [x.detach().requires_grad_(bool(upstream)) for x in inputs]
    outputs = op(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    if not upstream:
        return list(outputs)
    pairs = [(y, dy) for y, dy in zip(outputs, upstream, strict=True) if dy is not None]
    gradients = torch.autograd.grad([y for y, _ in pairs], leaves, [dy for _, dy in pairs])
    return [*(y.detach() for y in outputs), *gradients]


def shares_of_eagers_error(kernel: Op, reference: Op, inputs: list[Tensor], upstream: Tensor) -> list[float]:
    """Of the output and each gradient: the L2 error against float64, in units of eager PyTorch's."""
    truth = with_gradients(reference, [x.double() for x in inputs], [upstream.double()])
    eager = with_gradients(reference, inputs, [upstream])
    ours = with_gradients(kernel, inputs, [upstream])
    return [
        ((mine.double() - true).norm() / (other.double() - true).norm()).item()
        for mine, other, true in zip(ours, eager, truth, strict=True)
    ]


def check(kernel: Op, reference: Op, inputs: list[Tensor], upstream: list[Tensor | None]) -> None:
    """Hold a kernel's outputs and gradients to the rule, on inputs and upstream gradients of any layout."""
    ours = with_gradients(kernel, inputs, upstream)
    eager = with_gradients(reference, inputs, upstream)
    exact = [None if dy is None else dy.double() for dy in upstream]
    truth = with_gradients(reference, [x.double() for x in inputs], exact)
    for mine, other, true in zip(ours, eager, truth, strict=True):
        assert_no_worse(mine, other, true)
