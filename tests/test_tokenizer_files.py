"""Saving and loading tokenizers: the same back, whole or not at all, and nothing damaged gets by."""

import base64
import contextlib
import json
import os
from pathlib import Path

import pytest
import tiktoken.load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vibechat import tokenizer_files
from vibechat.common import UserError
from vibechat.tokenizer import (
    CONFIG_FILE,
    RANKS_FILE,
    RustBPETokenizer,
    get_token_bytes,
    get_tokenizer,
    train_tokenizer,
)

TEXT = "the theme of the thesis: there, then, thence. 漢字 and émigrés 🙂 12 34\n" * 3


@pytest.fixture(scope="module")
def trained() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(iter([TEXT]), 300)


@pytest.fixture
def saved(trained: RustBPETokenizer, tmp_path: Path) -> Path:
    trained.save(str(tmp_path / "tokenizer"))
    return tmp_path / "tokenizer"


def refusal(directory: Path) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(UserError) as raised:
        RustBPETokenizer.from_directory(str(directory))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def change_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / CONFIG_FILE).read_text())
    (directory / CONFIG_FILE).write_text(json.dumps({**config, **changes}))


def replace_ranks(directory: Path, data: bytes) -> None:
    """Put other ranks in place, with a SHA-256 that fits."""
    (directory / RANKS_FILE).write_bytes(data)
    change_config(directory, ranks_sha256=tokenizer_files.hashlib.sha256(data).hexdigest())


def test_what_is_loaded_is_what_was_saved(trained: RustBPETokenizer, saved: Path):
    loaded = RustBPETokenizer.from_directory(str(saved))
    assert sorted(path.name for path in saved.iterdir()) == [RANKS_FILE, CONFIG_FILE]
    assert (loaded.tokens, loaded.special_tokens()) == (trained.tokens, trained.special_tokens())
    assert loaded.fingerprint() == trained.fingerprint()
    assert loaded.encode(TEXT, prepend="<|bos|>") == trained.encode(TEXT, prepend="<|bos|>")
    assert loaded.get_vocab_size() == 300


def test_the_rank_file_is_tiktokens(trained: RustBPETokenizer, saved: Path):
    assert list(tiktoken.load.load_tiktoken_bpe(str(saved / RANKS_FILE))) == trained.tokens


def test_nothing_saved_is_a_pickle(saved: Path):
    for path in saved.iterdir():
        assert path.read_text().isprintable() or path.read_text().count("\n") > 3


def test_saving_is_reproducible_and_replaces(trained: RustBPETokenizer, saved: Path):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    RustBPETokenizer.train_from_iterator(iter([TEXT]), 280).save(str(saved))
    assert RustBPETokenizer.from_directory(str(saved)).get_vocab_size() == 280
    trained.save(str(saved))
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir() if path.name.startswith(".")] == []


def test_fingerprints_tell_tokenizers_apart(trained: RustBPETokenizer):
    others = [
        RustBPETokenizer(trained.tokens[:-1], {name: i - 1 for name, i in trained.special_tokens().items()}),
        RustBPETokenizer([*trained.tokens[:-2], *trained.tokens[:-3:-1]], trained.special_tokens()),
        RustBPETokenizer(trained.tokens, {**trained.special_tokens(), "<|more|>": 300}),
        RustBPETokenizer(trained.tokens, trained.special_tokens(), r"\w+|\W"),
    ]
    assert len({made.fingerprint() for made in [trained, *others]}) == 5
    assert RustBPETokenizer(list(trained.tokens), trained.special_tokens()).fingerprint() == trained.fingerprint()


def test_the_default_directory_is_under_the_base_directory(trained: RustBPETokenizer, base_dir: Path, tmp_path: Path):
    with pytest.raises(UserError, match="vibechat tok-train"):
        get_tokenizer()
    made = train_tokenizer(iter([TEXT]), 300, base_dir / "tokenizer")
    assert made.fingerprint() == trained.fingerprint() == get_tokenizer().fingerprint()
    assert get_token_bytes().equal(trained.token_bytes())
    trained.save(str(tmp_path / "elsewhere"))
    assert get_tokenizer(directory=str(tmp_path / "elsewhere")).fingerprint() == trained.fingerprint()
    assert get_token_bytes("cpu", directory=str(tmp_path / "elsewhere")).equal(trained.token_bytes())


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_of_the_ranks_is_refused_by_name(trained: RustBPETokenizer, saved: Path, data: st.DataObject):
    trained.save(str(saved))
    path = saved / RANKS_FILE
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    assert str(path) in refusal(saved)


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_of_the_configuration_changes_nothing_or_is_refused(
    trained: RustBPETokenizer, saved: Path, data: st.DataObject
):
    trained.save(str(saved))
    path = saved / CONFIG_FILE
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        assert RustBPETokenizer.from_directory(str(saved)).fingerprint() == trained.fingerprint()


@pytest.mark.parametrize("keep", [0, 1, 100, -3])
@pytest.mark.parametrize("name", [RANKS_FILE, CONFIG_FILE])
def test_truncated_files_are_refused_by_name(saved: Path, name: str, keep: int):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[:keep])
    assert str(saved / name) in refusal(saved)


def test_missing_files_are_named(saved: Path):
    (saved / RANKS_FILE).unlink()
    assert str(saved / RANKS_FILE) in refusal(saved)
    (saved / CONFIG_FILE).unlink()
    assert f"no tokenizer in {saved}" in refusal(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": None},
        {"special_tokens": ["<|bos|>"]},
        {"special_tokens": {"<|bos|>": "291"}},
        {"special_tokens": {"<|bos|>": 291, "<|user_start|>": 291}},
        {"special_tokens": {"<|bos|>": 290}},
        {"ranks_sha256": 5},
        {"fingerprint": "0"},
        {"pattern": r"\w+"},
        {"special_tokens": {"<|bos|>": 291}},
        {"version": 2},
        {"version": "1"},
    ],
)
def test_malformed_configurations_are_refused_by_name(saved: Path, changes: dict):
    change_config(saved, **changes)
    assert CONFIG_FILE in refusal(saved)


def line(token: bytes, rank: int) -> bytes:
    return b"%s %d\n" % (base64.b64encode(token), rank)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (line(b"A", 0x41), b"", "line 66: ranks are not"),
        (line(b"A", 0x41), line(b"A", 0x42), "line 66: ranks are not"),
        (line(b"A", 0x41), line(b"B", 0x41), "stands twice"),
        (line(b"A", 0x41), line(b"AAAA", 0x41), "256 bytes"),
        (line(b"A", 0x41), b"QQ 65\n", "line 66"),
        (line(b"A", 0x41), b"QQ==\n", "line 66"),
        (line(b"A", 0x41), b"QQ== 65 5\n", "line 66"),
        (line(b"A", 0x41), b"QQ== x\n", "line 66"),
    ],
)
def test_ranks_that_make_no_tokenizer_are_refused(saved: Path, old: bytes, new: bytes, complaint: str):
    data = (saved / RANKS_FILE).read_bytes()
    assert old in data
    replace_ranks(saved, data.replace(old, new))
    assert complaint in refusal(saved)


@pytest.mark.parametrize("fail_at", range(4))
def test_a_failure_at_any_moment_leaves_no_damage(
    trained: RustBPETokenizer, saved: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
):
    """Writing fails on the disk (the first two) or while names are exchanged: the old, the new, or a refusal."""
    other = RustBPETokenizer.train_from_iterator(iter([TEXT]), 280)
    calls = 0
    sync, replace = os.fsync, Path.replace

    def failing(real):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == fail_at + 1:
                raise OSError(28, "No space left on device")
            return real(*args)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing(sync))
        patched.setattr(Path, "replace", failing(replace))
        with pytest.raises(UserError, match="No space left on device"):
            other.save(str(saved))
    assert [path.name for path in saved.parent.iterdir() if path.name.startswith(".")] == []
    if fail_at <= 2:
        assert RustBPETokenizer.from_directory(str(saved)).fingerprint() == trained.fingerprint()
    else:
        assert "corrupt" in refusal(saved)  # new ranks, old configuration
    other.save(str(saved))
    assert RustBPETokenizer.from_directory(str(saved)).fingerprint() == other.fingerprint()


def test_a_directory_that_cannot_be_made_is_one_line(trained: RustBPETokenizer, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the tokenizer"):
        trained.save(str(tmp_path / "file" / "tokenizer"))
    with pytest.raises(UserError, match="cannot write the tokenizer"):
        trained.save(str(tmp_path / "file"))
