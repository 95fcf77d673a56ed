"""bench.orthogonalization: what it holds newton_schulz to. No time is asserted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import orthogonalization, tune
from bench.measure import Ceilings
from bench.orthogonalization import Row, errors, first_call, ill_conditioned
from bench.shapes import Model, Scale
from vibechat.common import UserError
from vibechat.kernels.language import triton
from vibechat.kernels.newton_schulz import standard_form

CPU = torch.device("cpu")
TINY = Model(1, 16, 1, 64)


def test_a_bar_is_the_most_or_the_least_that_will_do() -> None:
    assert [Row("time", value, "ms", 30).met for value in (29, 30, 31)] == [True, True, False]
    assert [Row("ratio", value, "x", 1.9, least=True).met for value in (1.8, 1.9, 2)] == [False, True, True]
    assert Row("roofline", 23.7, "ms").met is None
    assert Row("time", 31, "ms", 30).line(judged=True).endswith("at most 30: MISSED")
    assert Row("ratio", 2, "x", 1.9, least=True).line(judged=True).endswith("at least 1.9: met")
    assert Row("time", 31, "ms", 30).line(judged=False).endswith("at most 30")


def test_every_bar_is_measured_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(orthogonalization, "scale_of", lambda device: Scale((TINY,), 8, 2))
    monkeypatch.setattr(orthogonalization, "measure_ceilings", lambda *_: Ceilings(1e9, 1e9))
    monkeypatch.setattr(orthogonalization, "first_calls", lambda device: iter([("empty", 4.0), ("full", 6.0)]))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert orthogonalization.main([]) == 0
    rows = json.loads((tmp_path / "orthogonalization.json").read_text())["rows"]
    bars = {row["what"]: row["bar"] for row in rows if row["bar"] is not None}
    assert sorted(bars.values()) == [0.5] * 4 + [1.35, 1.9, 5, 5, 30]
    assert all(row["value"] > 0 and row["met"] is None for row in rows), "judged, and this is no H200"
    flops = 4 * 30 * 16**3 + 2 * 70 * 16**3  # of the plain forms: four square matrices, two of 16 x 64
    assert next(row["value"] for row in rows if "measured matmul" in row["what"]) == pytest.approx(flops / 1e6)
    page = capsys.readouterr().out
    assert all(row["what"] in page for row in rows)


def test_errors_are_those_of_each_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIBECHAT_DTYPE", "float32")
    found = list(errors(TINY, CPU, standard_form))
    assert [what for what, *_ in found] == [f"{s}, {k}" for s in ("square", "4:1") for k in ("normal", "1 to 1e-3")]
    assert all(0 < ours < 1e-3 < 0.01 < bfloat16 < 0.5 for _, ours, bfloat16 in found)


def test_singular_values_from_1_to_a_thousandth() -> None:
    values = torch.linalg.svdvals(ill_conditioned(torch.randn(1, 12, 40, generator=torch.Generator().manual_seed(0))))
    torch.testing.assert_close(values[0], torch.logspace(0, -3, 12), atol=1e-5, rtol=1e-3)


@pytest.mark.skipif(triton is None or torch.cuda.is_available(), reason="Triton compiles, and there is no GPU")
def test_without_a_gpu_the_first_call_is_compiled_and_not_run() -> None:
    assert 0 < first_call(Model(1, 128, 1), CPU) < 60


@pytest.mark.parametrize("failing", [True, False])
def test_two_processes_share_a_cache_that_was_empty(failing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[Path] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        caches.append(Path(env["TRITON_CACHE_DIR"]))
        assert command[1:] == ["-m", "bench.orthogonalization", "--first-call", "cpu"]
        assert "TRITON_INTERPRET" not in env
        assert len(list(caches[-1].iterdir())) == len(caches) - 1
        (caches[-1] / "kernel").touch()
        return type("Done", (), {"returncode": failing, "stdout": "said\n1.5\n", "stderr": "Traceback\nno space"})()

    monkeypatch.setattr(orthogonalization.subprocess, "run", run)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    calls: Callable[[], Any] = lambda: list(orthogonalization.first_calls(CPU))  # noqa: E731
    if failing:
        with pytest.raises(UserError, match="the first call failed: no space"):
            calls()
    else:
        assert calls() == [("empty", 1.5), ("full", 1.5)]
        assert caches[0] == caches[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_op_of_several_rows_is_tuned_by_its_own_name() -> None:
    with pytest.raises(UserError, match="needs a GPU"):  # and not: invalid choice
        tune.main(["--ops", "newton_schulz"])
