"""The tokenizer's benchmark: that it measures what it says, not how fast anything is."""

import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench import tokenizer as bench


@pytest.fixture
def files(tmp_path: Path) -> Path:
    texts = [f"document {i} of many, which tells of {i * i} things\n" * 5 for i in range(60)]
    pq.write_table(pa.table({"text": texts[:20], "other": ["x"] * 20}), tmp_path / "a.parquet")
    lines = [json.dumps({"text": text}) for text in texts[10:30]]
    (tmp_path / "b.jsonl").write_text("\n".join([*lines, json.dumps({"messages": ["hello"]})]) + "\n")
    (tmp_path / "c.txt").write_text(texts[40])
    return tmp_path


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark sets these for its process."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "2")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")


def test_corpus_holds_each_document_once_in_a_fixed_order(files: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "python_sources", lambda: iter(["import this\n", "import that\n", "import this\n"]))
    patterns = [str(files / "*.parquet"), str(files / "b*"), str(files / "*.txt")]
    corpus = bench.load_corpus(patterns, "text", 10**6)
    # the parquet file, ten more of the jsonl file, its other line, the text, and Python's two
    assert len(corpus) == len(set(corpus)) == 20 + 10 + 1 + 1 + 2
    assert bench.load_corpus(patterns, "text", 10**6) == corpus
    given = [text for path in map(str, files.iterdir()) for text in bench.documents_of(path, "text")]
    assert set(corpus) == {*given, "import this\n", "import that\n"}


def test_python_sources_are_real():
    assert sum(map(len, itertools.islice(bench.python_sources(), 50))) > 50_000


def test_corpus_stops_at_its_limit_and_skips_nothing_before():
    texts = ["ab", "", "ab", "cd", "é", "ef", "gh"]
    assert bench.distinct(texts, 6) == ["ab", "cd", "é"]
    assert bench.distinct(texts, 1000) == ["ab", "cd", "é", "ef", "gh"]
    assert bench.distinct(["\ud800"], 10) == ["?"]


def test_a_pattern_without_files_is_one_line():
    with pytest.raises(SystemExit, match="no such file"):
        bench.load_corpus(["/nonexistent/*.parquet"], "text", 1000)


def test_turns_alternate(monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []
    work = {name: (lambda name=name: order.append(name)) for name in ("vibechat", "a", "b")}
    times = bench.take_turns(lambda: work, 3)
    assert order == ["vibechat", "a", "b", "b", "a", "vibechat", "vibechat", "a", "b"]
    assert {name: len(own) for name, own in times.items()} == {"vibechat": 3, "a": 3, "b": 3}


def test_ratios_are_medians_of_rounds():
    times = {"vibechat": [1.0, 2.0, 4.0], "rustbpe": [2.0, 2.8, 100.0], "other": [1.0, 1.0, 1.0]}
    ours, theirs, other = bench.rows_of("train", 2, 8.0, times)
    assert (ours["seconds"], ours["megabytes_per_second"], ours["bar"]) == (2.0, 4.0, None)
    assert (theirs["vibechat_is_faster_by"], theirs["bar"], theirs["met"]) == (2.0, 1.5, True)
    assert (other["vibechat_is_faster_by"], other["bar"]) == (0.5, None)
    slow = bench.rows_of("train", 2, 8.0, {"vibechat": [1.0], "rustbpe": [1.4]})[1]
    assert not slow["met"]


def test_the_whole_of_it_on_a_little_text(files: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--data", str(files / "*"), "--max-mb", "0.007", "--vocab-size", "400", "--rounds", "1"]
    assert bench.main([*arguments, "--threads", "2", "--json"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert record["vocab_size"] == 400
    assert record["command"].startswith("python -m bench.tokenizer --data")
    assert {(row["task"], row["threads"], row["library"]) for row in record["rows"]} >= {
        ("train", 2, "vibechat"),
        ("train", 2, "rustbpe"),
        ("train", 2, "tokenizers"),
        ("encode", 2, "tiktoken"),
        ("encode, 128 at a time", 2, "tiktoken"),
        ("encode", 1, "tiktoken"),
    }
    assert sum(line.startswith(("train", "encode")) for line in table) == len(record["rows"])


def test_check_fails_where_a_bar_is_missed(monkeypatch: pytest.MonkeyPatch, files: Path):
    monkeypatch.setattr(bench, "BARS", {("train", "rustbpe"): 1e9})
    arguments = ["--data", str(files / "*"), "--max-mb", "0.007", "--vocab-size", "300", "--rounds", "1"]
    assert bench.main([*arguments, "--threads", "1"]) == 0
    assert bench.main([*arguments, "--threads", "1", "--check"]) == 1
