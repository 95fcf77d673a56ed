"""tok_train and tok_eval as a person meets them."""

import io
import json
import pydoc_data.topics
import re
from pathlib import Path

import pytest
import tiktoken

from vibechat.programs import tok_eval, tok_train
from vibechat.tokenizer import SPLIT_PATTERN, RustBPETokenizer, get_tokenizer

TEXTS = list(pydoc_data.topics.topics.values())


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)


def files_under(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("tokenizer*"))


def test_training_says_what_came_out_and_saves_it(data: str, base_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert tok_train.main(["--data", data, "--vocab-size", "1000", "--num-threads=2"]) == 0
    out = capsys.readouterr().out
    tokenizer = get_tokenizer()
    assert tokenizer.get_vocab_size() == 1000
    assert "1,000 = 256 bytes + 735 merges + 9 special" in out
    assert re.search(r"text +topics.*: \d\.\d MB in \d+ documents", out)
    assert re.search(r"time +\d+\.\d\d s on 2 threads", out)
    assert re.search(r"compression +[2-4]\.\d{3} on train, [2-4]\.\d{3} on val", out)
    assert tokenizer.fingerprint() in out
    assert files_under(base_dir) == ["tokenizer"]
    assert any("Tokenizer training" in path.read_text() for path in (base_dir / "report").iterdir())


def test_training_does_not_see_the_validation_documents(data: str, capsys: pytest.CaptureFixture[str]):
    assert tok_train.main(["--data", data, "--vocab-size", "400"]) == 0
    documents = int(re.search(r"in (\d+) documents", capsys.readouterr().out)[1])  # type: ignore[index]
    assert 0.9 * len(TEXTS) < documents < len(TEXTS)
    expected = RustBPETokenizer.train_from_iterator(iter(TEXTS[:documents]), 400)
    assert get_tokenizer().fingerprint() == expected.fingerprint()


def test_max_chars_limits_the_text(data: str, capsys: pytest.CaptureFixture[str]):
    assert tok_train.main(["--data", data, "--vocab-size", "300", "--max-chars", "20000"]) == 0
    assert "0.0 MB in" in capsys.readouterr().out
    limited = "".join(TEXTS)[:20000]
    texts, left = [], 20000
    for text in TEXTS:
        texts.append(text[:left])
        left -= len(texts[-1])
    assert "".join(texts) == limited
    assert get_tokenizer().fingerprint() == RustBPETokenizer.train_from_iterator(iter(texts), 300).fingerprint()


def test_training_again_keeps_the_tokenizer_that_models_need(
    data: str, base_dir: Path, capsys: pytest.CaptureFixture[str]
):
    train = ["--data", data, "--vocab-size"]
    assert tok_train.main([*train, "400"]) == 0
    first = get_tokenizer().fingerprint()
    assert tok_train.main([*train, "400"]) == 0  # the same: nothing to keep
    assert files_under(base_dir) == ["tokenizer"]
    capsys.readouterr()
    assert tok_train.main([*train, "500"]) == 0
    aside = f"tokenizer-{first[:12]}"
    assert files_under(base_dir) == ["tokenizer", aside]
    assert str(base_dir / aside) in capsys.readouterr().out
    assert get_tokenizer(directory=str(base_dir / aside)).fingerprint() == first
    assert get_tokenizer().get_vocab_size() == 500


def test_a_damaged_tokenizer_is_replaced(data: str, base_dir: Path):
    assert tok_train.main(["--data", data, "--vocab-size", "300"]) == 0
    (base_dir / "tokenizer" / "tokenizer.tiktoken").write_text("damaged")
    assert tok_train.main(["--data", data, "--vocab-size", "300"]) == 0
    assert get_tokenizer().get_vocab_size() == 300
    assert files_under(base_dir) == ["tokenizer"]


def test_a_small_text_makes_a_small_vocabulary_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.txt").write_text("one two three " * 50)
    (tmp_path / "b.txt").write_text("three two one " * 50)
    assert tok_train.main(["--data", str(tmp_path / "*.txt"), "--vocab-size", "5000"]) == 0
    assert "nothing is left to merge for 5,000" in capsys.readouterr().out
    assert get_tokenizer().get_vocab_size() < 300


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--vocab-size", "100"], "--vocab-size 100"),
        (["--vocab-size", "many"], "many"),
        (["--max-chars", "0"], "--max-chars 0"),
        (["--num-threads", "-1"], "--num-threads -1"),
        (["--text-column", "content"], "content"),
    ],
)
def test_training_mistakes_are_one_line(
    data: str, base_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
):
    assert tok_train.main(["--data", data, *arguments]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("error: ")
    assert complaint in errors[-1]
    assert "Traceback" not in "".join(errors)
    assert files_under(base_dir) == []


def test_a_terminal_shows_bars(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with tok_train.progress_display() as nothing:
        assert nothing is None  # no terminal, no bars
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with tok_train.progress_display() as progress:
        assert progress is not None
        progress("reading", 3_000_000, 0)
        progress("merging", 500, 500)
    assert "reading 3 MB" in terminal.getvalue()
    assert "500 of 500 tokens" in terminal.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# tok_eval


def test_evaluation_needs_a_tokenizer(data: str, offline: None, capsys: pytest.CaptureFixture[str]):
    assert tok_eval.main(["--data", data]) == 2
    assert capsys.readouterr().err.startswith("error: there is no tokenizer")


def test_without_a_network_ours_is_still_evaluated(data: str, offline: None, capsys: pytest.CaptureFixture[str]):
    assert tok_train.main(["--data", data, "--vocab-size", "500"]) == 0
    capsys.readouterr()
    assert tok_eval.main(["--data", data]) == 0
    lines = capsys.readouterr().out.splitlines()
    kinds = [*tok_eval.SAMPLES, "topics train", "topics val"]
    assert sum(line.startswith(tuple(kinds)) for line in lines) == len(kinds)
    notes = [line for line in lines if line.startswith("note:")]
    assert len(notes) == 1
    assert "gpt2 and cl100k_base" in notes[0]
    assert "TIKTOKEN_CACHE_DIR" in notes[0]


def test_baselines_stand_beside_ours(
    data: str, base_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The stand-in for both baselines knows bytes only, so that its column is 1 everywhere."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    plain = tiktoken.Encoding("b", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: plain)
    assert tok_train.main(["--data", data, "--vocab-size", "500"]) == 0
    capsys.readouterr()
    assert tok_eval.main(["--data", data, "--max-chars", "30000"]) == 0
    out = capsys.readouterr().out
    assert "ours 500, gpt2 257, cl100k_base 257" in out
    row = next(line for line in out.splitlines() if line.startswith("topics train")).split()
    ours = float(row[3])
    assert 2 < ours < 4
    assert row[4] == row[6] == "1.000"
    assert row[5] == row[7] == f"{1 / ours - 1:+.1%}"
    assert "note:" not in out
    assert any("Tokenizer evaluation" in path.read_text() for path in (base_dir / "report").iterdir())


def test_numbers_are_exact():
    ranks = [bytes([byte]) for byte in range(256)]
    plain = RustBPETokenizer(ranks, {"<|bos|>": 256})
    pairs = RustBPETokenizer([*ranks, b"ab"], {"<|bos|>": 257})
    rows = tok_eval.compare({"x": ["abab", "é"], "none": [""]}, {"ours": pairs, "plain": plain})
    assert rows[0] == {"text": "x", "bytes": "6", "ours": "1.500", "plain": "1.000", "ours vs plain": "-33.3%"}
    assert rows[1]["bytes"] == "0"
    header, first, _ = tok_eval.table(rows)
    assert header.split() == ["text", "bytes", "ours", "plain", "ours", "vs", "plain"]
    assert first.split() == ["x", "6", "1.500", "1.000", "-33.3%"]


def test_samples_are_of_many_kinds():
    assert {"news", "code", "math", "emoji"} < set(tok_eval.SAMPLES)
    assert sum(not text.isascii() for text in tok_eval.SAMPLES.values()) >= 6
    assert all(len(text) > 120 for text in tok_eval.SAMPLES.values())
