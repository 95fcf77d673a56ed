"""The shared matmul compiles for sm_90 without a GPU as it is meant to run: one loop, wgmma, TMA, no spills."""

import os
import re
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
if "TRITON_INTERPRET" in os.environ:
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from bench.compile_only import Statistics, compile_only, statistics  # noqa: E402
from bench.compile_report import faults, read_budgets  # noqa: E402
from vibechat.kernels.matmul import DEFAULT, MatmulConfig, launch  # noqa: E402


def compiled(config: MatmulConfig, dtype: torch.dtype = torch.bfloat16, b_is_kn: bool = False) -> Any:
    """The plain product at the sizes of a d26 up-projection."""
    a = torch.empty(65_536, 1664, dtype=dtype, device="meta")
    b = torch.empty((1664, 6656) if b_is_kn else (6656, 1664), dtype=dtype, device="meta")
    with compile_only() as kernels:
        launch(a, b, b_is_kn=b_is_kn, config=config)
    return kernels[0]


def hold(name: str, found: Statistics, config: MatmulConfig) -> None:
    """What is asked of every matmul."""
    assert not faults(name, found, ("wgmma", "tma_loads", "tma_stores"))
    assert (found.tma_loads, found.tma_stores) == (
        2 * config.stages,
        config.split,
    )  # all stages but one before the loop
    assert found.wide_loads == found.mma == 0
    assert found.occupancy >= config.per_sm, f"{found.occupancy} programs fit on an SM, {config.per_sm} are meant to"


@pytest.mark.parametrize(("dtype", "b_is_kn"), [(torch.float16, False), (torch.bfloat16, True)], ids=str)
def test_other_operands(dtype: torch.dtype, b_is_kn: bool) -> None:
    hold("matmul", statistics(compiled(DEFAULT, dtype, b_is_kn)), DEFAULT)


def test_the_loop_over_tiles_is_flattened_into_the_loop_over_k() -> None:
    """What lets a tile's first loads overlap with the last tile's stores."""
    assert len(re.findall(r"\bscf\.for\b", compiled(DEFAULT).asm["ttgir"])) == 1


def test_as_many_programs_share_an_sm_as_are_meant_to() -> None:
    """Of every kernel of the budgets that is launched so, ops' own with their hooks."""
    rows = [(name, row) for name, row in read_budgets()["kernels"].items() if "per_sm=" in name]
    assert rows
    for name, row in rows:
        assert row["occupancy"] >= int(name.rpartition("per_sm=")[2]), name


def test_a_pieces_width() -> None:
    assert DEFAULT.piece == 128
    assert DEFAULT._replace(split=4).piece == 64
