"""Bits per byte on fixed rows beside compressors, and samples: the same bytes for all, every time."""

import bz2
import lzma
import math
import zlib
from collections.abc import Iterator

import pytest
import torch

from vibechat.common import UserError
from vibechat.evaluation import Broken, FixedRows, comparison, prompts_for, write_samples
from vibechat.gpt import GPT, GPTConfig
from vibechat.tokenizer import RustBPETokenizer
from vibechat.train_step import MicroBatch

CPU = torch.device("cpu")
TEXT = "The rain in Spain falls mainly on the plain. " * 40


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator([TEXT], 280)


@pytest.fixture(scope="module")
def model(tokenizer: RustBPETokenizer) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, tokenizer.get_vocab_size(), 1, 1, 1, 16))
    model.init_weights()
    return model


def batches(tokenizer: RustBPETokenizer, count: int) -> Iterator[MicroBatch]:
    """`count` micro-batches of two rows of 16 tokens that begin with <|bos|>; the last target is ignored."""
    ids = tokenizer.encode(TEXT)
    for number in range(count):
        rows = [[tokenizer.get_bos_token_id(), *ids[number * 32 + k : number * 32 + k + 16]] for k in (0, 16)]
        row = torch.tensor(rows)
        targets = row[:, 1:].clone()
        targets[1, -1] = -1
        yield row[:, :-1], targets


def test_only_the_first_rows_are_kept(tokenizer: RustBPETokenizer) -> None:
    for tokens, expected in ((1, 1), (32, 1), (33, 2), (1000, 3)):
        rows = FixedRows(batches(tokenizer, 3), tokens, tokenizer, CPU)
        assert len(rows.batches) == expected
        assert rows.tokens == 31 * expected
    with pytest.raises(UserError, match="validation split is empty"):
        FixedRows(iter(()), 10, tokenizer, CPU)


def test_model_and_compressors_are_scored_on_the_same_bytes(tokenizer: RustBPETokenizer, model: GPT) -> None:
    rows = FixedRows(batches(tokenizer, 3), 1000, tokenizer, CPU)
    nats, data = 0.0, b""
    for inputs, targets in rows.batches:
        losses = model(inputs, targets, loss_reduction="none")
        nats += losses[targets >= 0].sum().item()
        data += tokenizer.decode_bytes(targets[targets >= 0].tolist())
    assert data.decode() in TEXT + TEXT or len(data) > 50
    bits = rows.bits_per_byte(model)
    assert bits == pytest.approx(nats / math.log(2) / len(data), rel=1e-4)
    assert bits == rows.bits_per_byte(model)  # nothing was used up
    compressed, count = rows.compressors()
    assert count == len(data)
    assert compressed == {
        "zlib -9": 8 * len(zlib.compress(data, 9)) / len(data),
        "bzip2 -9": 8 * len(bz2.compress(data, 9)) / len(data),
        "xz -9e": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data),
    }


def test_an_evaluation_can_be_broken_off(tokenizer: RustBPETokenizer, model: GPT) -> None:
    rows = FixedRows(batches(tokenizer, 3), 1000, tokenizer, CPU)
    asked = iter([False, True])
    with pytest.raises(Broken):
        rows.bits_per_byte(model, lambda: next(asked))


def test_the_table_says_who_is_below(tokenizer: RustBPETokenizer) -> None:
    compressors = {"zlib -9": 2.5, "bzip2 -9": 2.25, "xz -9e": 2.4}
    lines = comparison(2.0, compressors, 12_345)
    assert lines[0] == "bits per byte on the same 12,345 bytes:"
    assert lines[1:5] == [
        "  this model  2.0000",
        "  zlib -9     2.5000",
        "  bzip2 -9    2.2500",
        "  xz -9e      2.4000",
    ]
    assert lines[-1] == "this model is below the best of the three (bzip2 -9)"
    assert comparison(2.3, compressors, 1)[-1] == "this model is not below the best of the three (bzip2 -9)"


def test_samples_begin_with_their_prompts_and_repeat(tokenizer: RustBPETokenizer, model: GPT) -> None:
    prompts = ["", "The rain", "TEXT that is longer than the context of the model can hold"]
    texts = write_samples(model, tokenizer, prompts, max_tokens=5)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))
    assert texts == write_samples(model, tokenizer, prompts, max_tokens=5)
    assert texts != write_samples(model, tokenizer, prompts, max_tokens=5, seed=1)
    assert texts[2] == prompts[2]
    assert "" in prompts_for("builtin")
    assert "" in prompts_for("anything.txt")
