"""The loader's benchmark runs, and its last line is JSON."""

import json
from pathlib import Path

import pytest

from tests.test_dataset import write_parquet

pytest.importorskip("vibechat._rustbpe", reason="the compiled extension is not built")


def test_it_measures_and_ends_with_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench.loader import main

    write_parquet(tmp_path / "a.parquet", [f"some text, number {i}, to learn from" for i in range(50)])
    assert main(["--data", str(tmp_path), "--shape", "2x16", "--batches", "3", "--rounds", "1"]) == 0
    table, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    results = json.loads(last)["results"]
    assert [result["threads"] for result in results] == [1, 2, 4]
    assert all(result["tokens_per_second"] > 0 for result in results)
    assert "2x16" in table
