"""Real training steps, and what share of the hardware they use: `python -m bench.mfu --depth 4`.

Each implementation runs in a process of its own, and they take turns round by round, so that a slow minute of the
machine falls on all of them. A ratio is the median over rounds of (baseline's seconds / ours in the same round).

    plain     bench/plain_gpt.py under torch.compile: forward + backward only, no optimizer, no data. The baseline.
    eager     vibechat's trainer, references only, without torch.compile
    vibechat  vibechat's trainer as it trains by default: optimizer, data loader and gradient norm included

MFU = FLOPs a token x tokens a second / peak. The peak is the data sheet's dense bf16 rate where the device is known,
else what a 4096-cubed matmul in the compute dtype reaches in the same process. `mfu` counts causal attention, `mfu
full` all T x T of it. The breakdown is wall time between marks, so that it adds up to the step.
`--check` holds the ratio to plain against the bar (1.3 on a CPU) and exits 1 below it; `--json` ends with one line of
JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench import plain_gpt
from bench.measure import provenance
from vibechat.common import (
    UserError,
    autodetect_device_type,
    compile_obstacle,
    compute_dtype,
    keep_freed_memory,
    peak_flops,
)
from vibechat.gpt import GPT
from vibechat.kernels import set_backend
from vibechat.scaling import plan
from vibechat.train_step import TrainStep, use_deterministic_algorithms
from vibechat.trainer import Rates, Trainer, measure_matmul_flops, memory_bytes

CPU_BAR = 1.3  # vibechat's whole step against the forward + backward of plain
IMPLEMENTATIONS = ("plain", "eager", "vibechat")


# ---------------------------------------------------------------------------------------------------------------------
# one implementation, in this process


def synthetic_batches(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Random tokens, another batch each time."""
    while True:
        tokens = torch.randint(args.vocab_size, (args.device_batch_size, args.max_seq_len + 1), device=device)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def real_batches(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The trainer's own loader on the built-in text, tokenizing as it goes."""
    from vibechat.dataloader import Loader
    from vibechat.dataset import open_dataset
    from vibechat.tokenizer import RustBPETokenizer

    dataset = open_dataset("builtin", progress=False)
    texts = dataset.iter_texts("train", max_chars=20_000_000)
    tokenizer = RustBPETokenizer.train_from_iterator(texts, args.vocab_size)
    rows = args.total_batch_size // args.max_seq_len
    return Loader(dataset, tokenizer, args.device_batch_size, args.max_seq_len, rows_per_step=rows, device=device)


def measure_trainer(args: argparse.Namespace, *, compile: bool, kernels: str) -> dict[str, Any]:
    """Steps of vibechat's trainer: seconds of each, and of each of its phases."""
    device = torch.device(args.device)
    keep_freed_memory()
    if device.type == "cpu":
        use_deterministic_algorithms()
    set_backend(kernels)
    run = plan(
        args.depth,
        sequence_len=args.max_seq_len,
        vocab_size=args.vocab_size,
        total_batch_size=args.total_batch_size,
        num_iterations=10**6,
    )
    torch.manual_seed(0)
    model = GPT(run.model_config).to(device)
    model.init_weights()
    dtype = compute_dtype(device)
    peak = (peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None) or measure_matmul_flops(
        device, dtype
    )
    if compile and (obstacle := compile_obstacle(device)):
        raise UserError(f"torch.compile cannot be used here: {obstacle}")
    step = TrainStep(model, model.setup_optimizers(), compile=compile, say=lambda text: None)
    trainer = Trainer(
        step,
        real_batches(args, device) if args.data == "builtin" else synthetic_batches(args, device),
        micro_batches=-(-args.total_batch_size // (args.max_seq_len * args.device_batch_size)),
        num_iterations=run.num_iterations,
        rates=Rates(args.total_batch_size),
        lr_multiplier=run.lr_multiplier,
        momentum=run.muon_momentum,
    )
    phases: list[dict[str, float]] = []
    for _ in range(args.warmup + args.steps):
        trainer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        phases.append(dict(step.clock.seconds))
    phases = phases[args.warmup :]
    return {
        "seconds": statistics.median(sum(phase.values()) for phase in phases),
        "phases": {name: statistics.fmean(phase[name] for phase in phases) for name in phases[0]},
        "mean_seconds": statistics.fmean(sum(phase.values()) for phase in phases),
        "flops_per_token": model.estimate_flops(causal=True),
        "flops_per_token_full": model.estimate_flops(),
        "peak_flops": peak,
        "memory_bytes": memory_bytes(device),
        "dtype": str(dtype).removeprefix("torch."),
    }


def measure_plain(args: argparse.Namespace) -> dict[str, Any]:
    """Forward + backward of the plain baseline, compiled, under the C library's own allocator settings."""
    device = torch.device(args.device)
    seconds = plain_gpt.measure(
        depth=args.depth,
        length=args.max_seq_len,
        batch=args.device_batch_size,
        vocab=args.vocab_size,
        dtype=compute_dtype(device),
        device=args.device,
        steps=args.steps,
        warmup=args.warmup,
    )
    micro_batches = args.total_batch_size / (args.max_seq_len * args.device_batch_size)
    return {"seconds": statistics.median(seconds) * micro_batches, "memory_bytes": memory_bytes(device)}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What one implementation does on this machine, measured in this process."""
    if name == "plain":
        return measure_plain(args)
    if name == "eager":
        return measure_trainer(args, compile=False, kernels="torch")
    return measure_trainer(args, compile=True, kernels="auto")


# ---------------------------------------------------------------------------------------------------------------------
# all of them, taking turns


def in_a_process_of_its_own(name: str, argv: list[str]) -> dict[str, Any]:
    """`measure` in a fresh interpreter."""
    command = [sys.executable, "-m", "bench.mfu", *argv, "--worker", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{name} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def rounds_of(args: argparse.Namespace, argv: list[str]) -> dict[str, list[dict[str, Any]]]:
    """{implementation: one result a round}."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in args.only}
    for number in range(args.rounds):
        for name in args.only:
            print(f"round {number + 1} of {args.rounds}: {name} ...", end=" ", flush=True)
            result = in_a_process_of_its_own(name, argv)
            results[name].append(result)
            print(f"{result['seconds'] * 1e3:.1f} ms a step", flush=True)
    return results


def table_of(args: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """{implementation: its row}: medians over the rounds."""
    rows = {}
    for name, rounds in results.items():
        seconds = [result["seconds"] for result in rounds]
        rate = args.total_batch_size / statistics.median(seconds)
        row = {
            "ms": statistics.median(seconds) * 1e3,
            "spread": (max(seconds) - min(seconds)) / statistics.median(seconds),
            "tokens_per_second": rate,
            "memory_bytes": statistics.median(result["memory_bytes"] for result in rounds),
        }
        if "plain" in results:
            plain = [result["seconds"] for result in results["plain"]]
            row["ratio_to_plain"] = statistics.median(b / a for a, b in zip(seconds, plain, strict=True))
        if "peak_flops" in rounds[0]:
            for key, flops in (("mfu", "flops_per_token"), ("mfu_full", "flops_per_token_full")):
                row[key] = statistics.median(
                    args.total_batch_size / r["seconds"] * r[flops] / r["peak_flops"] for r in rounds
                )
        rows[name] = row
    return rows


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """Each implementation a line."""
    print(f"\n{'':<10}{'ms a step':>10}{'spread':>8}{'tokens/s':>11}{'x plain':>9}{'mfu':>8}{'mfu full':>10}{'GiB':>7}")
    for name, row in rows.items():
        share = [f"{100 * row[key]:.1f}%" if key in row else "" for key in ("mfu", "mfu_full")]
        ratio = f"{row['ratio_to_plain']:.2f}" if "ratio_to_plain" in row else ""
        print(
            f"{name:<10}{row['ms']:>10.1f}{100 * row['spread']:>7.0f}%{row['tokens_per_second']:>11,.0f}{ratio:>9}"
            f"{share[0]:>8}{share[1]:>10}{row['memory_bytes'] / 2**30:>7.2f}"
        )


def print_breakdown(name: str, rounds: list[dict[str, Any]]) -> None:
    """Where a step goes: means over its steps, of the median round, adding up to the mean step."""
    middle = sorted(rounds, key=lambda result: result["mean_seconds"])[len(rounds) // 2]
    print(f"\n{name}: where a step goes")
    for phase, seconds in middle["phases"].items():
        print(f"  {phase:<18}{seconds * 1e3:>9.1f} ms{100 * seconds / middle['mean_seconds']:>7.1f}%")
    print(f"  {'the mean step':<18}{middle['mean_seconds'] * 1e3:>9.1f} ms")


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line, with this machine's defaults filled in."""
    gpu = autodetect_device_type() == "cuda"
    parser = argparse.ArgumentParser(prog="python -m bench.mfu", description="training steps and their share of peak")
    parser.add_argument("--depth", type=int, default=26 if gpu else 4)
    parser.add_argument("--max-seq-len", type=int, default=2048 if gpu else 512)
    parser.add_argument("--vocab-size", type=int, default=65_536 if gpu else 8192)
    parser.add_argument("--device-batch-size", type=int, default=16 if gpu else 8, help="rows of a micro-batch")
    parser.add_argument("--total-batch-size", type=int, default=-1, help="tokens of a step; -1: one micro-batch")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--data", choices=("builtin", "synthetic"), default="synthetic" if gpu else "builtin")
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed, after --warmup that are not")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--check", action="store_true", help=f"exit 1 below {CPU_BAR} times plain")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--worker", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.total_batch_size < 0:
        args.total_batch_size = args.max_seq_len * args.device_batch_size
    if args.total_batch_size % (args.max_seq_len * args.device_batch_size):
        parser.error("--total-batch-size must be a multiple of --max-seq-len x --device-batch-size")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    try:
        if args.worker:
            print(json.dumps(measure(args.worker, args)))
            return 0
        print(
            f"depth {args.depth}, {args.device_batch_size} rows of {args.max_seq_len} tokens, vocabulary "
            f"{args.vocab_size:,}, {args.total_batch_size:,} tokens a step, {args.data} data, on {args.device}"
        )
        results = rounds_of(args, argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = table_of(args, results)
    print_table(rows)
    for name in ("eager", "vibechat"):
        if name in results:
            print_breakdown(name, results[name])
    if "vibechat" in results:
        last = results["vibechat"][-1]
        print(f"\npeak: {last['peak_flops'] / 1e12:.3f} TFLOP/s in {last['dtype']}")
    if args.json:
        print(json.dumps({"environment": provenance(torch.device(args.device)), "rows": rows, "rounds": results}))
    ratio = rows.get("vibechat", {}).get("ratio_to_plain", 0.0)
    if args.check and ratio < CPU_BAR:
        print(f"vibechat is {ratio:.2f} times plain, below the bar of {CPU_BAR}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
