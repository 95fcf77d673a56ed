"""The benchmark of attention: its FLOPs, its rows, and that what is not there is said, not skipped."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import attention
from bench.shapes import MODELS, Model
from vibechat import attention as ways

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ways, "_requested", None)
    yield
    ways._order.close()
    ways._prepared.clear()


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100], ids=str)
def test_flops_are_those_of_the_keys_that_are_seen(window: int | None) -> None:
    shape = attention.Shape(Model(4, 64, 2), 3, 7, 32)
    pairs = int(ways.seen_keys(7, 7, CPU, window=window).sum())
    assert shape.flops(window, backward=False) == 2 * 2 * 3 * 2 * 32 * pairs  # q k^T and p v, 2 a multiply-add
    assert shape.flops(window, backward=True) == 3.5 * shape.flops(window, backward=False)


def test_the_field_notes_table_of_d26() -> None:
    """26 layers, 32 rows: 11.6 TFLOP forward."""
    layer = attention.Shape(MODELS[-1], 32, 2048, 128)
    assert 26 * layer.flops(None, backward=False) == pytest.approx(11.6e12, rel=0.01)


def test_every_way_has_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(attention, "time_calls", lambda calls, device: [call() for call in calls] and _Timing())
    monkeypatch.setattr(attention, "measure_ceilings", lambda device: ways_ceilings())
    assert attention.main(["--length", "16"]) == 0
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert [(row["pass"], row["way"]) for row in rows] == [(p, w) for p in ("both", "fwd") for w in attention.WAYS]
    for row in rows:
        assert ("tflops" in row) == (row["way"] in ("auto", "sdpa"))
        assert "it needs a CUDA GPU" in row.get("error", "it needs a CUDA GPU")


class _Timing:
    median = 1.0

    def _asdict(self) -> dict[str, float]:
        return {"median": 1.0, "low": 1.0, "high": 1.0}


def ways_ceilings() -> object:
    from bench.measure import Ceilings

    return Ceilings(1e9, 1e12)
