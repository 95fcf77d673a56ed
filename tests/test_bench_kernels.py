"""The benchmark of the kernels: what it times, what it writes down, how it is rendered. No times are asserted."""

import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bench import ceilings, report, tune
from bench.cases import IMPLEMENTATIONS, PASSES, Case, all_cases, calls_of, cost_of, implementation_of
from bench.measure import (
    Ceilings,
    ResultFile,
    Timing,
    command_line,
    commit_of,
    provenance,
    publish,
    results_directory,
    summarize,
    time_calls,
)
from bench.ops import OPS, Op
from bench.shapes import MODELS, Model, Shape, Source
from vibechat.kernels import tuning
from vibechat.kernels.cost import norm_cost, qk_norm_rope_cost

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_the_models_are_those_of_the_scaling_rule() -> None:
    assert (Model(12, 768, 6), Model(20, 1280, 10), Model(26, 1664, 13)) == MODELS


def test_median_and_spread() -> None:
    assert summarize([3.0, 1.0, 2.0, 100.0, 4.0]) == Timing(median=3.0, low=2.0, high=4.0)
    assert summarize([5.0]) == Timing(5.0, 5.0, 5.0)


def test_every_input_takes_its_turn() -> None:
    called: list[int] = []
    timing = time_calls([lambda i=i: called.append(i) for i in range(3)], CPU, budget_seconds=0.0)
    assert called == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]  # warm-up, estimate, then at least five
    assert timing.low <= timing.median <= timing.high


def test_what_a_run_overwrites_is_put_back_each_time() -> None:
    log: list[str] = []
    calls, prepare = [lambda: log.append("a"), lambda: log.append("b")], [lambda: log.append("restore a"), None]
    time_calls(calls, CPU, 0.0, prepare)
    assert log[:6] == ["restore a", "a", "b"] * 2
    assert log.count("restore a") == log.count("a") > log.count("b") > 2


def test_a_gpu_is_kept_busy_while_the_host_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the events of a short call have no launching between them."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("mark")

        def elapsed_time(self, other: "Event") -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep" if cycles > 0 else "nothing"))
    timing = time_calls([lambda: log.append("call")], torch.device("cuda"), 0.0, [lambda: log.append("prepare")])
    assert timing == Timing(0.002, 0.002, 0.002)
    once = ["prepare", "call"]
    assert log == [*once, "wait", *once, "wait", "sleep", *["prepare", "mark", "call", "mark"] * 5, "wait"]


def test_every_shape_of_a_function_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile stops at eight of a function, and what it is then asked for runs eagerly or not at all."""
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, backend, **options: real(f, backend=compiler, **options))
    implementation_of.cache_clear()
    for length in range(4, 14):
        for call in calls_of(Case("rms_norm", "compiled", Model(1, 16, 1), 1, length, "forward"), CPU, torch.float32):
            call()
    implementation_of.cache_clear()
    assert len(graphs) == 10


@pytest.mark.parametrize(("op", "direction"), [(op.name, direction) for op in OPS.values() for direction in op.passes])
def test_a_case_runs_and_gives_what_the_pass_gives(op: str, direction: str) -> None:
    calls = calls_of(Case(op, "eager", Model(1, 128, 1, 512), 1, 4, direction), CPU, torch.float32)
    assert len(calls) == 2
    results = [call() for call in calls]
    for result in results:
        flat = [result] if isinstance(result, torch.Tensor) else result
        inputs = OPS[op].inputs(Shape(Model(1, 128, 1, 512), 1, 4), Source(CPU))
        outputs = len(inputs.upstream) if OPS[op].differentiable else len(inputs.leaves)
        assert len(flat) == (outputs if direction == "forward" else len(inputs.leaves))
        assert all(torch.isfinite(x).all() and x.abs().max() > 0 for x in flat)
    first, second = (r if isinstance(r, torch.Tensor) else r[0] for r in results)
    assert not torch.equal(first, second), "the inputs are the same"


def test_the_suite_is_ops_times_implementations_times_shapes_times_passes() -> None:
    cases = list(all_cases(CPU))
    assert {(case.op, case.direction) for case in cases} == {(op.name, way) for op in OPS.values() for way in op.passes}
    assert {case.direction for case in cases} == set(PASSES)
    assert {case.implementation for case in cases} == {"eager", "compiled"} < set(IMPLEMENTATIONS)
    assert len({case.name for case in cases}) == len(cases)


def test_costs_are_the_docstrings() -> None:
    model = Model(12, 768, 6)
    forward = norm_cost(2 * 16, 768, 2, residual=True)
    backward = norm_cost(2 * 16, 768, 2, residual=True, backward=True)
    assert cost_of(Case("add_rms_norm", "ours", model, 2, 16, "forward")) == forward
    assert cost_of(Case("add_rms_norm", "ours", model, 2, 16, "both")).bytes == forward.bytes + backward.bytes
    rope = cost_of(Case("qk_norm_rope", "ours", model, 2, 16, "backward"))
    assert rope == qk_norm_rope_cost(2, 16, 12, 128, 2, backward=True)


def test_rows_survive_a_run_that_is_cut_off(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "rows.json", CPU, Ceilings(1.0, 2.0))
    for index in range(3):
        results.add({"index": index})
        content = json.loads((tmp_path / "rows.json").read_text())
        assert [row["index"] for row in content["rows"]] == list(range(index + 1))
    assert content["ceilings"] == {"copy_bytes_per_second": 1.0, "matmul_flops_per_second": 2.0}
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.json"]


def test_a_number_says_where_it_comes_from() -> None:
    said = provenance(CPU)
    assert {"device", "commit", "command", "torch", "triton", "python", "time"} <= said.keys()
    assert said["torch"] == torch.__version__


def test_what_benchmarks_write_makes_no_tree_dirty(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        own = ["-c", "user.name=a test", "-c", "user.email=a@test"]
        return subprocess.check_output(["git", *own, *arguments], cwd=tmp_path, text=True, stderr=subprocess.STDOUT)

    assert commit_of(tmp_path) == "unknown"
    git("init", "--quiet")
    assert commit_of(tmp_path) == "unknown"  # without a commit
    written = [tmp_path / "bench" / name for name in ("results/cpu/mfu.json", "baselines/cpu.json", "mfu.py")]
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("0")
    git("add", "--all")
    git("commit", "--quiet", "--message", "all of it")
    commit = git("rev-parse", "--short", "HEAD").strip()
    (tmp_path / "notes.txt").write_text("untracked")
    for path, expected in zip(written, (commit, commit, f"{commit}-dirty"), strict=True):
        path.write_text("1")
        assert commit_of(tmp_path / "bench") == expected


def test_a_command_is_what_was_typed_wherever_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    program = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", program)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench/mfu.py", "--depth", "4", "two words"])
    assert command_line() == "python mfu.py --depth 4 'two words'"
    program.__spec__ = ModuleSpec("bench.mfu", None)
    assert command_line() == "python -m bench.mfu --depth 4 'two words'"
    program.__spec__ = ModuleSpec("pytest.__main__", None)
    assert command_line().startswith("python -m pytest --depth")


def test_out_is_where_results_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "here"))
    assert results_directory(CPU) == tmp_path / "here"


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    results = ResultFile(tmp_path / "kernels.json", CPU, Ceilings(4e12, 8e14))
    for implementation, seconds in (("ours", 1e-4), ("eager", 5e-4)):
        case = Case("qk_norm_rope", implementation, MODELS[2], 16, 2048, "both")
        row = {**case._asdict(), "model": "d26", **Timing(seconds, seconds * 0.9, seconds * 1.1)._asdict()}
        results.add(
            {**row, "bandwidth_share": 1e-4 / seconds * 0.9, "matmul_share": 0.2, "peak_extra_bytes": 3 * 2**20}
        )
    results.add({**Case("qk_norm_rope", "liger", MODELS[2], 16, 2048, "both")._asdict(), "error": "out of memory"})
    results.content["rows"][-1]["model"] = "d26"
    results.write()
    return tmp_path / "kernels.json"


def test_report_renders_a_table_and_a_plot(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(recorded)]) == 0
    page = capsys.readouterr().out
    assert "| both | qk_norm_rope | 16 | d26 | eager | 500.0 (450.0 to 550.0) | 20% of matmul | 5.00x | 3 |" in page
    assert "| both | qk_norm_rope | 16 | d26 | ours | 100.0 (90.0 to 110.0) | 90% of copy | 1.00x | 3 |" in page
    assert "| both | qk_norm_rope | 16 | d26 | liger | out of memory | | | |" in page
    assert "copy 4.000 TB/s" in page
    assert recorded.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_report_of_nothing_says_how_to_make_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.main([]) == 2
    assert "pytest bench --benchmark-only" in capsys.readouterr().err
    (tmp_path / "kernels.json").write_text("{}")
    assert report.main([str(tmp_path / "kernels.json")]) == 2
    assert "is no recorded benchmark" in capsys.readouterr().err


def test_what_tune_writes_is_what_the_backend_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    path = tuning.cached_file("gpu-of-mine")
    times = {"kernel": 1.0, "eager": 5.0, "compiled": 2.0}
    config = tuning.RowConfig(2, 4)
    publish(
        path,
        {
            "configs": {"rms_norm_forward": {"2048": tuning.as_row(config)}},
            "ops": {"rms_norm": {"bfloat16": {"d12": times, "d26": times | {"compiled": 3.0}}}},
        },
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of mine")
    tuning.forget()
    gpu = torch.device("cuda", 0)
    assert tuning.tuned_config("rms_norm_forward", "2048", (config,), gpu) == config
    assert tuning.tuned_config("rms_norm_forward", "2048", (tuning.RowConfig(1, 4),), gpu) is None, "of another version"
    verdict = tuning.verdict("rms_norm", gpu, torch.bfloat16)
    assert verdict is not None
    assert verdict.kernel_wins
    assert verdict == ((5.0, 5.0), (2.0, 3.0))
    assert tuning.verdict("rms_norm", gpu, torch.float16) is None
    tuning.forget()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_without_a_gpu_says_so() -> None:
    with pytest.raises(Exception, match="needs a GPU"):
        tune.main([])


def test_a_kernel_that_fails_costs_tune_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def configs(op: Op, *_: object) -> dict[str, int]:
        if op.name == "rms_norm":
            raise RuntimeError("ptxas fails")
        return {op.name: 1}

    monkeypatch.setattr(tune, "can_run_kernels", lambda device: True)
    monkeypatch.setattr(tune, "best_configs", configs)
    monkeypatch.setattr(tune, "best_ways", lambda op, *_: {})
    monkeypatch.setattr(tune, "against_plain", lambda op, *_: {op.name: 2})
    monkeypatch.setattr(tune.kernels, "set_backend", lambda spec: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--out", str(tmp_path), "--ops", "rms_norm", "qk_norm_rope"]) == 1
    (file,) = tmp_path.glob("tuned-*.json")
    content = json.loads(file.read_text())
    assert content["configs"] == {"qk_norm_rope": 1}
    assert content["ops"] == {"qk_norm_rope": 2, "rms_norm": 2}
    errors = capsys.readouterr().err
    assert "RuntimeError: ptxas fails" in errors
    dtype = tune.usual_dtype(CPU)
    assert errors.endswith(f"error: not measured, see above: configs of rms_norm in {dtype}\n")


def test_the_matmuls_are_the_model_s() -> None:
    matmuls = list(ceilings.model_matmuls(16))
    assert len(matmuls) == 3 * 5 * 3
    assert matmuls[0] == ("d26 qkv", 32_768, 3 * 1664, 1664)  # the most valuable first
    by_name = {m.name: m for m in matmuls}
    assert by_name["d12 down dw"][1:] == (768, 4 * 768, 32_768)


def test_benches_and_the_core_need_no_command_line_library_and_no_extension() -> None:
    """The machine with the GPU has torch, triton and pytest, and little else."""
    code = """
import sys, torch
for name in ("tyro", "rich", "vibechat._rustbpe", "liger_kernel", "pyarrow", "tokenizers", "matplotlib"):
    sys.modules[name] = None
import bench.cases, bench.ceilings, bench.ops, bench.mfu, bench.report, bench.tune
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
