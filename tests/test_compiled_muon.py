"""The kernels around Newton-Schulz compile for sm_90 without a GPU: no spills, wide loads, both ways round."""

import os
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
if "TRITON_INTERPRET" in os.environ:
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from bench.compile_only import compile_only, statistics  # noqa: E402
from bench.compile_report import faults  # noqa: E402
from vibechat.kernels import normalization  # noqa: E402
from vibechat.kernels.muon_passes import launch_update  # noqa: E402


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
    return torch.empty(shape, dtype=dtype, device="meta")


def hold(compiled: list[Any], count: int) -> None:
    assert len(compiled) == count
    for kernel in compiled:
        found = statistics(kernel)
        assert not faults(kernel.metadata.name, found, ("wide_loads",))
        assert found.occupancy >= 2


@pytest.mark.parametrize("shape", [(6656, 1664), (1664, 6656)], ids=str)
def test_momentum_and_normalization(shape: tuple[int, int]) -> None:
    m, n = sorted(shape)
    x = empty(52, m, n, dtype=torch.float16)
    with compile_only() as compiled:
        normalization.launch(
            empty(52, *shape),
            x.mT if shape[0] > shape[1] else x,
            gradients=[empty(*shape)] * 52,
            mu=0.95,
            nesterov=True,
            found_inf=empty(),
        )
    hold(compiled, 2)


def test_normalization_of_a_stack() -> None:
    with compile_only() as compiled:
        g = empty(104, 1664, 1664, dtype=torch.bfloat16)
        normalization.launch(g, empty(104, 1664, 1664, dtype=torch.float16))
    hold(compiled, 2)


@pytest.mark.parametrize("tall", [False, True])
def test_update(tall: bool) -> None:
    ortho = empty(52, 1664, 6656, dtype=torch.float16)
    ortho = ortho.mT if tall else ortho
    params = [empty(*ortho.shape[1:])] * 52
    with compile_only() as compiled:
        launch_update(params, ortho, 0.02, 0.0, None, empty())
        launch_update(params, ortho, 0.02, 0.1, empty(52, ortho.size(1), 1), None)
    hold(compiled, 2)
