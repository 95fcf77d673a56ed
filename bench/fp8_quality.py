"""What fp8 costs in quality: `python -m bench.fp8_quality`.

The same model, tokens and seeds are trained in bfloat16 and with the blocks' matmuls in fp8, emulated where there is no
GPU that has it (see vibechat/fp8.py), on the built-in corpus with a tokenizer trained for it. One line a run as it
ends: validation bits per byte, scored in bfloat16 both times. Two seeds apart say how much of a difference is chance.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch

from bench.measure import provenance, publish
from vibechat.common import autodetect_device_type, compile_obstacle, keep_freed_memory
from vibechat.dataloader import Loader
from vibechat.dataset import Dataset, open_dataset
from vibechat.evaluation import FixedRows
from vibechat.gpt import GPT
from vibechat.scaling import plan
from vibechat.tokenizer import RustBPETokenizer
from vibechat.train_step import MicroBatch, TrainStep


def train(
    args: argparse.Namespace, dataset: Dataset, tokenizer: RustBPETokenizer, seed: int, *, fp8: bool
) -> dict[str, object]:
    """One run; its row."""
    device = torch.device(autodetect_device_type())
    run = plan(
        args.depth,
        sequence_len=args.max_seq_len,
        vocab_size=tokenizer.get_vocab_size(),
        total_batch_size=args.total_batch_size,
        num_iterations=args.steps,
    )
    torch.manual_seed(seed)
    model = GPT(run.model_config).to(device)
    model.init_weights()
    model.set_fp8(fp8)
    step = TrainStep(model, model.setup_optimizers(), compile=args.compile and not compile_obstacle(device))
    rows = args.total_batch_size // args.max_seq_len
    sizes = dataset, tokenizer, rows, args.max_seq_len
    start, losses = time.perf_counter(), []
    with closing(Loader(*sizes, "train", rows_per_step=rows, seed=seed, device=device)) as batches:
        for index in range(args.steps):
            micro_batches: Iterator[MicroBatch] = iter(batches)
            numbers = step([next(micro_batches)], run.lr_multiplier(index), run.muon_momentum(index))
            losses.append(numbers[0].item())
            if index % 50 == 0:
                print(f"  seed {seed} {'fp8 ' if fp8 else 'bf16'} step {index}: {losses[-1]:.3f} nats", flush=True)
    with closing(Loader(*sizes, "val", device=device)) as batches:
        validation = FixedRows(batches, args.eval_tokens, tokenizer, device)
    return {
        "seed": seed,
        "fp8": fp8,
        "tokens": args.steps * args.total_batch_size,
        "val_bpb": validation.bits_per_byte(model),
        "last_loss": statistics.fmean(losses[-20:]),
        "seconds": time.perf_counter() - start,
    }


def print_table(rows: list[dict]) -> None:
    """Each seed's pair, and the mean and sample standard deviation of the differences."""
    print(f"{'seed':>6}{'bf16 bpb':>10}{'fp8 bpb':>10}{'difference':>12}")
    pairs = {(row["seed"], row["fp8"]): row["val_bpb"] for row in rows}
    differences = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        if (seed, True) in pairs and (seed, False) in pairs:
            plain, rounded = pairs[seed, False], pairs[seed, True]
            differences.append(rounded - plain)
            print(f"{seed:>6}{plain:>10.4f}{rounded:>10.4f}{rounded - plain:>+12.4f}")
    if differences:
        said = f"mean difference {statistics.fmean(differences):+.4f} bits per byte over {len(differences)} seeds"
        print(said + (f", standard deviation {statistics.stdev(differences):.4f}" if len(differences) > 1 else ""))


def main(argv: list[str] | None = None) -> int:
    """Train every pair, print the table; with --json FILE write the rows as they come."""
    parser = argparse.ArgumentParser(prog="python -m bench.fp8_quality", description="what fp8 costs in quality")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--max-seq-len", type=int, default=256)
    parser.add_argument("--total-batch-size", type=int, default=2048, help="tokens of an update")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--eval-tokens", type=int, default=65_536)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    keep_freed_memory()
    dataset = open_dataset("builtin", progress=False)
    texts = dataset.iter_texts("train", max_chars=20_000_000)
    tokenizer = RustBPETokenizer.train_from_iterator(texts, args.vocab_size)
    rows: list[dict[str, object]] = []
    for seed in args.seeds:
        for fp8 in (False, True):
            rows.append(train(args, dataset, tokenizer, seed, fp8=fp8))
            print(json.dumps(rows[-1]), flush=True)
            if args.json:
                publish(args.json, {**provenance(torch.device(autodetect_device_type())), "rows": rows})
    print_table(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
