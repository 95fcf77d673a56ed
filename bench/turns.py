"""Two forms of a training step that take turns in one process, so that a slow minute of the machine falls on both."""

import argparse
import statistics
import time

import torch

from bench.measure import summarize
from vibechat.common import autodetect_device_type, compile_obstacle, keep_freed_memory
from vibechat.gpt import GPT
from vibechat.scaling import model_config
from vibechat.train_step import MicroBatch, TrainStep


def parser(program: str, description: str, micro_batches: int) -> argparse.ArgumentParser:
    """The flags that say what a step is."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--device-batch-size", type=int, default=8, help="rows of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=micro_batches, help="of a step")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--fp8", action="store_true", help="emulated where the device has none")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser


def random_rows(args: argparse.Namespace) -> list[MicroBatch]:
    """The micro-batches of every step, on the device."""
    shape, device = (args.device_batch_size, args.max_seq_len + 1), autodetect_device_type()
    tokens = [torch.randint(args.vocab_size, shape) for _ in range(args.micro_batches)]
    return [(t[:, :-1].contiguous().to(device), t[:, 1:].contiguous().to(device)) for t in tokens]


def make_step(args: argparse.Namespace, kind: type[TrainStep] = TrainStep, *, checkpointing: bool = False) -> TrainStep:
    """A step of that kind, with the same weights each time."""
    keep_freed_memory()
    device = torch.device(autodetect_device_type())
    torch.manual_seed(0)
    model = GPT(model_config(args.depth, args.max_seq_len, args.vocab_size)).to(device)
    model.init_weights()
    model.set_fp8(args.fp8)
    model.activation_checkpointing = checkpointing
    return kind(model, model.setup_optimizers(), compile=args.compile and not compile_obstacle(device))


def compare(steps: dict[str, TrainStep], rows: list[MicroBatch], rounds: int) -> None:
    """Warm both up, let them take turns, and print each round and the ratio: the median over the rounds of (second /
    first), and the spread of the middle three fifths."""

    def seconds(step: TrainStep) -> float:
        start = time.perf_counter()
        step(rows)[0].item()  # which waits for the device
        return time.perf_counter() - start

    for step in steps.values():
        for _ in range(3):
            seconds(step)
    turns = []
    for number in range(rounds):
        turns.append([seconds(step) for step in steps.values()])
        said = ", ".join(f"{name} {1e3 * one:.1f} ms" for name, one in zip(steps, turns[-1], strict=True))
        print(f"round {number + 1}: {said}", flush=True)
    ratio = summarize([second / first for first, second in turns])
    medians = [statistics.median(column) for column in zip(*turns, strict=True)]
    said = ", ".join(f"{name} {1e3 * one:.1f} ms a step" for name, one in zip(steps, medians, strict=True))
    print(f"{len(rows)} micro-batches: {said}, ratio {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})")
