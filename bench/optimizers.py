"""Does Muon train better than AdamW alone? `python -m bench.optimizers --data DATA --out DIR`.

Equal tokens, equal data, equal seeds: Muon for the matrices of the blocks (AdamW for embedding and head, as always),
and AdamW for everything with the matrices' learning rate swept. AdamW is given its best: every rate of the sweep runs
with the first seed, a sweep whose best rate is at an end goes on past it, and the best rate runs with every seed. Muon
runs at the trainer's default rate, unswept.

Each run is `scripts/train.py` in a process of its own, its result a line of DIR/runs.jsonl: a run that stands there is
not repeated, so that a comparison that was broken off goes on where it was. The table is the mean and the standard
deviation over the seeds of the validation bits per byte after the last step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SWEEP = (0.001, 0.002, 0.004, 0.008, 0.016)
MUON_LR = 0.02  # the trainer's
MOST_EXTRA_RATES = 4


class Run(NamedTuple):
    """One training run."""

    optimizer: str
    matrix_lr: float
    seed: int

    @property
    def tag(self) -> str:
        """Its name as a directory."""
        return f"{self.optimizer}-{self.matrix_lr:g}-{self.seed}"


Results = dict[Run, dict[str, Any]]


def read_results(path: Path) -> Results:
    """The runs that have ended."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {Run(row["optimizer"], row["matrix_lr"], row["seed"]): row for row in rows}


def train(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Train once, from nothing, and return the run's row.

    Raises:
        SystemExit: with what the trainer said last, if it failed.
    """
    base = (args.out / "base").resolve()
    iterations = round(args.tokens / args.total_batch_size)
    flags = {
        "data": args.data,
        "depth": args.depth,
        "vocab-size": args.vocab_size,
        "total-batch-size": args.total_batch_size,
        "num-iterations": iterations,
        "eval-every": iterations,
        "eval-tokens": args.eval_tokens,
        "sample-every": -1,
        "save-every": -1,
        "matrix-optimizer": run.optimizer,
        "matrix-lr": run.matrix_lr,
        "seed": run.seed,
        "model-tag": run.tag,
        "run": run.tag,
    }
    command = [sys.executable, str(ROOT / "scripts/train.py"), *(f"--{k}={v}" for k, v in flags.items())]
    environment = os.environ | {"VIBECHAT_BASE_DIR": str(base)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"error: {run.tag} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return run._asdict() | {"val_bpb": last_bpb(base / "runs" / run.tag / "metrics.jsonl"), "tokens": args.tokens}


def last_bpb(metrics: Path) -> float:
    """Validation bits per byte after the last step of a run."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return float([row["val/bpb"] for row in rows if "val/bpb" in row][-1])


def next_run(results: Results, optimizers: list[str], rates: list[float], seeds: list[int]) -> Run | None:
    """What to train next: AdamW's sweep, past its ends while the best is there, then all seeds of each best rate."""
    if "adamw" in optimizers:
        for rate in rates:
            if Run("adamw", rate, seeds[0]) not in results:
                return Run("adamw", rate, seeds[0])
        swept = sorted(run.matrix_lr for run in results if run.optimizer == "adamw" and run.seed == seeds[0])
        best = best_rate(results, "adamw", seeds[0])
        if best in (swept[0], swept[-1]) and len(swept) < len(rates) + MOST_EXTRA_RATES:
            return Run("adamw", best / 2 if best == swept[0] else best * 2, seeds[0])
        for seed in seeds[1:]:
            if Run("adamw", best, seed) not in results:
                return Run("adamw", best, seed)
    if "muon" in optimizers:
        for seed in seeds:
            if Run("muon", MUON_LR, seed) not in results:
                return Run("muon", MUON_LR, seed)
    return None


def best_rate(results: Results, optimizer: str, seed: int) -> float:
    """The learning rate with the fewest bits at one seed."""
    rows = {run.matrix_lr: row["val_bpb"] for run, row in results.items() if run[::2] == (optimizer, seed)}
    return min(rows, key=rows.__getitem__)


def print_table(results: Results) -> None:
    """A line for each optimizer and rate; the standard deviation is the sample's, where there are several seeds."""
    print(f"\n{'matrices':<10}{'rate':>8}{'seeds':>7}{'val bpb':>10}{'std':>9}")
    for optimizer, rate in sorted({run[:2] for run in results}):
        bits = [row["val_bpb"] for run, row in results.items() if run[:2] == (optimizer, rate)]
        spread = f"{statistics.stdev(bits):.4f}" if len(bits) > 1 else ""
        print(f"{optimizer:<10}{rate:>8g}{len(bits):>7}{statistics.mean(bits):>10.4f}{spread:>9}")


def main(argv: list[str] | None = None) -> int:
    """Train what is missing and print the table. Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.optimizers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="builtin", help="as for training")
    parser.add_argument("--out", type=Path, required=True, help="where the runs and their results go")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--tokens", type=float, default=5e6, help="training tokens of a run")
    parser.add_argument("--total-batch-size", type=int, default=4096, help="tokens of an update")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--eval-tokens", type=int, default=262_144)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rates", type=float, nargs="+", default=list(SWEEP), help="of AdamW for the matrices")
    parser.add_argument("--only", choices=("muon", "adamw"), nargs="+", default=["adamw", "muon"])
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "runs.jsonl"
    while (run := next_run(results := read_results(path), args.only, args.rates, args.seeds)) is not None:
        row = train(run, args)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{run.tag:<24}{row['val_bpb']:.4f}", flush=True)
    print_table(results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
