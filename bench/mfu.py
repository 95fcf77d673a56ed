"""Real training steps, and what share of the hardware they use: `python -m bench.mfu --depth 26`.

    plain     bench/plain_gpt.py under torch.compile: forward + backward only, no optimizer, no data (CPU only)
    eager     vibechat's trainer, references only, without torch.compile
    compiled  vibechat's trainer under torch.compile, references only
    vibechat  vibechat's trainer as it trains: torch.compile, with the kernels that --kernels chooses
    fp8       the same with --fp8 (only where --only names it, and left out where the device cannot: Hopper can)

Each runs in a process of its own, and one that fails or runs out of memory costs the others nothing. All are measured
at the largest micro-batch that all fit, then each, in the order of --only, at the largest that it fits itself; with
--common-batch-size before that each at this one, or at its largest where it does not fit so many rows. On a CPU they
take turns round by round, so that a slow minute of the machine falls on all of them; on a GPU, where two do not fit,
they come one after another. A ratio is the median over rounds of (the other's seconds / ours in the same round); where
each is at its own best, of the tokens a second.

MFU = FLOPs a token x tokens a second / peak. The peak is the data sheet's dense bf16 rate where the device is known,
else what a 4096-cubed matmul in the compute dtype reaches in the same process. `mfu` counts causal attention, `mfu
full` all T x T of it, as nanochat does. The waterfall (bench/waterfall.py) is one more step, under the profiler;
`--kernels-by-name N` adds its N longest kernels.

`--check` holds the run against bench/baselines/<device>.json and exits 1 below it (bench/baseline.py);
`--write-baseline --who NAME --why TEXT` changes that file; both take a run that was measured elsewhere with --recorded
FILE. Each round goes to $OUT/mfu.json (default bench/results/<device>/mfu.json) when it is known; `--json` prints it.
Ctrl-C (SIGINT) ends it at once, with a table of what was measured so far and exit status 130.
"""

import argparse
import contextlib
import itertools
import json
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import baseline
from bench.implementations import DidNotFit, Worker, serve
from bench.measure import provenance, publish, results_directory
from bench.ops.newton_schulz import matrices
from bench.shapes import Model
from bench.waterfall import kernel_lines, waterfall_lines
from vibechat.common import UserError, autodetect_device_type, compute_dtype
from vibechat.fp8 import fp8_obstacle
from vibechat.gpt import GPTConfig
from vibechat.kernels.cost import newton_schulz_flops
from vibechat.memory_plan import FORMS, largest_planned
from vibechat.scaling import model_config

CPU_BAR = 1.3  # vibechat's whole step against the forward + backward of plain
IMPLEMENTATIONS = ("plain", "eager", "compiled", "vibechat", "fp8")
COMPARED = ("plain", "eager", "compiled")  # what the others are so many times as fast as
Runs = dict[tuple[str, int], dict[str, Any]]  # (implementation, micro-batch) -> facts, rounds, where a step goes


# ---------------------------------------------------------------------------------------------------------------------
# measuring


class Benchmark:
    """All runs of one invocation, written to a file as they are known."""

    def __init__(self, args: argparse.Namespace, argv: list[str]) -> None:
        self.args, self.argv = args, argv
        self.device = torch.device(args.device)
        self.runs: Runs = {}
        self.too_large: dict[str, list[int]] = {name: [] for name in args.only}
        self.failed: list[str] = []
        self.path = results_directory(self.device) / "mfu.json"
        self._deadline = time.monotonic() + 60 * args.minutes

    def measure(self) -> None:
        """Everything that was asked for, in the order of its worth, while there is time."""
        limits = self._limits()
        while (missing := self._missing(limits)) and self._has_time():
            names, size = missing
            for group in [names] if self.device.type == "cpu" else [[name] for name in names]:
                dropped = self._measure_together(group, size) if self._has_time() else {}
                for name, failed in dropped.items():
                    limits[name] = 0 if failed else size // 2
                    if not limits[name]:
                        del limits[name]
                if dropped:
                    break  # the others need not run at a size that not all fit
        if missing:
            print("no time left for the rest", flush=True)

    def _has_time(self) -> bool:
        return time.monotonic() < self._deadline

    def _limits(self) -> dict[str, int]:
        """The largest micro-batch to try for each implementation."""
        args = self.args
        rows = args.total_batch_size // args.max_seq_len
        if args.device_batch_size != "auto":
            return dict.fromkeys(args.only, int(args.device_batch_size))
        config = model_config(args.depth, args.max_seq_len, args.vocab_size)
        form = {"plain": "eager"} | {name: name for name in FORMS}
        return {name: self._largest(config, form[name], rows) for name in args.only}

    def _largest(self, config: GPTConfig, form: str, rows: int) -> int:
        return largest_planned(config, form, rows, self.device, checkpointing=self.args.activation_checkpointing)

    def _missing(self, limits: dict[str, int]) -> tuple[list[str], int] | None:
        """(implementations, micro-batch) to measure next: at what was asked for, what all fit, each one's largest."""
        if not limits:
            return None
        asked = self.args.common_batch_size or min(limits.values())
        at_most = {name: min(size, asked) for name, size in limits.items()}
        for sizes in (at_most, dict.fromkeys(limits, min(at_most.values())), limits):
            missing = [name for name, size in sizes.items() if (name, size) not in self.runs]
            if missing:
                return [name for name in missing if sizes[name] == sizes[missing[0]]], sizes[missing[0]]
        return None

    def _measure_together(self, names: list[str], size: int) -> dict[str, bool]:
        """Run implementations at a micro-batch, taking turns; returns {one that did not: whether it failed}, of which
        the rest ran out of memory."""
        workers: dict[str, Worker] = {}
        dropped: dict[str, bool] = {}

        @contextlib.contextmanager
        def dropping(name: str) -> Iterator[None]:
            try:
                yield
            except (DidNotFit, UserError) as error:
                dropped[name] = isinstance(error, UserError)
                if dropped[name]:
                    self.failed.append(str(error))
                else:
                    self.too_large[name].append(size)
                print(f"{name}, {size} rows: {'' if dropped[name] else 'did not fit: '}{error}", flush=True)

        with contextlib.ExitStack() as stack:
            for name in names:
                print(f"{name}, {size} rows: compiling and warming up ...", flush=True)
                workers[name] = stack.enter_context(Worker(name, self.argv, size))
                with dropping(name):
                    workers[name].wait_until_ready()
            for number in range(self.args.rounds):
                for name, worker in workers.items() if not dropped else ():
                    with dropping(name):
                        self._add_round(name, size, number, worker)
            for name, worker in workers.items() if self.args.waterfall and not dropped else ():
                if self._has_time():
                    with dropping(name):
                        self.runs[name, size].update(worker.waterfall())
                        self.write()
        return dropped

    def _add_round(self, name: str, size: int, number: int, worker: Worker) -> None:
        result = worker.steps(self.args.steps)
        run = self.runs.setdefault((name, size), {"facts": worker.facts, "rounds": [], "waterfall": {}})
        run["rounds"].append(result)
        self.write()
        print(f"round {number + 1}: {name} {1e3 * result['seconds']:.1f} ms a step", flush=True)

    # -- what came of it

    def common(self) -> int | None:
        """The micro-batch at which most implementations were measured, the largest such one."""
        sizes = [size for _, size in self.runs]
        return max(sizes, key=lambda size: (sizes.count(size), size), default=None)

    def content(self) -> dict[str, Any]:
        """The run as JSON."""
        common, args = self.common(), self.args
        at_common = {name: run for (name, size), run in self.runs.items() if size == common}
        rows = table_of(args.total_batch_size, at_common)
        best: dict[str, dict[str, Any]] = {}
        for (name, size), run in self.runs.items():
            row = {"micro_batch": size, **table_of(args.total_batch_size, {name: run})[name]}
            if name not in best or row["tokens_per_second"] > best[name]["tokens_per_second"]:
                best[name] = row
        for row, (other, theirs) in itertools.product(best.values(), best.items()):
            if other in COMPARED and theirs is not row:
                row[f"ratio_to_{other}"] = row["tokens_per_second"] / theirs["tokens_per_second"]
        workload = {name: getattr(args, name) for name in baseline.WORKLOAD if name != "micro_batch"}
        return {
            "environment": provenance(self.device),
            "machine": baseline.machine(self.device),
            "workload": {**workload, "micro_batch": common, "kernels": args.kernels},
            "rows": rows,
            "best": best,
            "did_not_fit": self.too_large,
            "runs": [{"implementation": name, "micro_batch": size, **run} for (name, size), run in self.runs.items()],
        }

    def write(self) -> None:
        """Publish what is known so far."""
        publish(self.path, self.content())


def table_of(tokens: int, runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{implementation: its row}: medians over the rounds, ratios within each round."""
    rows = {}
    for name, run in runs.items():
        seconds = [result["seconds"] for result in run["rounds"]]
        facts = run["facts"]
        row = {
            "ms": statistics.median(seconds) * 1e3,
            "spread": baseline.spread(seconds),
            "tokens_per_second": tokens / statistics.median(seconds),
            "memory_bytes": max(result["memory_bytes"] for result in run["rounds"]),
        }
        for other in COMPARED:
            if other in runs and other != name:
                pairs = zip(seconds, (result["seconds"] for result in runs[other]["rounds"]), strict=False)
                ratios = [theirs / ours for ours, theirs in pairs]
                row[f"ratio_to_{other}"] = statistics.median(ratios)
                if other == "eager":
                    row["pair_spread"] = baseline.spread(ratios)
        for key, flops in (("mfu", "flops_per_token"), ("mfu_full", "flops_per_token_full")):
            if "peak_flops" in facts:
                row[key] = row["tokens_per_second"] * facts[flops] / facts["peak_flops"]
        rows[name] = row
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# saying it


def print_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Each implementation a line."""
    print(f"\n{title}")
    head = f"{'':<10}{'rows':>6}{'ms a step':>11}{'spread':>8}{'tokens/s':>11}{'x plain':>9}{'x eager':>9}"
    print(f"{head}{'x comp.':>9}{'mfu':>8}{'mfu full':>10}{'GiB':>8}")
    for name, row in rows.items():
        others = [f"ratio_to_{other}" for other in COMPARED]
        ratios = [f"{row[other]:.2f}" if other in row else "" for other in others]
        shares = [f"{100 * row[key]:.1f}%" if key in row else "" for key in ("mfu", "mfu_full")]
        print(
            f"{name:<10}{row.get('micro_batch', ''):>6}{row['ms']:>11.1f}{100 * row['spread']:>7.0f}%"
            f"{row['tokens_per_second']:>11,.0f}{ratios[0]:>9}{ratios[1]:>9}{ratios[2]:>9}"
            f"{shares[0]:>8}{shares[1]:>10}{row['memory_bytes'] / 2**30:>8.2f}"
        )


def print_run(run: dict[str, Any]) -> None:
    """Tables, waterfalls and what the shares are of."""
    for name, sizes in run["did_not_fit"].items():
        if sizes:
            print(f"{name} did not fit with {', '.join(map(str, sizes))} rows")
    size = run["workload"]["micro_batch"]
    if run["rows"]:
        who = "all" if run["rows"].keys() == run["best"].keys() else "most"
        rows = {name: {"micro_batch": size} | row for name, row in run["rows"].items()}
        print_table(f"at the largest micro-batch that {who} fit", rows)
    if any(row["micro_batch"] != size for row in run["best"].values()):
        print_table("each at its own best micro-batch", run["best"])
    for one in run["runs"]:
        if one["waterfall"]:
            print(f"\n{one['implementation']}, {one['micro_batch']} rows: where a step goes")
            timed = statistics.median(each["seconds"] for each in one["rounds"])
            lines = [*waterfall_lines(one["waterfall"], timed), *kernel_lines(one.get("kernels_by_name", ()))]
            print("\n".join(lines))
    facts = {one["implementation"]: one["facts"] for one in run["runs"] if "peak_flops" in one["facts"]}
    for one in list(facts.values())[:1]:
        print(f"\nMFU is of {one['peak_flops'] / 1e12:.4g} TFLOP/s in {one['dtype']}: {one['peak_is']}")
        print(f"attention: {one.get('attention', 'not recorded')}")
    for name in [name for name in ("vibechat", "fp8") if name in facts]:
        taken = [op for op, backend, _ in facts[name].get("kernels", ()) if backend == "triton"]
        print(f"Triton kernels of {name}: {', '.join(taken) or 'none'}")
    for line in optimizer_lines(run):
        print(line)


ORTHOGONALIZATIONS = {  # restarts on 4:1 matrices (-1: standard form), and whether a symmetric product costs half
    "standard form": (-1, False),
    "4:1 in Gram form, two restarts": (2, False),
    "the same with triangles": (2, True),
    "one restart, with triangles": (1, True),
}


def optimizer_lines(run: dict[str, Any]) -> list[str]:
    """The optimizer's share of vibechat's step, and what orthogonalization must take of it: its FLOPs at the peak."""
    ours = [one for one in run["runs"] if one["implementation"] == "vibechat" and one["rounds"]]
    if not ours:
        return []
    one, work = ours[-1], run["workload"]
    step = statistics.median(each["seconds"] for each in one["rounds"])
    channels = model_config(work["depth"], work["max_seq_len"], work["vocab_size"]).n_embd
    square, wide = (matrices(Model(work["depth"], channels, 1), form) for form in (False, True))
    passes = work["total_batch_size"] * one["facts"]["flops_per_token"]
    head = f"{'GFLOP':>9}{'of fwd + bwd':>14}{'ms at peak':>12}{'of the step':>13}"
    lines = [f"\n{'newton_schulz of every matrix':<32}{head}"]
    for form, (restarts, symmetric) in ORTHOGONALIZATIONS.items():
        flops = newton_schulz_flops(*square, symmetric=symmetric)
        flops += newton_schulz_flops(*wide, symmetric=symmetric, restarts=restarts)
        seconds = flops / one["facts"]["peak_flops"]
        shares = f"{100 * flops / passes:>13.1f}%{1e3 * seconds:>12.1f}{100 * seconds / step:>12.1f}%"
        lines.append(f"{form:<32}{flops / 1e9:>9.1f}{shares}")
    if run["machine"]["device_type"] == "cuda":  # where the host's phases are those of launching
        taken = [one["waterfall"]["optimizer"]] if "optimizer" in one["waterfall"] else []
    else:
        taken = [each["phases"]["optimizer"] for each in one["rounds"] if "phases" in each]
    if taken:
        measured = statistics.median(taken)
        what = "the whole optimizer, measured"
        lines.append(f"{what:<32}{'':>23}{1e3 * measured:>12.1f}{100 * measured / step:>12.1f}%")
    return lines


def judge(args: argparse.Namespace, run: dict[str, Any], path: Path) -> int:
    """Check against the baseline, or become it; returns the exit status."""
    if args.write_baseline:
        print(baseline.record(run, args.who, args.why))
        return 0
    if not args.check:
        return 0
    if "ratio_to_eager" not in run["rows"].get("vibechat", {}):
        raise UserError("--check needs a run of eager and vibechat at one micro-batch")
    recorded = f"--recorded {shlex.quote(str(path))}"
    known = baseline.find(run, f"python -m bench.mfu {recorded} --write-baseline --who NAME --why TEXT")
    fine, lines = baseline.check(run, known)
    print("\n" + "\n".join(lines))
    plain = run["rows"]["vibechat"].get("ratio_to_plain")
    if plain is not None and run["machine"]["device_type"] == "cpu":
        fine &= plain >= CPU_BAR
        print(f"ratio to plain: {plain:.3f} ({'holds' if plain >= CPU_BAR else 'FAILS'}: at least {CPU_BAR})")
    return 0 if fine else 1


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line, with this machine's defaults filled in."""
    gpu = autodetect_device_type() == "cuda"
    parser = argparse.ArgumentParser(prog="python -m bench.mfu", description="training steps and their share of peak")
    parser.add_argument("--depth", type=int, default=26 if gpu else 4)
    parser.add_argument("--max-seq-len", type=int, default=2048 if gpu else 512)
    parser.add_argument("--vocab-size", type=int, default=65_536 if gpu else 8192)
    parser.add_argument("--device-batch-size", default="auto", help="largest micro-batch to try, in rows, or auto")
    parser.add_argument("--common-batch-size", type=int, default=0, help="micro-batch of the comparison (all that fit)")
    parser.add_argument("--total-batch-size", type=int, default=524_288 if gpu else 4096, help="tokens of a step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--data", choices=("builtin", "synthetic"), default="synthetic")
    parser.add_argument("--kernels", default="auto", help="of vibechat: auto, triton or torch, with exceptions")
    parser.add_argument("--activation-checkpointing", action="store_true", help="as the flag of vibechat train")
    parser.add_argument("--cuda-graphs", action="store_true", help="as the flag of vibechat train")
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS[gpu:4]))
    parser.add_argument("--rounds", type=int, default=3 if gpu else 5, help="turns of each implementation")
    parser.add_argument("--steps", type=int, default=1 if gpu else 8, help="timed steps of a turn")
    parser.add_argument("--warmup", type=int, default=1 if gpu else 3, help="steps before the first that is timed")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing new after so many")
    parser.add_argument("--waterfall", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--kernels-by-name", type=int, default=0, metavar="N", help="list the N longest kernels under each waterfall"
    )
    gate = parser.add_mutually_exclusive_group()
    gate.add_argument("--check", action="store_true", help="exit 1 if the run is below its baseline")
    gate.add_argument("--write-baseline", action="store_true", help="make the run the baseline of this machine")
    parser.add_argument("--who", default="", help="who changes the baseline")
    parser.add_argument("--why", default="", help="why it changes")
    parser.add_argument("--recorded", type=Path, help="take this mfu.json instead of measuring")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--worker", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--micro-batch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.depth, args.max_seq_len, args.vocab_size) < 1:
        parser.error("--depth, --max-seq-len and --vocab-size must be at least 1")
    if args.device == "cuda" and not gpu:
        parser.error("--device cuda: PyTorch sees no GPU here")
    if args.cuda_graphs and args.device != "cuda":
        parser.error("--cuda-graphs needs a GPU")
    if (args.who or args.why) and not args.write_baseline:
        parser.error("--who and --why belong to --write-baseline")
    if args.device_batch_size != "auto" and not args.device_batch_size.isdecimal():
        parser.error("--device-batch-size must be auto or a number of rows")
    rows = int(args.device_batch_size) if args.device_batch_size != "auto" else 1
    if rows < 1 or args.total_batch_size % (rows * args.max_seq_len):
        parser.error("--total-batch-size must be a multiple of --max-seq-len x --device-batch-size")
    if args.common_batch_size < 0 or args.total_batch_size % (max(1, args.common_batch_size) * args.max_seq_len):
        parser.error("--total-batch-size must be a multiple of --max-seq-len x --common-batch-size")
    if min(args.rounds, args.steps, args.warmup) < 1:
        parser.error("--rounds, --steps and --warmup must be at least 1")
    if args.kernels_by_name < 0 or (args.kernels_by_name and not args.waterfall):
        parser.error("--kernels-by-name must be 0 or a number of kernels, and needs the waterfall")
    return args


def leave_out_fp8(args: argparse.Namespace) -> None:
    """Take it off --only, with a line, where the device has none."""
    device = torch.device(args.device)
    if "fp8" in args.only and (obstacle := fp8_obstacle(device, compute_dtype(device))):
        args.only = [name for name in args.only if name != "fp8"]
        print(f"fp8 is left out: {obstacle}")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    try:
        if args.worker:
            return serve(args.worker, args)
        if args.write_baseline and not (args.who.strip() and args.why.strip()):
            raise UserError("a baseline needs --who NAME and --why TEXT")
        if args.recorded:
            run, path = json.loads(args.recorded.read_text(encoding="utf-8")), args.recorded
        else:
            print(
                f"depth {args.depth}, rows of {args.max_seq_len} tokens, vocabulary {args.vocab_size:,}, "
                f"{args.total_batch_size:,} tokens a step, {args.data} data, on {args.device}"
            )
            leave_out_fp8(args)
            benchmark = Benchmark(args, argv)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a script in the background has it ignored
            try:
                benchmark.measure()
            except KeyboardInterrupt:
                print_run(benchmark.content())
                print("interrupted: this is what was measured until then", file=sys.stderr)
                return 130
            benchmark.write()
            run, path = benchmark.content(), benchmark.path
            if not benchmark.runs:
                why = "see above for what did not fit, or give it more --minutes"
                raise UserError("; ".join(benchmark.failed) or f"nothing was measured: {why}")
        print_run(run)
        if args.json:
            print(json.dumps(run))
        if not args.recorded and benchmark.failed:
            raise UserError("; ".join(benchmark.failed))
        return judge(args, run, path)
    except (UserError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
