"""The built-in corpus: real text of this Python, split by module without overlap, the same each time."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vibechat.dataset import open_dataset
from vibechat.sources import builtin
from vibechat.sources.builtin import (
    WINDOW,
    cut,
    is_table,
    module_key,
    shared_fractions,
    validation_modules,
    window_hashes,
)
from vibechat.sources.shards import HashCache

Corpus = tuple[list[str], list[str], dict[str, int]]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return builtin.corpus()


@pytest.mark.xdist_group("builtin")
def test_there_is_enough_and_of_all_three_kinds(corpus: Corpus) -> None:
    train, val, counts = corpus
    assert counts["train_bytes"] > 5_000_000
    assert 200_000 < counts["val_bytes"] < 0.15 * counts["train_bytes"]
    assert counts["train_documents"] == len(train)
    assert counts["val_documents"] == len(val)
    assert any("class JSONDecoder" in text for text in train + val)  # a source
    assert any("acos(x, /)" in text for text in train + val)  # a compiled module's docstrings
    assert any("Arithmetic conversions" in text for text in train + val) or sys.version_info < (3, 9)  # a topic
    assert not any("unittest.main()" in text and "test.support" in text for text in train)


@pytest.mark.xdist_group("builtin")
def test_validation_shares_little_with_training(corpus: Corpus) -> None:
    train, val, counts = corpus
    assert counts["val_dropped"] > 0
    windows = set()
    for text in train:
        content = text.encode()
        windows.update(content[i : i + WINDOW] for i in range(0, len(content) - WINDOW + 1, WINDOW))
    # Any run of 2 * WINDOW - 1 shared bytes holds one of the aligned windows above.
    for text in val:
        content = text.encode()
        shared = sum(content[i : i + WINDOW] in windows for i in range(len(content) - WINDOW + 1))
        assert shared <= 0.05 * len(content)


@pytest.mark.xdist_group("builtin")
def test_no_document_is_in_twice_and_none_is_tiny(corpus: Corpus) -> None:
    train, val, _ = corpus
    assert len(set(train) | set(val)) == len(train) + len(val)
    assert min(map(len, train + val)) >= builtin.MIN_CHARS


@pytest.mark.slow
@pytest.mark.xdist_group("builtin")
def test_it_is_the_same_in_another_process(corpus: Corpus) -> None:
    program = (
        "import hashlib, json; from vibechat.sources.builtin import corpus\n"
        "print(hashlib.sha256(json.dumps(corpus()).encode()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == hashlib.sha256(json.dumps(corpus).encode()).hexdigest()


@pytest.mark.xdist_group("builtin")
def test_it_is_built_once_and_again_for_another_python(
    corpus: Corpus, base_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(builtin, "corpus", lambda: corpus)
    first = open_dataset()
    dropped = corpus[2]["val_dropped"]
    assert f"dropped {dropped} validation documents that share text with training" in capsys.readouterr().out
    assert list(first.iter_texts("val")) == corpus[1]
    assert list(first.iter_texts("train")) == corpus[0]
    assert len(first.row_groups("train")) >= 64  # a lane each
    assert first.manifest["notes"]["python"] == builtin.python_version()

    again = open_dataset("builtin")
    assert capsys.readouterr().out == ""
    assert again.manifest == first.manifest
    assert not list((base_dir / "data").glob(".builtin.*"))

    monkeypatch.setattr(builtin, "python_version", lambda: "CPython 4.0")
    other = open_dataset("builtin", progress=False)
    assert capsys.readouterr().out == ""
    assert other.manifest["notes"]["python"] == "CPython 4.0"
    assert other.fingerprint == first.fingerprint


def test_a_library_without_sources_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(builtin, "sources", lambda: iter([]))
    with pytest.raises(builtin.UserError, match=r"no sources of its standard library.*--data"):
        builtin.open_or_build(tmp_path / "builtin", HashCache(tmp_path / "hashes.json"))
    assert not (tmp_path / "builtin").exists()


# ---------------------------------------------------------------------------------------------------------------------
# the pieces


@given(st.binary(max_size=400))
def test_window_hashes_are_equal_where_windows_are(content: bytes) -> None:
    content = content + content[:120] + b"x" + content
    hashes = window_hashes(content).tolist()
    windows = [content[i : i + WINDOW] for i in range(len(content) - WINDOW + 1)]
    assert len(hashes) == len(windows)
    assert len(set(hashes)) == len(set(windows))
    assert len(set(zip(hashes, windows, strict=True))) == len(set(windows))


def naive_fraction(text: str, others: list[str]) -> float:
    content, theirs = text.encode(), [other.encode() for other in others]
    shared = [False] * len(content)
    for i in range(len(content) - WINDOW + 1):
        if any(content[i : i + WINDOW] in other for other in theirs):
            shared[i : i + WINDOW] = [True] * WINDOW
    return sum(shared) / len(content) if content else 0.0


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_shared_fractions_equal_a_slow_count(seed: int) -> None:
    rng = random.Random(seed)
    pieces = ["".join(rng.choices("abcdé\n", k=rng.choice([5, 40, 70, 130]))) for _ in range(8)]
    texts, others = (["".join(rng.choices(pieces, k=rng.randrange(4))) for _ in range(4)] for _ in range(2))
    assert shared_fractions(texts, others) == pytest.approx([naive_fraction(text, others) for text in texts])


def test_shared_fractions_of_nothing() -> None:
    assert shared_fractions([], ["x" * 100]) == []
    assert shared_fractions(["short", ""], ["x" * 100]) == [0.0, 0.0]
    assert shared_fractions(["x" * 100], []) == [0.0]
    assert shared_fractions(["x" * 100], ["x" * WINDOW]) == [1.0]


@pytest.mark.parametrize(
    "names",
    [
        ("datetime.py", "_datetime", "_pydatetime.py"),
        ("json/decoder.py", "json/__init__.py", "_json"),
        ("io.py", "_io", "_pyio.py"),
        ("decimal.py", "_pydecimal.py", "_decimal"),
    ],
)
def test_twins_are_one_module(names: tuple[str, ...]) -> None:
    assert len({module_key(name) for name in names}) == 1


def test_different_modules_stay_different() -> None:
    names = ["pydoc.py", "pyclbr.py", "py_compile.py", "doc", "topic:json", "json/decoder.py", "__future__.py"]
    assert len({module_key(name) for name in names}) == len(names)


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(1, 1000), min_size=1, max_size=60))
def test_validation_is_a_small_part_chosen_by_name(sizes: dict[str, Any]) -> None:
    chosen = validation_modules(sizes)
    assert chosen == validation_modules(dict(reversed(sizes.items())))
    wanted = builtin.VALIDATION_FRACTION * sum(sizes.values())
    assert sum(sizes[name] for name in chosen) <= 1.5 * wanted
    assert all(sizes[name] <= wanted / 2 for name in chosen)


def test_a_source_is_cut_between_statements_and_loses_nothing() -> None:
    body = "    x = 1\n" * 200
    parts = [f"@decorated\ndef function_{i}():\n    '''Doc.'''\n{body}\n\n" for i in range(12)]
    text = "import os\n\n" + "".join(parts)
    pieces = list(cut(text))
    assert len(pieces) > 2
    assert "".join(pieces) == text
    assert all(piece.startswith("@decorated") for piece in pieces[1:])
    assert all(len(piece) < 2 * builtin.DOCUMENT_CHARS for piece in pieces)


def test_a_large_class_is_cut_between_methods() -> None:
    method = "    def method(self):\n" + "        pass\n" * 100
    pieces = list(cut("class Large:\n" + method * 20))
    assert len(pieces) > 2
    assert all(piece.startswith("    def method") for piece in pieces[1:])


def test_prose_is_cut_between_paragraphs() -> None:
    text = "\n".join(f"Paragraph {i} says this: it's said.\n{'more words. ' * 60}\n" for i in range(40))
    pieces = list(cut(text))
    assert len(pieces) > 2
    assert "".join(pieces) == text
    assert all(piece.startswith("Paragraph") for piece in pieces)


def test_tables_are_told_from_programs() -> None:
    assert is_table("TABLE = (\n" + "    0x1f, 0x2e, 0x3d, 0x4c,\n" * 100 + ")\n")
    assert not is_table(Path(builtin.__file__).read_text())
    assert not is_table("Ein Gedicht über Größe und Übermut.\n" * 10)
