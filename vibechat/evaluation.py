"""How good a base model is: bits per byte on fixed rows, three compressors on the same bytes, and what it writes.

A language model is a compressor: coding each byte with the model's probabilities would take as many bits as its loss
says. So bits per byte can be set beside what zlib, bzip2 and xz need, at their best settings, for exactly the bytes
that were scored. (The model has read other text before, and a compressor starts from nothing: that is training.)
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vibechat.common import UserError
from vibechat.loss_eval import compressed_bits_per_byte, evaluate_bpb, scored_bytes
from vibechat.train_step import MicroBatch

if TYPE_CHECKING:
    from vibechat.gpt import GPT


class Broken(Exception):
    """An evaluation was told to stop."""


class FixedRows:
    """The first rows of a split, kept in memory, so that each evaluation scores the same bytes.

    Args:
        batches: a single pass over the split; only its beginning is read.
        tokens: about how many tokens to score (whole micro-batches, at least one).
        tokenizer: for the bytes of a token.
        device: where the model is.
    """

    def __init__(self, batches: Iterable[MicroBatch], tokens: int, tokenizer: Any, device: torch.device) -> None:
        first = list(itertools.islice(batches, 1))
        if not first:
            raise UserError("the validation split is empty: give more text, or --val-data")
        count = math.ceil(tokens / first[0][0].numel())
        self.batches = [*first, *itertools.islice(batches, count - 1)]
        self.tokens = sum(int((targets >= 0).sum()) for _, targets in self.batches)
        self._tokenizer = tokenizer
        self._token_bytes = tokenizer.token_bytes().to(device)

    def bits_per_byte(self, model: "GPT", stop: Callable[[], bool] = lambda: False) -> float:
        """Bits per byte of `model`; raises Broken as soon as `stop()` is true."""

        def until_stopped() -> Iterator[MicroBatch]:
            for batch in self.batches:
                if stop():
                    raise Broken
                yield batch

        return evaluate_bpb(model, until_stopped(), len(self.batches), self._token_bytes)

    def compressors(self) -> tuple[dict[str, float], int]:
        """({compressor: bits per byte}, number of bytes) on exactly the bytes that are scored."""
        data = scored_bytes(iter(self.batches), self._tokenizer)
        return compressed_bits_per_byte(data), len(data)


def comparison(bits_per_byte: float, compressors: dict[str, float], scored: int) -> list[str]:
    """The lines of a table: ours beside the compressors, and whether ours is below the best of them."""
    rows = [("this model", bits_per_byte), *compressors.items()]
    best = min(compressors, key=compressors.__getitem__)
    lines = [f"bits per byte on the same {scored:,} bytes:"]
    lines += [f"  {name:<10}  {value:.4f}" for name, value in rows]
    word = "below" if bits_per_byte < compressors[best] else "not below"
    return [*lines, f"this model is {word} the best of the three ({best})"]


def prompts_for(data: str) -> list[str]:
    """What the samples begin with; the built-in corpus is about Python."""
    if data == "builtin":
        return ["", "The ", "def ", "class ", "Return the "]
    return ["", "The capital of France is", "The chemical symbol of gold is", "If yesterday was Friday, then tomorrow"]


def write_samples(
    model: "GPT",
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_tokens: int = 48,
    temperature: float = 0.8,
    seed: int = 42,
) -> list[str]:
    """What the model writes after each prompt, prompt included; it ends at <|bos|>, the start of another document."""
    bos, texts = tokenizer.get_bos_token_id(), []
    for prompt in prompts:
        tokens = tokenizer.encode(prompt, prepend=bos)
        room = model.config.sequence_len - len(tokens)
        new = model.generate(tokens, min(max_tokens, room), temperature=temperature, top_k=50, seed=seed)
        texts.append(tokenizer.decode(tokens[1:] + list(itertools.takewhile(lambda token: token != bos, new))))
    return texts
