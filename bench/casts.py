"""What it saves to cast the weights once a step and not in every micro-batch: `python -m bench.casts`.

Two training steps of the same model on the same tokens, one as it trains (vibechat/working_weights.py), one that leaves
the casts to the model, take turns. The ratio is the median over rounds of (at every use / once), and its spread is that
of the middle three fifths.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.measure import summarize
from vibechat.common import autodetect_device_type, compile_obstacle, keep_freed_memory
from vibechat.gpt import GPT
from vibechat.scaling import model_config
from vibechat.train_step import MicroBatch, TrainStep


class CastAtEveryUse(TrainStep):
    """A step whose model casts, packs and rounds its weights wherever it reads them."""

    def _cast_weights(self, micro_batches: int) -> dict[str, Tensor]:
        return {}


def timed_step(kind: type[TrainStep], args: argparse.Namespace, rows: list[MicroBatch]) -> Callable[[], float]:
    """A function that takes a step and says how many seconds it took; compiled and warm."""
    device = torch.device(autodetect_device_type())
    torch.manual_seed(0)
    model = GPT(model_config(args.depth, args.max_seq_len, args.vocab_size)).to(device)
    model.init_weights()
    model.set_fp8(args.fp8)
    step = kind(model, model.setup_optimizers(), compile=args.compile and not compile_obstacle(device))

    def seconds() -> float:
        start = time.perf_counter()
        step(rows)[0].item()  # which waits for the device
        return time.perf_counter() - start

    for _ in range(3):
        seconds()
    return seconds


def main(argv: list[str] | None = None) -> int:
    """Let both take turns, print each round and the ratio."""
    parser = argparse.ArgumentParser(prog="python -m bench.casts", description="weights cast once a step, or always")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--device-batch-size", type=int, default=8, help="rows of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step; a CPU casts a single one at every use")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--fp8", action="store_true", help="emulated where the device has none")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    keep_freed_memory()
    shape = args.device_batch_size, args.max_seq_len + 1
    tokens = [torch.randint(args.vocab_size, shape) for _ in range(args.micro_batches)]
    device = autodetect_device_type()
    rows = [(t[:, :-1].contiguous().to(device), t[:, 1:].contiguous().to(device)) for t in tokens]
    once, always = (timed_step(kind, args, rows) for kind in (TrainStep, CastAtEveryUse))
    pairs = []
    for number in range(args.rounds):
        ours, theirs = once(), always()
        pairs.append((ours, theirs))
        print(f"round {number + 1}: once {1e3 * ours:.1f} ms, at every use {1e3 * theirs:.1f}", flush=True)
    ratio = summarize([theirs / ours for ours, theirs in pairs])
    medians = [1e3 * statistics.median(column) for column in zip(*pairs, strict=True)]
    print(
        f"{args.micro_batches} micro-batches: once {medians[0]:.1f} ms a step, at every use {medians[1]:.1f} ms, "
        f"ratio {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
