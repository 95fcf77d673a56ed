"""HuggingFaceTokenizer: the same interface and the same promises over the `tokenizers` library."""

import json
import pydoc_data.topics
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vibechat.common import UserError
from vibechat.tokenizer import HUGGINGFACE_FILE, SPECIAL_TOKENS, HuggingFaceTokenizer, RustBPETokenizer

TEXTS = [*list(pydoc_data.topics.topics.values())[:30], "漢字 émigré 🙂👩‍👩‍👧‍👦 \t\r\n 12345 it's IT'S ſ"]


@pytest.fixture(scope="module")
def made() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer.train_from_iterator(iter(TEXTS), 700)


def test_special_tokens_come_last_and_count(made: HuggingFaceTokenizer):
    assert made.get_vocab_size() == 700
    assert [made.encode_special(name) for name in SPECIAL_TOKENS] == list(range(691, 700))
    assert made.get_bos_token_id() == 691
    with pytest.raises(ValueError, match="no special token"):
        made.encode_special("the")


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_round_trips(made: HuggingFaceTokenizer, text: str):
    assert made.decode(made.encode(text)) == text


def test_every_codepoint_round_trips(made: HuggingFaceTokenizer):
    for first in range(0, 0x110000, 0x1000):
        text = "".join(chr(point) for point in range(first, first + 0x1000) if not 0xD800 <= point < 0xE000)
        assert made.decode_bytes(made.encode(text)) == text.encode()


def test_lone_surrogates_become_replacement_characters(made: HuggingFaceTokenizer):
    assert made.decode(made.encode("a\ud800b\ud83d\ude42")) == "a\ufffdb🙂"


@pytest.mark.parametrize("num_threads", [1, 2, 8])
def test_batches_equal_single_texts(made: HuggingFaceTokenizer, num_threads: int):
    bos = made.get_bos_token_id()
    expected = [[bos, *made.encode(text), 5] for text in TEXTS]
    assert made.encode(TEXTS, prepend="<|bos|>", append=5, num_threads=num_threads) == expected
    assert made.encode([], num_threads=num_threads) == []
    assert made.encode("") == []


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_text_that_spells_a_special_token_stays_text(made: HuggingFaceTokenizer, tmp_path: Path, name: str):
    made.save(str(tmp_path))
    for tokenizer in (made, HuggingFaceTokenizer.from_directory(str(tmp_path))):
        for text in (name, f" {name} x"):
            for ids in (tokenizer.encode(text), tokenizer.encode([text])[0]):
                assert not set(ids) & set(tokenizer.special_tokens().values())
                assert tokenizer.decode(ids) == text


def test_token_lengths_come_from_raw_bytes(made: HuggingFaceTokenizer):
    lengths = made.token_bytes()
    assert lengths.dtype == torch.int32
    assert lengths.shape == (700,)
    assert lengths[-9:].tolist() == [0] * 9
    for text in TEXTS:
        assert lengths[made.encode(text, prepend="<|bos|>")].sum() == len(text.encode())


def test_decoding_is_defined_for_all_ids(made: HuggingFaceTokenizer):
    first = made.encode("漢")[0]
    assert made.decode_bytes([first])[:1] == b"\xe6"
    assert made.decode([made.get_bos_token_id(), *made.encode("hi")]) == "<|bos|>hi"
    with pytest.raises(ValueError, match="no token 700"):
        made.decode([700])


def test_compresses_as_ours_does(made: HuggingFaceTokenizer):
    """Both learn the same merges but for ties, so the lengths are within a per cent."""
    ours = RustBPETokenizer.train_from_iterator(iter(TEXTS), 700)
    lengths = [sum(map(len, tokenizer.encode(TEXTS))) for tokenizer in (made, ours)]
    assert abs(lengths[0] / lengths[1] - 1) < 0.01


def test_what_is_loaded_is_what_was_saved(made: HuggingFaceTokenizer, tmp_path: Path):
    made.save(str(tmp_path / "new" / "directory"))
    loaded = HuggingFaceTokenizer.from_directory(str(tmp_path / "new" / "directory"))
    assert loaded.encode(TEXTS) == made.encode(TEXTS)
    assert loaded.fingerprint() == made.fingerprint()
    assert loaded.special_tokens() == made.special_tokens()
    other = HuggingFaceTokenizer.train_from_iterator(iter(TEXTS), 600)
    assert other.fingerprint() != made.fingerprint()


def test_files_that_are_missing_or_damaged_are_named(made: HuggingFaceTokenizer, tmp_path: Path):
    with pytest.raises(UserError, match=HUGGINGFACE_FILE):
        HuggingFaceTokenizer.from_directory(str(tmp_path))
    made.save(str(tmp_path))
    path = tmp_path / HUGGINGFACE_FILE
    json.loads(path.read_text())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=HUGGINGFACE_FILE):
        HuggingFaceTokenizer.from_directory(str(tmp_path))


def test_pretrained_come_from_the_hub(made: HuggingFaceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made.save(str(tmp_path))
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        if repository == "offline":
            raise ConnectionError("no route to host\nand more")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert HuggingFaceTokenizer.from_pretrained("gpt2").encode(TEXTS) == made.encode(TEXTS)
    with pytest.raises(UserError, match=r"offline: no tokenizer\.json from the hub: no route to host") as raised:
        HuggingFaceTokenizer.from_pretrained("offline")
    assert asked == [("gpt2", HUGGINGFACE_FILE), ("offline", HUGGINGFACE_FILE)]
    assert "\n" not in str(raised.value)


def test_training_errors_are_one_line():
    with pytest.raises(UserError, match="at least 265"):
        HuggingFaceTokenizer.train_from_iterator(iter(TEXTS), 264)
