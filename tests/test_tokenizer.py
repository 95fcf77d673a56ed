"""The tokenizer against slow, obvious definitions, tiktoken, the `regex` module and the `rustbpe` package."""

import contextlib
import itertools
import pydoc_data.topics
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import regex
import rustbpe
import tiktoken
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vibechat import _rustbpe, tokenizer
from vibechat.common import UserError
from vibechat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer, default_vocab_size

# The language reference that every Python carries, and a little of what it lacks.
REFERENCE = list(pydoc_data.topics.topics.values())
OTHERS = [
    "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg. " * 3,
    "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 3,
    "いろはにほへと ちりぬるを 我が世誰ぞ 常ならむ。天地玄黃 宇宙洪荒。" * 3,
    "🙂🙃 👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\ufeff " * 5,
    "def f(x):\n\treturn {'a': 0x1F, **x}\r\n\r\n\n    # it's done; they'll see\n" * 3,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa          1234567890 ½ ٣٤ ",
]
TEXTS = REFERENCE + OTHERS

# Characters that mean something to the pattern, and any that is assigned (Unicode versions differ about the others).
tricky = st.text(alphabet="aZé漢sdmtlvreSTLſ19½ \t\xa0\u3000\r\n'._-🙂\u200d\u0301", max_size=40)
assigned = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn"]), max_size=40)
any_text = st.one_of(tricky, assigned, st.sampled_from(OTHERS))


@pytest.fixture(scope="module")
def trained() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(iter(TEXTS), 1500)


@pytest.fixture(scope="module")
def as_tiktoken(trained: RustBPETokenizer) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(trained.tokens)}
    return tiktoken.Encoding("t", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=trained.special_tokens())


# ---------------------------------------------------------------------------------------------------------------------
# the slow, obvious definitions


def slow_train(texts: list[str], num_tokens: int) -> list[bytes]:
    """Recount all pairs before each merge; merge the most frequent, of equals the one with the smaller ids."""
    tokens = [bytes([byte]) for byte in range(256)]
    chunks = Counter(chunk.encode() for text in texts for chunk in regex.findall(SPLIT_PATTERN, text))
    words = [(list(chunk), count) for chunk, count in chunks.items()]
    while len(tokens) < num_tokens:
        pairs: Counter = Counter()
        for ids, count in words:
            for pair in itertools.pairwise(ids):
                pairs[pair] += count
        if not pairs:
            break
        pair = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for ids, _ in words:
            at = 0
            while at < len(ids) - 1:
                if (ids[at], ids[at + 1]) == pair:
                    ids[at : at + 2] = [len(tokens)]
                at += 1
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return tokens


def slow_encode(tokens: list[bytes], text: str) -> list[int]:
    """Merge the adjacent pair that makes the token of the lowest rank, the leftmost first, while there is one."""
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    ids = []
    for chunk in regex.findall(SPLIT_PATTERN, text):
        parts = [bytes([byte]) for byte in chunk.encode()]
        while True:
            ranks = [rank_of.get(a + b, len(tokens)) for a, b in itertools.pairwise(parts)]
            if not ranks or min(ranks) == len(tokens):
                break
            at = ranks.index(min(ranks))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids.extend(rank_of[part] for part in parts)
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# splitting


def test_the_crate_implements_the_pattern_of_the_tokenizer():
    assert _rustbpe.PATTERN == SPLIT_PATTERN


@given(any_text)
@example("'ſ 'S it's I'LL")
@example("a \n \r\n  b\n  ")
@settings(max_examples=1000, deadline=None)
def test_chunks_are_those_of_the_regex(text: str):
    assert _rustbpe.split(text) == regex.findall(SPLIT_PATTERN, text)


# ---------------------------------------------------------------------------------------------------------------------
# training


@given(st.lists(any_text, max_size=8), st.integers(256, 330), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_training_equals_the_definition(texts: list[str], num_tokens: int, num_threads: int):
    assert _rustbpe.train(iter(texts), num_tokens, num_threads) == slow_train(texts, num_tokens)


def test_training_equals_the_definition_on_real_text():
    texts = [*REFERENCE[:12], *OTHERS]
    assert _rustbpe.train(texts, 600, 2) == slow_train(texts, 600)


def test_training_equals_the_published_package(trained: RustBPETokenizer):
    theirs = rustbpe.Tokenizer()
    theirs.train_from_iterator(iter(TEXTS), len(trained.tokens), pattern=SPLIT_PATTERN)
    by_rank = sorted(theirs.get_mergeable_ranks(), key=lambda item: item[1])
    assert trained.tokens == [bytes(token) for token, _ in by_rank]


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_threads_do_not_change_the_merges(trained: RustBPETokenizer, num_threads: int):
    again = RustBPETokenizer.train_from_iterator(iter(TEXTS), 1500, num_threads=num_threads)
    assert again.tokens == trained.tokens
    assert again.fingerprint() == trained.fingerprint()


def test_special_tokens_come_last_and_count(trained: RustBPETokenizer):
    assert trained.get_vocab_size() == 1500
    assert [trained.encode_special(name) for name in SPECIAL_TOKENS] == list(range(1491, 1500))
    assert trained.get_bos_token_id() == 1491


def test_training_takes_text_one_by_one():
    """No more texts are alive at once than the batches in flight hold."""
    alive: set[int] = set()
    most = 0

    class Text(str):
        def __del__(self) -> None:
            alive.discard(id(self))

    def texts():
        nonlocal most
        for i in range(300):
            text = Text(f"text {i} " * 10_000)
            alive.add(id(text))
            most = max(most, len(alive))
            yield text
            del text

    _rustbpe.train(texts(), 300, 2)
    assert most <= 2


def test_training_reports_progress():
    seen: list[tuple[str, int, int]] = []
    tokens = _rustbpe.train(TEXTS, 400, 2, lambda *report: seen.append(report))
    assert len(tokens) == 400
    assert seen[-1] == ("merging", 400, 400)


def test_what_the_texts_or_the_progress_raise_passes_through():
    def texts():
        yield "some text"
        raise KeyError("a broken shard")

    with pytest.raises(KeyError, match="a broken shard"):
        _rustbpe.train(texts(), 300)
    with pytest.raises(TypeError):
        _rustbpe.train([b"bytes"], 300)
    with pytest.raises(ZeroDivisionError):
        _rustbpe.train(TEXTS, 400, 2, lambda stage, done, total: 1 / 0)


def test_a_text_that_is_too_small_makes_a_smaller_vocabulary(tmp_path, capsys):
    made = tokenizer.train_tokenizer(["abab abab"], 10_000, tmp_path / "t")
    assert made.tokens[256:] == [b"ab", b"abab", b" abab"]
    assert made.get_vocab_size() == 256 + 3 + 9
    assert "vocabulary of 268, not 10,000" in capsys.readouterr().out
    assert made.decode(made.encode("abab abab and more")) == "abab abab and more"


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 1000, "no text"),
        (["", ""], 1000, "no text"),
        (["text"], 264, "at least 265"),
        (["text"], -1, "at least 265"),
    ],
)
def test_training_errors_are_one_line(texts: list[str], vocab_size: int, message: str):
    with pytest.raises(UserError, match=message) as raised:
        RustBPETokenizer.train_from_iterator(iter(texts), vocab_size)
    assert "\n" not in str(raised.value)


def test_too_much_text_is_one_line(monkeypatch):
    def train(*arguments: object) -> None:
        raise MemoryError("more than 4 GB of distinct chunks: train on less text (--max-chars)")

    monkeypatch.setattr(_rustbpe, "train", train)
    with pytest.raises(UserError, match="--max-chars"):
        RustBPETokenizer.train_from_iterator(iter(TEXTS), 1000)


def test_the_smallest_vocabulary_is_bytes_and_special_tokens():
    made = RustBPETokenizer.train_from_iterator(iter(["text"]), 265)
    assert made.encode("é") == [0xC3, 0xA9]
    assert made.get_bos_token_id() == 256


def test_default_vocab_size_follows_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_vocab_size() == 8192
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_vocab_size() == 65536
    assert default_vocab_size(small=True) == 8192


# ---------------------------------------------------------------------------------------------------------------------
# round trips


def test_every_codepoint_round_trips(trained: RustBPETokenizer, as_tiktoken: tiktoken.Encoding):
    for first in range(0, 0x110000, 0x1000):
        block = [chr(point) for point in range(first, first + 0x1000) if not 0xD800 <= point < 0xE000]
        for text in ("".join(block), " ".join(block), "x".join(block)):
            ids = trained.encode(text)
            assert trained.decode(ids) == text
            assert ids == as_tiktoken.encode_ordinary(text)


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_round_trips(trained: RustBPETokenizer, text: str):
    assert trained.decode(trained.encode(text)) == text
    assert trained.decode_bytes(trained.encode(text)) == text.encode()


@given(st.binary(max_size=200))
@example("ein Wort, 漢字 🙂".encode()[:-1])
@example(b"\xed\xa0\x80\xff\xfe\x00\xc0\xaf")
@settings(max_examples=300, deadline=None)
def test_any_bytes_round_trip(trained: RustBPETokenizer, data: bytes):
    ids = trained.encode_bytes(data)
    assert trained.decode_bytes(ids) == data
    assert trained.decode(ids) == data.decode("utf-8", errors="replace")
    with contextlib.suppress(UnicodeDecodeError):
        assert ids == trained.encode(data.decode())


@pytest.mark.parametrize("text", ["", *OTHERS, "\0", "\ufeff", "\U0010ffff"])
def test_texts_of_every_kind_round_trip(trained: RustBPETokenizer, text: str):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert (ids == []) == (text == "")


@pytest.mark.parametrize("character", ["a", " ", "\n", "!", "7", "漢"])
def test_ten_megabytes_of_one_character(trained: RustBPETokenizer, character: str):
    text = character * (10_000_000 // len(character.encode()))
    ids = trained.encode(text)
    assert trained.decode_bytes(ids) == text.encode()
    short = character * 2000
    assert trained.encode(short) == slow_encode(trained.tokens, short)


def test_training_on_ten_megabytes_of_one_character():
    tokens = _rustbpe.train(["a" * 10_000_000], 266, 2)
    assert tokens[256:] == [b"a" * 2**i for i in range(1, 11)]


def test_ids_that_are_not_utf8_decode_to_replacement_characters(trained: RustBPETokenizer):
    assert trained.decode([0xE6, 0xBC]) == "\ufffd"
    assert trained.decode([0xFF, 0x41]) == "\ufffdA"
    assert trained.decode([]) == ""


def test_ids_that_do_not_exist_are_refused(trained: RustBPETokenizer):
    with pytest.raises(ValueError, match="no token 1500"):
        trained.decode([1500])
    with pytest.raises((ValueError, OverflowError)):
        trained.decode([-1])
    with pytest.raises(ValueError, match="no token 1500"):
        trained.encode("text", prepend=1500)


@given(st.text(alphabet=st.one_of(st.characters(), st.characters(categories=["Cs"])), max_size=30))
@example("\ud83d\ude42 \ud83d x \ude42")
@settings(max_examples=200, deadline=None)
def test_lone_surrogates_become_replacement_characters(
    trained: RustBPETokenizer, as_tiktoken: tiktoken.Encoding, text: str
):
    valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert trained.decode(trained.encode(text)) == valid
    assert trained.encode(text) == as_tiktoken.encode_ordinary(text)
    assert trained.encode([text, "x"])[0] == trained.encode(text)


# ---------------------------------------------------------------------------------------------------------------------
# ids


@given(any_text)
@settings(max_examples=300, deadline=None)
def test_ids_equal_the_definition(trained: RustBPETokenizer, text: str):
    assert trained.encode(text) == slow_encode(trained.tokens, text)


def test_ids_equal_tiktoken_on_real_text(trained: RustBPETokenizer, as_tiktoken: tiktoken.Encoding):
    for _ in range(2):  # the second time from the cache
        for text in TEXTS:
            assert trained.encode(text) == as_tiktoken.encode_ordinary(text)


def test_every_token_encodes_to_itself(trained: RustBPETokenizer):
    for rank, token in enumerate(trained.tokens):
        assert trained.encode_bytes(token) == [rank] or len(_rustbpe.split(token.decode(errors="replace"))) > 1


@pytest.mark.parametrize("num_threads", [0, 1, 2, 8, 1000])
def test_batches_equal_single_texts(trained: RustBPETokenizer, num_threads: int):
    expected = [trained.encode(text) for text in TEXTS]
    assert trained.encode(TEXTS, num_threads=num_threads) == expected
    around = trained.encode(TEXTS, prepend="<|bos|>", append=7, num_threads=num_threads)
    assert around == [[trained.get_bos_token_id(), *ids, 7] for ids in expected]
    assert trained.encode([], num_threads=num_threads) == []


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_arrays_hold_the_same_ids(trained: RustBPETokenizer, num_threads: int):
    arrays = trained.encode_arrays([*TEXTS, "", "\ud800"], num_threads)
    assert {(array.dtype, array.ndim) for array in arrays} == {(np.dtype(np.int32), 1)}
    assert [array.tolist() for array in arrays] == [trained.encode(text) for text in [*TEXTS, "", "\ud800"]]
    assert trained.encode_arrays([], num_threads) == []


def test_prepend_and_append_take_ids_and_names(trained: RustBPETokenizer):
    bos, end = trained.get_bos_token_id(), trained.encode_special("<|assistant_end|>")
    assert trained.encode("hi", prepend="<|bos|>", append="<|assistant_end|>") == [bos, *trained.encode("hi"), end]
    assert trained.encode("hi", prepend=bos, append=end) == [bos, *trained.encode("hi"), end]
    assert trained.encode("hi", 0, 0) == [0, *trained.encode("hi"), 0]
    with pytest.raises(ValueError, match="no special token 'bos'"):
        trained.encode("hi", prepend="bos")


@pytest.mark.parametrize("name", [*SPECIAL_TOKENS, "<|endoftext|>"])
def test_text_that_spells_a_special_token_stays_text(trained: RustBPETokenizer, name: str):
    special = set(trained.special_tokens().values())
    for text in (name, f"x{name}y", name * 3):
        for ids in (trained.encode(text), trained.encode([text])[0], trained.encode_bytes(text.encode())):
            assert not special & set(ids)
            assert trained.decode(ids) == text


def test_special_tokens_decode_to_their_names(trained: RustBPETokenizer):
    assert trained.decode([trained.get_bos_token_id(), *trained.encode("hi")]) == "<|bos|>hi"


def test_token_lengths_come_from_raw_bytes(trained: RustBPETokenizer):
    lengths = trained.token_bytes()
    assert lengths.dtype == torch.int32
    assert lengths.shape == (1500,)
    assert lengths[:256].tolist() == [1] * 256  # bytes from 0x80 on are no text of their own: a str would have 3
    assert lengths[-9:].tolist() == [0] * 9
    for text in TEXTS:
        assert lengths[trained.encode(text, prepend="<|bos|>")].sum() == len(text.encode())


def test_encoding_a_list_releases_the_interpreter(trained: RustBPETokenizer):
    """With forced switches off, another thread runs only if encoding lets it."""
    ready, go, ran = threading.Event(), threading.Event(), []

    def other() -> None:
        ready.set()
        go.wait()
        ran.append(True)

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    texts = TEXTS * 20
    trained.encode("the encoder is made on first use")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        go.set()
        trained.encode(texts, num_threads=2)
        seen = list(ran)
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert seen == [True]


# ---------------------------------------------------------------------------------------------------------------------
# without the extension, and pretrained vocabularies


def test_without_the_extension_tiktoken_gives_the_same(trained: RustBPETokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "vibechat._rustbpe", None)
    monkeypatch.delattr("vibechat._rustbpe")
    plain = RustBPETokenizer(trained.tokens, trained.special_tokens())
    assert isinstance(plain._encoder, tokenizer._TiktokenEncoder)
    assert plain.encode(TEXTS, prepend="<|bos|>", num_threads=2) == trained.encode(TEXTS, prepend="<|bos|>")
    assert [ids.tolist() for ids in plain.encode_arrays(TEXTS)] == trained.encode(TEXTS)
    assert plain.encode("x <|bos|>", append=3) == trained.encode("x <|bos|>", append=3)
    assert plain.decode([trained.get_bos_token_id(), 0xFF]) == "<|bos|>\ufffd"
    assert plain.fingerprint() == trained.fingerprint()
    assert plain.token_bytes().equal(trained.token_bytes())
    with pytest.raises(ValueError, match="no token"):
        plain.decode([1500])
    with pytest.raises(UserError, match="uv sync"):
        RustBPETokenizer.train_from_iterator(iter(TEXTS), 1000)
    with pytest.raises(UserError, match="extension"):
        plain.encode_bytes(b"\xff")


def test_importing_loads_no_encoder():
    encoders = ["vibechat._rustbpe", "tiktoken", "tokenizers"]
    code = f"import sys, vibechat.tokenizer; print([m for m in {encoders} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pretrained_encodings_come_from_tiktoken(trained: RustBPETokenizer, monkeypatch, tmp_path):
    """A stand-in with a pattern of its own and special tokens that leave gaps, as cl100k_base does."""
    ranks = {token: rank for rank, token in enumerate(trained.tokens)}
    special = {"<|endoftext|>": len(ranks) + 1, "<|endofprompt|>": len(ranks) + 20}
    pattern = r"\p{L}+|\s+|\p{N}|[^\s\p{L}\p{N}]+"
    encoding = tiktoken.Encoding("other", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    loaded = RustBPETokenizer.from_pretrained("other")
    loaded.save(str(tmp_path / "t"))
    for made in (loaded, RustBPETokenizer.from_directory(str(tmp_path / "t"))):
        assert made.get_vocab_size() == encoding.n_vocab == len(ranks) + 21
        assert made.get_bos_token_id() == len(ranks) + 1
        assert made.encode(TEXTS) == encoding.encode_ordinary_batch(TEXTS)
        assert made.decode(made.encode("a <|endoftext|>", prepend="<|endoftext|>")) == "<|endoftext|>a <|endoftext|>"
        assert made.token_bytes()[len(ranks) :].tolist() == [0] * 21


def test_a_pretrained_encoding_that_cannot_be_had_is_one_line(monkeypatch):
    def offline(name: str) -> None:
        raise ConnectionError("no route to host\nand a long story")

    with pytest.raises(UserError, match="no encoding 'gpt5000'"):
        RustBPETokenizer.from_pretrained("gpt5000")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR") as raised:
        RustBPETokenizer.from_pretrained("gpt2")
    assert "\n" not in str(raised.value)
