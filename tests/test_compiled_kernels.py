"""Every kernel compiles for sm_90 without a GPU, spills nothing and keeps to its budget."""

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
if "TRITON_INTERPRET" in os.environ:
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from bench import compile_report  # noqa: E402
from bench.compile_only import TARGETS, Statistics, compile_only, occupancy, statistics  # noqa: E402
from bench.cost_table import cost_rows, eager_bytes  # noqa: E402
from bench.shapes import MODELS, launches  # noqa: E402
from vibechat.kernels import tuning  # noqa: E402

LAUNCHES = compile_report.all_launches()
SPECIALIZATIONS = [(launch, config) for launch in LAUNCHES for config in launch.configs]
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("launch", "config"), SPECIALIZATIONS, ids=[compile_report.name_of(*pair) for pair in SPECIALIZATIONS]
)
def test_it_compiles_for_sm_90_within_its_budget(launch: Any, config: tuning.Config) -> None:
    name, kernel = compile_report.compile_launch(launch, config)
    found = statistics(kernel)
    assert not compile_report.faults(name, found)
    budgets = compile_report.read_budgets()
    assert name in budgets["kernels"], "python -m bench.compile_report --write, and look at the diff"
    if budgets["triton"] == triton.__version__:
        expected = Statistics(**budgets["kernels"][name])
        assert found == expected, "python -m bench.compile_report --write, and look at the diff"


def test_the_budgets_name_nothing_that_is_gone() -> None:
    names = {compile_report.name_of(*pair) for pair in SPECIALIZATIONS}
    assert set(compile_report.read_budgets()["kernels"]) == names


def test_at_most_six_configurations_a_kernel() -> None:
    assert all(1 <= len(launch.configs) <= 6 for launch in LAUNCHES)


def test_what_runs_untuned_is_one_that_was_compiled() -> None:
    for launch in LAUNCHES:
        module = importlib.import_module(
            f"vibechat.kernels.{'qk_norm_rope' if 'rope' in launch.kernel else 'rms_norm'}"
        )
        assert module.default_config(launch.width) in launch.configs


def test_models_of_one_block_width_share_their_kernels() -> None:
    """What lets the gate compile each specialization once: d20 and d26 get the same machine code."""
    kernels = []
    for model in MODELS[1:]:
        for launch in launches(model, 4, "meta"):
            with compile_only() as compiled:
                launch.run(launch.configs[0])
            kernels.append(compiled[0])
    half = len(kernels) // 2
    assert all(a is b for a, b in zip(kernels[:half], kernels[half:], strict=True))


def test_the_largest_kernels_do_not_spill() -> None:
    norm = importlib.import_module("vibechat.kernels.rms_norm")
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(1, 4, norm.WIDEST, dtype=dtype, device="meta")
        rstd = torch.empty(1, 4, device="meta")
        with compile_only() as compiled:
            norm.launch_forward(x, x, 1e-6)
            norm.launch_backward(x, x, x, rstd)
        assert not [fault for k in compiled for fault in compile_report.faults(k.metadata.name, statistics(k))]


def test_a_spill_is_a_fault() -> None:
    good = Statistics(64, 0, 0, 4, 8, 0, 0, 4, 4, 0)
    assert not compile_report.faults("k", good)
    assert "registers spill" in compile_report.faults("k", good._replace(stack=16))[0]
    assert "shared memory" in compile_report.faults("k", good._replace(shared=232_449))[0]


def test_occupancy_is_what_is_scarcest() -> None:
    assert occupancy(registers=32, shared=0, warps=4) == 16  # 64 warps
    assert occupancy(registers=255, shared=0, warps=8) == 1  # 65,536 registers
    assert occupancy(registers=32, shared=100_000, warps=4) == 2  # 228 KiB


def test_another_target_gets_its_own_code() -> None:
    launch = LAUNCHES[0]
    hopper = compile_report.compile_launch(launch, launch.configs[0]).kernel
    ampere = compile_report.compile_launch(launch, launch.configs[0], "sm_80").kernel
    assert "sm_90" in hopper.asm["ptx"]
    assert "sm_80" in ampere.asm["ptx"]
    assert set(TARGETS) == {"sm_90", "sm_80", "sm_100", "sm_120", "gfx942"}


def test_eager_bytes_are_counted_op_by_op() -> None:
    x = torch.empty(4, 8, device="meta")
    assert eager_bytes(lambda x: x * 2, [x]) == (2 * 128, 2 * 128)
    assert eager_bytes(lambda x: (x * 2).relu(), [x]).forward == 4 * 128
    assert eager_bytes(lambda x: x.transpose(0, 1), [x]).forward == 0


def test_no_kernel_moves_more_than_eager() -> None:
    for row in cost_rows():
        assert row.forward.bytes <= row.eager.forward * 1.01  # ours counts the statistics too
        assert row.backward.bytes <= row.eager.backward * 1.01
        assert row.op == "rms_norm" or row.forward.bytes < 0.85 * row.eager.forward


def test_make_runs_the_interpreted_half() -> None:
    assert "TRITON_INTERPRET=1 $(RUN) pytest -n 2 tests/interpreted" in (ROOT / "Makefile").read_text()
