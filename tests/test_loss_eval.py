"""Bits per byte counts what stands for bytes, once, on both sides."""

import bz2
import lzma
import math
import zlib

import pytest
import torch
from torch import Tensor

from vibechat.gpt import GPT, GPTConfig
from vibechat.loss_eval import compressed_bits_per_byte, evaluate_bpb, scored_bytes

WORDS = [b"a", b"bc", b"\xe2\x82", b"\xac", b"defg"]  # the euro sign is two tokens
BOS = len(WORDS)


class Words:
    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(WORDS[i] for i in ids)

    def token_bytes(self) -> Tensor:
        return torch.tensor([*map(len, WORDS), 0], dtype=torch.int32)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=8, vocab_size=BOS + 1, n_layer=1, n_head=1, n_kv_head=1, n_embd=8))
    model.init_weights()
    torch.nn.init.normal_(model.lm_head.weight)
    model.set_compute_dtype(torch.float32)
    return model


BATCHES = [
    (torch.tensor([[BOS, 0, 2, 3], [BOS, 4, BOS, 1]]), torch.tensor([[0, 2, 3, 4], [4, BOS, 1, -1]])),
    (torch.tensor([[BOS, 1, BOS, BOS]]), torch.tensor([[1, -1, -1, -1]])),
]


def test_bits_per_byte_is_the_sum_over_tokens_that_stand_for_bytes(model: GPT) -> None:
    nats, count = 0.0, 0
    for inputs, targets in BATCHES:
        logits = model(inputs).log_softmax(-1)
        for row, position in torch.nonzero(targets >= 0).tolist():
            target = int(targets[row, position])
            if target != BOS:
                nats -= logits[row, position, target].item()
                count += len(WORDS[target])
    assert evaluate_bpb(model, iter(BATCHES), 2, Words().token_bytes()) == pytest.approx(nats / math.log(2) / count)
    assert len(scored_bytes(BATCHES, Words())) == count


def test_no_more_batches_than_asked_for(model: GPT) -> None:
    batches = iter(BATCHES)
    evaluate_bpb(model, batches, 1, Words().token_bytes())
    assert next(batches) is BATCHES[1]


def test_scored_bytes_are_the_text_in_order() -> None:
    assert scored_bytes(BATCHES, Words()) == "a€defgdefgbcbc".encode()


def test_nothing_to_score_is_nan(model: GPT) -> None:
    nothing = [(torch.tensor([[BOS]]), torch.tensor([[BOS]]))]
    assert math.isnan(evaluate_bpb(model, iter(nothing), 1, Words().token_bytes()))
    assert all(math.isnan(value) for value in compressed_bits_per_byte(b"").values())


def test_compressors_at_their_strongest() -> None:
    data = b"the quick brown fox " * 50
    assert compressed_bits_per_byte(data) == {
        "zlib -9": 8 * len(zlib.compress(data, 9)) / len(data),
        "bzip2 -9": 8 * len(bz2.compress(data, 9)) / len(data),
        "xz -9e": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data),
    }
