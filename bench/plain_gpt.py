"""The plain baseline: the same GPT, written the way most people would, under torch.compile's defaults.

Frozen, so that a ratio against it means the same next year: fp32 masters cast in each Linear, three projections for q,
k and v, F.scaled_dot_product_attention, rotary tables in fp32, the softcap in fp32, F.cross_entropy on all the logits,
torch.compile's defaults. It imports nothing of vibechat. `python -m bench.plain_gpt` times forward + backward in a
process of its own, with the allocator as the C library sets it, and prints one line of JSON.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A Linear that casts its fp32 weight to the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (linear(x).view(B, T, self.heads, -1) for linear in (self.q, self.k, self.v))
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(dim, heads)
        self.up, self.down = Linear(dim, 4 * dim, bias=False), Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(norm(x), cos, sin)
        return x + self.down(self.up(norm(x)).relu().square())


class PlainGPT(nn.Module):
    """Depth d, width 64 d rounded up to a multiple of 128, heads of 128 channels, untied head, softcap 15."""

    cos: Tensor
    sin: Tensor

    def __init__(self, depth: int, length: int, vocab: int, dtype: torch.dtype) -> None:
        super().__init__()
        dim = -(-64 * depth // 128) * 128
        self.dtype = dtype
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(dim, dim // 128) for _ in range(depth))
        self.head = Linear(dim, vocab, bias=False)
        angles = torch.outer(torch.arange(length), 10_000.0 ** -(torch.arange(0, 128, 2) / 128))
        self.register_buffer("cos", angles.cos()[:, None, :])
        self.register_buffer("sin", angles.sin()[:, None, :])

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = norm(self.embed(idx).to(self.dtype))
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(norm(x)).float()
        logits = 15 * torch.tanh(logits / 15)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def timed_passes(
    *, depth: int, length: int, batch: int, vocab: int, dtype: torch.dtype, device: str, compile: bool = True
) -> Iterator[float]:
    """Seconds of one forward + backward pass after the other, without end; the first compiles."""
    torch.manual_seed(0)
    model = PlainGPT(depth, length, vocab, dtype).to(device)
    run = torch.compile(model) if compile else model
    tokens = torch.randint(vocab, (batch, length + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    while True:
        start = time.perf_counter()
        run(inputs, targets).backward()
        model.zero_grad(set_to_none=True)
        if device != "cpu":
            torch.cuda.synchronize()
        yield time.perf_counter() - start


def main() -> None:
    """Time it, and print one line of JSON."""
    parser = argparse.ArgumentParser(description="time forward + backward of the plain baseline")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = vars(parser.parse_args())
    steps, warmup = args.pop("steps"), args.pop("warmup")
    passes = timed_passes(**args | {"dtype": getattr(torch, args["dtype"])})
    median = statistics.median(list(itertools.islice(passes, warmup, warmup + steps)))
    rate = args["batch"] * args["length"] / median
    print(json.dumps({"seconds": median, "tokens_per_second": rate, "steps": steps}))


if __name__ == "__main__":
    main()
