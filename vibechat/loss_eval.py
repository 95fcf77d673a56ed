"""Bits per byte: how well a model predicts text, whatever its tokenizer, and how well file compressors do.

    bits per byte = sum of nats over the tokens that stand for bytes / (ln 2 x the bytes that they stand for)

Special tokens stand for no bytes and are left out on both sides, as are ignored targets.
"""

import bz2
import itertools
import lzma
import math
import zlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from vibechat.gpt import GPT


class ByteDecoder(Protocol):
    """What is asked of a tokenizer here."""

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes that ids stand for."""

    def token_bytes(self) -> Tensor:
        """(V,) how many bytes each id stands for; 0 for special tokens."""


@torch.no_grad()
def evaluate_bpb(model: GPT, batches: Iterator[tuple[Tensor, Tensor]], steps: int, token_bytes: Tensor) -> float:
    """Bits per byte over `steps` batches.

    Args:
        model: evaluated as it is, without changing its mode.
        batches: of (inputs, targets), (B, T) on the model's device.
        steps: how many to take; fewer if they end before.
        token_bytes: (V,) bytes of each id, 0 for special tokens.

    Returns:
        Bits per byte; nan if no target stands for a byte.
    """
    device = model.get_device()
    token_bytes = token_bytes.to(device=device, dtype=torch.int64)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    total = torch.zeros((), dtype=torch.int64, device=device)
    for inputs, targets in itertools.islice(batches, steps):
        losses = model(inputs, targets, loss_reduction="none")  # (B, T)
        lengths = torch.where(targets >= 0, token_bytes[targets.clamp_min(0)], 0)
        nats += torch.where(lengths > 0, losses, 0.0).double().sum()
        total += lengths.sum()
    return nats.item() / (math.log(2) * total.item()) if total.item() else math.nan


def scored_bytes(batches: Iterable[tuple[Tensor, Tensor]], tokenizer: ByteDecoder) -> bytes:
    """The bytes that `evaluate_bpb` scores over all of `batches`, in its order."""
    lengths = tokenizer.token_bytes()
    scored = []
    for _, targets in batches:
        ids = targets[targets >= 0].cpu()
        scored.append(tokenizer.decode_bytes(ids[lengths[ids] > 0].tolist()))
    return b"".join(scored)


def compressed_bits_per_byte(data: bytes) -> dict[str, float]:
    """{compressor: bits per byte of `data`}, each at its strongest setting; nan for no data."""
    sizes = {
        "zlib -9": len(zlib.compress(data, 9)),
        "bzip2 -9": len(bz2.compress(data, 9)),
        "xz -9e": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / len(data) if data else math.nan for name, size in sizes.items()}
