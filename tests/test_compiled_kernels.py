"""Every kernel compiles for sm_90 without a GPU, spills nothing and keeps to its budget."""

import dataclasses
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
from bench.ops import OPS, Launch  # noqa: E402
from bench.shapes import MODELS, Shape, Source  # noqa: E402
from vibechat.kernels import tuning  # noqa: E402

LAUNCHES = compile_report.all_launches()
SPECIALIZATIONS = [(launch, config) for launch in LAUNCHES for config in launch.configs]
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("launch", "config"), SPECIALIZATIONS, ids=[launch.name(c) for launch, c in SPECIALIZATIONS])
def test_it_compiles_for_sm_90_within_its_budget(launch: Launch, config: Any) -> None:
    name, kernel = compile_report.compile_launch(launch, config)
    found = statistics(kernel)
    assert not compile_report.faults(name, found, launch.needs)
    budgets = compile_report.read_budgets()
    assert name in budgets["kernels"], "python -m bench.compile_report --write, and look at the diff"
    if budgets["triton"] == triton.__version__:
        expected = Statistics(**budgets["kernels"][name])
        assert found == expected, "python -m bench.compile_report --write, and look at the diff"


def test_the_budgets_name_nothing_that_is_gone() -> None:
    names = {launch.name(config) for launch, config in SPECIALIZATIONS}
    assert len(names) == len(SPECIALIZATIONS)
    assert set(compile_report.read_budgets()["kernels"]) == names


def test_at_most_six_configurations_a_kernel() -> None:
    assert all(1 <= len(launch.configs) <= tuning.MOST_CONFIGS for launch in LAUNCHES)


def test_what_runs_untuned_is_one_that_was_compiled() -> None:
    for launch in LAUNCHES:
        assert launch.default in launch.configs
        with compile_only() as kernels:
            launch.run(None)
            launch.run(launch.default)
        assert kernels[0] is kernels[1]


def test_launches_of_one_specialization_share_their_machine_code() -> None:
    """What lets the gate compile each specialization once: d20 and d26 get the same machine code, say."""
    compiled: dict[tuple[str, str], Any] = {}
    for op in OPS.values():
        for model in MODELS:
            for launch in op.launches(Shape(model, op.batches[0]), Source("meta")):
                with compile_only() as kernels:
                    launch.run(launch.default)
                first = compiled.setdefault((launch.kernel, launch.specialization or launch.key), kernels[0])
                assert kernels[0] is first, f"{launch.kernel} at d{model.depth} is another kernel"


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
    good = Statistics(64, 0, 0, 4, 8, 0, 0, 0, 0, 4, 4, 0)
    assert not compile_report.faults("k", good)
    assert "registers spill" in compile_report.faults("k", good._replace(stack=16))[0]
    assert "shared memory" in compile_report.faults("k", good._replace(shared=232_449))[0]
    assert "no block fits" in compile_report.faults("k", good._replace(occupancy=0))[0]


def test_what_a_kernel_needs_and_has_not_is_a_fault() -> None:
    good = Statistics(64, 0, 0, 4, 8, 32, 0, 2, 1, 0, 0, 0)
    assert not compile_report.faults("k", good, ("wgmma", "tma_loads", "tma_stores"))
    assert compile_report.faults("k", good._replace(wgmma=0), ("wgmma", "tma_loads")) == ["k: no wgmma"]
    assert compile_report.faults("k", good, ("wide_loads",)) == ["k: no wide loads"]


def test_what_cannot_be_compiled_is_a_row_and_on_sm_90_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(config: Any) -> None:
        raise RuntimeError("PassManager::run\n  failed")

    broken = dataclasses.replace(LAUNCHES[0], run=crash, configs=LAUNCHES[0].configs[:1])
    monkeypatch.setattr(compile_report, "all_launches", lambda: [broken])
    monkeypatch.setattr(compile_report, "cost_lines", list)
    assert compile_report.main([]) == 1
    assert "cannot be compiled: PassManager::run failed" in capsys.readouterr().out
    assert compile_report.main(["--target", "sm_100"]) == 0
    assert compile_report.main(["--target", "gfx942"]) == 0
    assert capsys.readouterr().out.count("cannot be compiled") == 2


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
    rows = cost_rows()
    for row in rows:
        assert row.ours.bytes <= row.eager_bytes * 1.01  # ours counts the statistics too
        assert row.op == "rms_norm" or row.direction == "backward" or row.ours.bytes < 0.85 * row.eager_bytes
    assert {row.op for row in rows} == set(OPS)


def test_make_runs_the_interpreted_half() -> None:
    assert "TRITON_INTERPRET=1 $(RUN) pytest -n 2 tests/interpreted" in (ROOT / "Makefile").read_text()
