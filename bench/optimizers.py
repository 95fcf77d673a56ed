"""Does Muon train better than AdamW alone, and do its options help? `python -m bench.optimizers --data DATA --out DIR`.

Equal tokens, equal data, equal seeds: Muon for the matrices of the blocks (AdamW for embedding and head, as always),
and AdamW for everything with the matrices' learning rate swept. AdamW is given its best: every rate of the sweep runs
with the first seed, a sweep whose best rate is at an end goes on past it, and the best rate runs with every seed. Muon
runs at the trainer's default rate, unswept; so do its options, one at a time, `normuon`, and `cautious` weight decay,
of which every decay runs with the first seed and the best with every seed; and then `both`, with that decay.

Each run is `scripts/train.py` in a process of its own, its result a line of DIR/runs.jsonl: a run that stands there is
not repeated, so that a comparison that was broken off goes on where it was. The table is the mean and the standard
deviation over the seeds of the validation bits per byte after the last step, and the same of the difference from Muon
seed by seed: runs of one seed see the same text in the same order from the same weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SWEEP = (0.001, 0.002, 0.004, 0.008, 0.016)
MUON_LR = 0.02  # the trainer's
DECAYS = (0.02, 0.1, 0.5)  # times the rate, what a step takes of a weight that it makes smaller anyway
OPTIMIZERS = ("adamw", "muon", "normuon", "cautious", "both")
MOST_EXTRA_RATES = 4


class Run(NamedTuple):
    """One training run."""

    optimizer: str
    """of OPTIMIZERS"""
    matrix_lr: float
    seed: int
    decay: float = 0.0
    """of the matrices, cautious"""

    @property
    def tag(self) -> str:
        """Its name as a directory."""
        decay = f"-{self.decay:g}" if self.decay else ""
        return f"{self.optimizer}-{self.matrix_lr:g}{decay}-{self.seed}"


Results = dict[Run, dict[str, Any]]


def read_results(path: Path) -> Results:
    """The runs that have ended."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {Run(**{field: row[field] for field in Run._fields if field in row}): row for row in rows}


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
        "matrix-optimizer": "adamw" if run.optimizer == "adamw" else "muon",
        "matrix-lr": run.matrix_lr,
        "seed": run.seed,
        "model-tag": run.tag,
        "run": run.tag,
    }
    if run.optimizer != "adamw":
        flags |= {"normuon": run.optimizer in ("normuon", "both"), "matrix-weight-decay": run.decay}
    command = [
        sys.executable,
        str(ROOT / "scripts/train.py"),
        *(f"--{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in flags.items()),
    ]
    environment = os.environ | {"VIBECHAT_BASE_DIR": str(base)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"error: {run.tag} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return run._asdict() | {"val_bpb": last_bpb(base / "runs" / run.tag / "metrics.jsonl"), "tokens": args.tokens}


def last_bpb(metrics: Path) -> float:
    """Validation bits per byte after the last step of a run."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return float([row["val/bpb"] for row in rows if "val/bpb" in row][-1])


def next_run(
    results: Results, optimizers: Sequence[str], rates: Sequence[float], seeds: Sequence[int], decays: Sequence[float]
) -> Run | None:
    """What to train next: AdamW's sweep, past its ends while the best is there, then all seeds of its best rate; Muon;
    its options, of which `both` waits for the best decay of `cautious`, or takes the first."""
    first = seeds[0]
    wanted: list[Run] = []
    if "adamw" in optimizers:
        wanted = [Run("adamw", rate, first) for rate in rates]
        if results.keys() >= set(wanted):
            swept = sorted(run.matrix_lr for run in results if run.optimizer == "adamw" and run.seed == first)
            best = best_run(results, "adamw", first)
            if best.matrix_lr in (swept[0], swept[-1]) and len(swept) < len(rates) + MOST_EXTRA_RATES:
                wanted.append(best._replace(matrix_lr=best.matrix_lr * (0.5 if best.matrix_lr == swept[0] else 2)))
            else:
                wanted += [best._replace(seed=seed) for seed in seeds]
    for option in ("muon", "normuon"):
        wanted += [Run(option, MUON_LR, seed) for seed in seeds if option in optimizers]
    if "cautious" in optimizers:
        sweep = [Run("cautious", MUON_LR, first, decay) for decay in decays]
        wanted += sweep
        if results.keys() >= set(sweep):
            wanted += [best_run(results, "cautious", first)._replace(seed=seed) for seed in seeds]
    if "both" in optimizers:
        decayed = any((run.optimizer, run.seed) == ("cautious", first) for run in results)
        decay = best_run(results, "cautious", first).decay if decayed else decays[0]
        wanted += [Run("both", MUON_LR, seed, decay) for seed in seeds]
    return next((run for run in wanted if run not in results), None)


def best_run(results: Results, optimizer: str, seed: int) -> Run:
    """The one with the fewest bits at a seed."""
    runs = [run for run in results if (run.optimizer, run.seed) == (optimizer, seed)]
    return min(runs, key=lambda run: results[run]["val_bpb"])


def print_table(results: Results) -> None:
    """A line for each optimizer, rate and decay; deviations are the sample's, where there are several seeds."""
    bits = {run: float(row["val_bpb"]) for run, row in results.items()}
    muon = {run.seed: value for run, value in bits.items() if run.optimizer == "muon"}
    print(f"\n{'matrices':<10}{'rate':>8}{'decay':>7}{'seeds':>7}{'val bpb':>10}{'std':>9}{'to Muon':>10}{'std':>9}")
    for optimizer, rate, decay in sorted({(run.optimizer, run.matrix_lr, run.decay) for run in bits}):
        of_seed = {seed: value for (*run, seed, d), value in bits.items() if (*run, d) == (optimizer, rate, decay)}
        apart = [value - muon[seed] for seed, value in of_seed.items() if seed in muon and optimizer != "muon"]
        said = f"{optimizer:<10}{rate:>8g}{decay:>7g}{len(of_seed):>7}{_spread(list(of_seed.values()))}"
        print((said + _spread(apart, sign="+")).rstrip())


def _spread(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation, where there are any."""
    mean = f"{statistics.mean(values):{sign}.4f}" if values else ""
    return f"{mean:>10}{f'{statistics.stdev(values):.4f}' if len(values) > 1 else '':>9}"


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
    parser.add_argument("--decays", type=float, nargs="+", default=list(DECAYS), help="of cautious weight decay")
    parser.add_argument("--only", choices=OPTIMIZERS, nargs="+", default=list(OPTIMIZERS))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "runs.jsonl"
    asked = args.only, args.rates, args.seeds, args.decays
    while (run := next_run(results := read_results(path), *asked)) is not None:
        row = train(run, args)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{run.tag:<24}{row['val_bpb']:.4f}", flush=True)
    print_table(results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
