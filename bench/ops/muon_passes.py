"""The elementwise kernels around newton_schulz, at the shapes of its rows: to be tuned, compiled and held to budgets.

They are no op of their own: newton_schulz runs the first two on a plain stack, and Muon all three with a momentum.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.ops.entry import Launch
from bench.shapes import Source
from vibechat.kernels.muon_passes import launch_update
from vibechat.kernels.normalization import (
    FLAT_CONFIGS,
    PARTS,
    TILE_CONFIGS,
    Measured,
    Momentum,
    addresses,
    launch_measure,
    launch_normalize,
)


def _launch(
    kernel: str, key: str, name: str, run: Callable[[Any], Any], needs: tuple[str, ...] = ("wide_loads", "wide_stores")
) -> Launch:
    configs = FLAT_CONFIGS if kernel == "muon_measure" else TILE_CONFIGS
    return Launch(kernel, key, configs, run, configs[0], specialization=name, needs=needs)


def _measured(count: int, source: Source) -> Measured:
    """What the first walk leaves, or something like it."""
    peaks, squares = (source.randn(count, PARTS, dtype=torch.float32).abs() for _ in range(2))
    return Measured(peaks, squares)


def of_a_stack(x: Tensor, source: Source) -> Iterator[Launch]:
    """What normalizes a stack into x (count, m, n)."""
    stack, measured = source.randn(*x.shape), _measured(x.size(0), source)
    yield _launch("muon_measure", "", "a stack", lambda c: launch_measure(stack, None, c), ("wide_loads",))
    yield _launch("muon_normalize", "straight", "a stack", lambda c: launch_normalize(stack, x, measured, None, c))


def of_muon(x: Tensor, source: Source) -> Iterator[Launch]:
    """What steps and normalizes a momentum into x (count, m, n), and the weights by it; tall matrices transpose."""
    count, m, n = x.shape
    state, measured = source.randn(*x.shape, dtype=torch.float32), _measured(count, source)
    gradients, weights = (source.randn(*x.shape, dtype=torch.float32).unbind() for _ in range(2))
    flag, rows = (torch.zeros(size, device=x.device) for size in ((), (count, m, 1)))

    def momentum() -> Momentum:
        return Momentum(addresses(gradients, x.device), 0.95, True, flag)

    def normalizing(y: Tensor) -> Callable[[Any], Any]:
        return lambda c: launch_normalize(state, y, measured, momentum(), c)

    def updating(y: Tensor) -> Callable[[Any], Any]:
        return lambda c: launch_update(weights, y, 0.02, 0.0, None, flag, c)

    yield _launch("muon_measure", "", "momentum", lambda c: launch_measure(state, momentum(), c))
    for key, y in {"straight": x, "transposed": x.view(count, n, m).mT}.items():
        yield _launch("muon_normalize", key, f"momentum {key}", normalizing(y))
        yield _launch("muon_update", key, key, updating(y))
    every = "straight, decay and equal rows"
    yield _launch("muon_update", "straight", every, lambda c: launch_update(weights, x, 0.02, 0.1, rows, None, c))
