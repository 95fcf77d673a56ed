"""prepare: what stays of a person's documents, in what form, and what the manifest says about it."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_dataset import write_jsonl, write_parquet
from vibechat.common import UserError
from vibechat.dataset import open_dataset
from vibechat.programs.prepare import main
from vibechat.sources.local import Preparation, PrepareSettings, cut_tail, documents, expand

texts = st.lists(st.text(st.sampled_from("ab\u00e9\u0301e\n"), max_size=6), max_size=30)


def prepared(out: Path) -> list[str]:
    return [text for file in sorted(out.glob("*.parquet")) for text in documents(file)]


@given(texts, st.booleans(), st.integers(0, 3), st.integers(3, 6), st.sampled_from(["none", "nfc"]))
@settings(deadline=None)
def test_what_stays_is_what_the_settings_say(
    given_texts: list[str], dedup: bool, low: int, high: int, normalize: str
) -> None:
    preparation = Preparation(PrepareSettings(dedup=dedup, min_chars=low, max_chars=high, normalize=normalize))
    kept = list(preparation(given_texts))
    expected: list[str] = []
    for text in given_texts:
        if normalize == "nfc":
            text = unicodedata.normalize("NFC", text)
        if text and low <= len(text) <= high and not (dedup and text in expected):
            expected.append(text)
    assert kept == expected
    counts = preparation.counts
    assert counts["read"] == len(given_texts)
    assert counts["kept"] == len(kept)
    assert counts["read"] == sum(counts[name] for name in ("kept", "empty", "too_short", "too_long", "duplicate"))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"normalize": "nfkc"}, "none or nfc"),
        ({"max_chars": 0}, "max_chars"),
        ({"min_chars": 5, "max_chars": 4}, "max"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        PrepareSettings(**options)


@given(st.text(min_size=2, max_size=3000))
def test_cutting_a_tail_loses_nothing(text: str) -> None:
    head, tail = cut_tail(text)
    assert head + tail == text
    assert head
    assert tail


def test_expand_sorts_and_counts_a_file_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).write_text("x")
    names = [path.relative_to(tmp_path).as_posix() for path in expand(f"{tmp_path}/**/*.txt,{tmp_path}/a.txt")]
    assert names == ["a.txt", "b.txt", "sub/c.txt"]
    (tmp_path / "with,comma.txt").write_text("x")
    assert [path.name for path in expand(f"{tmp_path}/with,comma.txt")] == ["with,comma.txt"]


def test_the_program_writes_shards_and_a_manifest(
    tmp_path: Path, base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    write_parquet(source / "a.parquet", ["one document", "twice", "e\u0301tude", None], column="body")
    write_jsonl(source / "b.jsonl", [{"body": "twice"}, {"body": "x"}, {"body": "y" * 50}])
    out = tmp_path / "out"
    flags = ["--text-column", "body", "--dedup", "--min-chars=2", "--max-chars=40", "--normalize", "nfc"]
    assert main(["--data", str(source), "--out", str(out), *flags]) == 0
    assert prepared(out) == ["one document", "twice", "\u00e9tude"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["counts"] == {
        "read": 7,
        "kept": 3,
        "empty": 1,
        "too_short": 1,
        "too_long": 1,
        "duplicate": 1,
        "normalized": 1,
        "text_bytes": 12 + 5 + 6,
    }
    assert manifest["settings"]["dedup"] is True
    assert manifest["settings"]["normalize"] == "nfc"
    assert [Path(stamp["path"]).name for stamp in manifest["settings"]["sources"]] == ["a.parquet", "b.jsonl"]
    (shard,) = manifest["shards"]["train"]
    assert shard["documents"] == 3
    assert shard["sha256"]
    printed = capsys.readouterr().out
    assert "kept      3 (1 empty, 1 too short, 1 too long, 1 duplicate)" in printed
    assert f"--data {out}" in printed
    dataset = open_dataset(str(out))
    assert (dataset.documents("train"), dataset.documents("val")) == (2, 1)


def test_preparing_twice_gives_the_same_shards(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"document {i}" * 20} for i in range(300)])
    for name in ("first", "second"):
        assert main(["--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / name)]) == 0
    first, second = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("first", "second"))
    assert first == second


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "needs --data"),
        (["--data", "IN"], "--out"),
        (["--data", "IN", "--out", "IN"], "exists already"),
        (["--data", "IN/*.csv", "--out", "OUT"], "no such files"),
        (["--data", "IN", "--out", "OUT", "--min-chars", "99"], "no document is left"),
        (["--data", "IN", "--out", "OUT", "--normalize", "nfkd"], "normalize"),
        (["--data", "IN", "--out", "IN/a.jsonl/OUT"], "cannot be written"),
    ],
)
def test_mistakes_cost_one_line_and_leave_nothing(
    tmp_path: Path, base_dir: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    write_jsonl(source / "a.jsonl", [{"text": "a"}])
    words = [flag.replace("IN", str(source)).replace("OUT", str(tmp_path / "out")) for flag in flags]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) in (["base", "in"], ["in"])
