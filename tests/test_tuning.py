"""Measurements of a GPU, recorded: which kernels and configurations they make a run take, and what a person is told."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vibechat import base_run, kernels
from vibechat.kernels import backend, tuning
from vibechat.kernels.language import triton
from vibechat.programs import doctor

CPU = torch.device("cpu")
Record = Callable[[dict[str, Any]], torch.device]
needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A GPU that is asked for its name and its capability and for nothing else."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA G1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backend, "_requested", {})
    monkeypatch.setattr(backend, "_decided", {})
    monkeypatch.delenv("VIBECHAT_KERNELS", raising=False)
    tuning.forget()
    yield torch.device("cuda", 0)
    tuning.forget()


def record(content: dict[str, Any]) -> None:
    """As bench.tune does on this machine."""
    path = tuning.cached_file("g1")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    tuning.forget()


def times(kernel: float, eager: float, compiled: float) -> dict[str, float]:
    return {"kernel": kernel, "eager": eager, "compiled": compiled}


MIXED = {
    "ops": {
        "qk_norm_rope": {"bfloat16": {"d12": times(1, 5, 1.25), "d26": times(2, 20, 3)}},
        "add_rms_norm": {"bfloat16": {"d12": times(1, 2, 0.9), "d26": times(1, 2, 1.5)}},
        "rms_norm": {"bfloat16": {"d12": times(1, 0.99, 1.5)}},
    }
}


# ---------------------------------------------------------------------------------------------------------------------
# what is chosen


@needs_triton
def test_auto_takes_what_measured_faster_at_every_shape_and_nothing_else(gpu: torch.device) -> None:
    record(MIXED)
    table = {choice.op: choice for choice in kernels.backend_table(gpu, torch.bfloat16)}
    said = "the kernel measured 5.00x to 10.00x eager and 1.25x to 1.50x compiled"
    assert table["qk_norm_rope"] == ("qk_norm_rope", "triton", said)
    slower = table["add_rms_norm"]
    assert (slower.backend, slower.reason) == ("torch", "the kernel measured 2.00x eager and 0.90x to 1.50x compiled")
    assert table["rms_norm"].backend == "torch", "eager is faster"
    assert kernels.choose("qk_norm_rope", gpu, torch.float16).reason == backend.NEVER_MEASURED


@needs_triton
def test_equal_is_not_faster(gpu: torch.device) -> None:
    record({"ops": {"rms_norm": {"bfloat16": {"d12": times(1, 1, 1)}}}})
    assert kernels.choose("rms_norm", gpu, torch.bfloat16).backend == "torch"


@needs_triton
def test_who_insists_gets_what_was_slower(gpu: torch.device) -> None:
    record(MIXED)
    kernels.set_backend("auto,rms_norm=triton")
    assert kernels.choose("rms_norm", gpu, torch.bfloat16) == ("rms_norm", "triton", "asked for")


def test_a_kernel_for_which_memory_did_not_suffice_is_not_taken(gpu: torch.device) -> None:
    never = float("inf")
    record({"ops": {"rms_norm": {"bfloat16": {"d26": times(never, never, 1)}}}})
    verdict = tuning.verdict("rms_norm", gpu, torch.bfloat16)
    assert verdict is not None
    assert not verdict.kernel_wins
    record({"ops": {"rms_norm": {"bfloat16": {"d26": times(1, never, 2)}}}})
    verdict = tuning.verdict("rms_norm", gpu, torch.bfloat16)
    assert verdict is not None
    assert verdict.kernel_wins, "eager is what did not fit"


def test_a_tuned_configuration_is_taken(gpu: torch.device) -> None:
    record({"configs": {"rms_norm_forward": {"2048": {"rows": 4, "warps": 8}}}})
    configs = tuning.RowConfig(rows=1, warps=4), tuning.RowConfig(rows=4, warps=8)
    assert tuning.tuned_config("rms_norm_forward", "2048", configs, gpu) == configs[1]
    assert tuning.tuned_config("rms_norm_forward", "2048", configs[:1], gpu) is None, "one that no test compiled"
    assert tuning.tuned_config("rms_norm_forward", "1024", configs, gpu) is None
    assert tuning.tuned_config("rms_norm_forward", "2048", configs, CPU) is None


def test_a_launcher_takes_what_was_tuned(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from vibechat.kernels.qk_norm_rope import CONFIGS as ROPE
    from vibechat.kernels.qk_norm_rope import _config as rope_config
    from vibechat.kernels.rms_norm import CONFIGS as NORM
    from vibechat.kernels.rms_norm import _config as norm_config

    assert norm_config("rms_norm_forward", 2048, gpu) == tuning.RowConfig(1, 4)
    record(
        {
            "configs": {
                "rms_norm_forward": {"2048": tuning.as_row(NORM[-1])},
                "qk_norm_rope_backward": {"64": tuning.as_row(ROPE[-1])},
            }
        }
    )
    assert norm_config("rms_norm_forward", 2048, gpu) == NORM[-1]
    assert norm_config("rms_norm_backward", 2048, gpu) == tuning.RowConfig(1, 4)
    assert rope_config("qk_norm_rope_backward", 64, gpu) == ROPE[-1]


def test_the_fastest_way_is_taken_and_the_first_where_nobody_measured(gpu: torch.device) -> None:
    seconds = {"4096": {"fused": 2.0, "plain": 1.0, "gone": 0.1}, "8192": {"fused": 1.0, "plain": 2.0}}
    record({"choices": {"relu2_mlp": {"bfloat16": seconds}}})
    ways = "fused", "plain"
    assert tuning.tuned_choice("relu2_mlp", "4096", ways, gpu, torch.bfloat16) == "plain"
    assert tuning.tuned_choice("relu2_mlp", "8192", ways, gpu, torch.bfloat16) == "fused"
    assert tuning.tuned_choice("relu2_mlp", "1024", ways, gpu, torch.bfloat16) == "fused"
    assert tuning.tuned_choice("relu2_mlp", "4096", ways, gpu, torch.float16) == "fused"


# ---------------------------------------------------------------------------------------------------------------------
# where it stands


def test_measurements_are_found_by_the_name_of_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tuning.device_slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert tuning.device_slug("AMD Instinct MI300X") == "instinct-mi300x"
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path)
    assert tuning.read_table("h200") == {}
    (tmp_path / "h200.json").write_text('{"configs": {"a": {"1024": {"rows": 1}}}}')
    assert tuning.read_table("h200")["configs"] == {"a": {"1024": {"rows": 1}}}
    own = tuning.cached_file("h200")
    own.parent.mkdir(parents=True)
    own.write_text('{"configs": {}}')
    assert tuning.read_table("h200") == {"configs": {}}, "this machine's own come first"


@pytest.mark.parametrize("damaged", ["", "[1, 2", "7"])
@needs_triton
def test_a_damaged_file_is_named(gpu: torch.device, damaged: str) -> None:
    record({})
    tuning.cached_file("g1").write_text(damaged)
    tuning.forget()
    with pytest.raises(ValueError, match=r"g1\.json holds no measurements .* python -m bench\.tune"):
        kernels.backend_table(gpu, torch.bfloat16)
    kernels.set_backend("torch")
    assert {choice.reason for choice in kernels.backend_table(gpu, torch.bfloat16)} == {"asked for"}


def test_every_shipped_file_names_what_exists() -> None:
    """A shipped table is data about kernels of this version: ops that exist, seconds that are positive."""
    for file in tuning.SHIPPED.glob("*.json"):
        table = json.loads(file.read_text())
        assert set(table["ops"]) <= set(kernels.OPS)
        rows = [row for op in table["ops"].values() for dtype in op.values() for row in dtype.values()]
        assert all(seconds > 0 for row in rows for seconds in tuning.Measured(**row))


# ---------------------------------------------------------------------------------------------------------------------
# what a person is told


class Settings(SimpleNamespace):
    """Of a run; what is not said is None."""

    def __getattr__(self, name: str) -> None:
        return None


def said_when_a_run_starts(
    device: torch.device, spec: str, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> list[str]:
    lines: list[str] = []
    answers = {
        "compute_dtype": torch.bfloat16,
        "attention_backend": "fast",
        "set_attention": None,
        "seed_everything": None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(base_run, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(base_run, "print0", lines.append)
    run = SimpleNamespace(device=device, settings=Settings(kernels=spec, **settings))
    base_run.BaseRun._prepare_machine(run)  # type: ignore[arg-type]
    return lines


@needs_triton
def test_a_run_on_a_gpu_that_nobody_measured_says_once_how_to(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = said_when_a_run_starts(gpu, "auto", monkeypatch)
    (advice,) = [line for line in lines if "python -m bench.tune" in line]
    for op in ("rms_norm", "add_rms_norm", "qk_norm_rope"):
        assert op in advice
        (row,) = [line for line in lines if line.split()[0] == op]
        assert "torch   the kernel was never measured on this device" in row


@needs_triton
def test_a_measured_gpu_says_what_was_measured_and_gives_no_advice(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {op: {"bfloat16": {"d26": times(1, 3, 2)}} for op in kernels.OPS}
    record({"ops": rows})
    lines = said_when_a_run_starts(gpu, "auto", monkeypatch)
    assert not [line for line in lines if "bench.tune" in line]
    (row,) = [line for line in lines if line.split()[0] == "qk_norm_rope"]
    assert row.split(maxsplit=1)[1] == "triton  the kernel measured 3.00x eager and 2.00x compiled"
    assert not [line for line in said_when_a_run_starts(gpu, "torch", monkeypatch) if "bench.tune" in line]


@pytest.mark.parametrize("compile", [False, True])
@needs_triton
def test_in_fp8_the_table_says_why_norms_are_the_compilers(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, compile: bool
) -> None:
    lines = said_when_a_run_starts(gpu, "triton", monkeypatch, fp8=True, compile=compile)
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line.startswith("  ")}
    fused = "torch   in fp8 the compiler finds the largest number in the pass that makes the rows"
    assert rows["rms_norm"] == rows["add_rms_norm"] == (fused if compile else "triton  asked for")
    assert rows["qk_norm_rope"] == "triton  asked for"


@pytest.mark.parametrize("measured", [False, True])
@needs_triton
def test_doctor_says_it_too(gpu: torch.device, monkeypatch: pytest.MonkeyPatch, measured: bool) -> None:
    if measured:
        record({"ops": {op: {"bfloat16": {"d26": times(1, 3, 2)}} for op in kernels.OPS}})
    monkeypatch.setattr("vibechat.common.autodetect_device_type", lambda: "cuda")
    monkeypatch.setattr("vibechat.common.compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr("vibechat.common.compile_obstacle", lambda device: None)
    monkeypatch.setattr("vibechat.attention.attention_backend", lambda *_: "fast")
    exam = doctor.Examination()
    doctor._examine_choices(exam)
    advice = [finding for finding in exam.findings if "bench.tune" in finding.advice]
    assert len(advice) == (0 if measured else 1)
    (listed,) = [value for label, value in exam.facts["Compute"].items() if label.startswith("kernels")]
    expected = "triton (the kernel measured 3.00x" if measured else "torch (the kernel was never measured"
    assert listed.startswith(expected)
    assert listed.endswith(": every op")
