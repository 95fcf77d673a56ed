"""linear_cross_entropy without a GPU, its launchers on tensors without data: memory, no waiting, its other paths."""

import os

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")
if "TRITON_INTERPRET" in os.environ:
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from bench.compile_only import compile_only, statistics  # noqa: E402
from bench.compile_report import faults  # noqa: E402
from bench.loss import PeakBytes  # noqa: E402
from vibechat.kernels.linear_cross_entropy import rows_per_chunk  # noqa: E402
from vibechat.kernels.linear_cross_entropy_ops import WAYS, evaluate, recompute, train  # noqa: E402

MIB = 2**20
N, D, V = 65_536, 1664, 65_536  # 32 rows of 2,048 tokens at depth 26
CAPPED = (15.0, -1, 0.0)


def tensors(dtype: torch.dtype = torch.bfloat16, master: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, weight, targets and row weights."""
    meta = torch.device("meta")
    return (
        torch.empty(N, D, dtype=dtype, device=meta),
        torch.empty(V, D, dtype=master, device=meta),
        torch.empty(N, dtype=torch.int64, device=meta),
        torch.empty(N, device=meta),
    )


def test_the_default_workspace_makes_chunks_of_4096_tokens() -> None:
    assert rows_per_chunk(N, V, 2, 512 * MIB) == 4096


def test_bytes_are_counted_while_they_are_held() -> None:
    with PeakBytes() as memory:
        a = torch.empty(MIB, device="meta")
        b = torch.empty(MIB, device="meta")
        del b
        c = (a + 1).view(-1, 2)
        a.mul_(2)
    assert memory.peak == 8 * MIB
    del c
    assert memory.held() == 4 * MIB


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=str)
def test_training_takes_at_most_a_gibibyte_and_a_half(master: torch.dtype, way: str) -> None:
    """Beyond x, the weight and the targets; both gradients and the backward's scaling are in it. Nothing reads data
    on the way: a tensor on the meta device has none, so that no step waits for the device either."""
    x, weight, targets, rows = tensors(master=master)
    with compile_only() as kernels, PeakBytes() as memory:
        loss, dx, dw = train(x, weight, targets, rows, *CAPPED, 4096, way)
        forward, held = memory.peak, memory.held()
        scaled = dx * loss, dw * loss
    assert ("matmul_tma" in {kernel.metadata.name for kernel in kernels}) == (way == "fused")
    assert not [f for k in {id(k): k for k in kernels}.values() for f in faults(k.metadata.name, statistics(k))]
    assert held == dx.nbytes + dw.nbytes + loss.nbytes
    assert scaled[1].nbytes == V * D * master.itemsize
    assert memory.peak <= 1536 * MIB, f"{memory.peak / MIB:.0f} MiB"
    assert forward <= 1536 * MIB, f"{forward / MIB:.0f} MiB"


def test_evaluation_takes_its_chunk_and_no_gradient() -> None:
    x, weight, targets, _ = tensors(master=torch.bfloat16)
    with compile_only(), PeakBytes() as memory:
        evaluate(x, weight, targets, *CAPPED, 4096)
    assert memory.peak <= 513 * MIB


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("softcap", [15.0, 50.0, None])
def test_every_path_compiles_without_a_spill(dtype: torch.dtype, softcap: float | None) -> None:
    x, weight, targets, rows = (t[:4096] if t.dim() == 1 else t[:64] for t in tensors(dtype))
    x = torch.empty(4096, 64, dtype=dtype, device="meta")
    weight = torch.empty(50_257, 64, dtype=dtype, device="meta")  # no multiple of eight
    settings = softcap, -1, 1e-4, 4096
    with compile_only() as kernels:
        train(x, weight, targets, rows, *settings, "cublas")
        losses, lse = evaluate(x, weight, targets, *settings)
        recompute(x, weight, targets, losses, lse, rows, *settings, "cublas")
    assert len(kernels) == 3
    for kernel in kernels:
        assert not faults(kernel.metadata.name, statistics(kernel), ("wide_loads",))
