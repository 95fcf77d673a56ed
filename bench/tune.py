"""Measure on this GPU which configuration of each kernel is fastest, which of several ways to compute an op is, and
whether the kernels beat plain PyTorch.

`python -m bench.tune` writes what `vibechat.kernels.tuning` reads: $VIBECHAT_BASE_DIR/kernels/<device>.json, or, with
`--ship`, vibechat/kernels/tuned/<device>.json too (with `--out DIR` anywhere else). Everything is timed at batch 16 of
the depths 12, 20 and 26: first the configurations, then with the fastest of them the ways, then with the best of those
each op forward and backward against the reference eager and compiled. Until this has run, `auto` takes no kernel.
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case, calls_of
from bench.measure import device_name, provenance, time_calls
from bench.ops import OPS, Launch, Op
from bench.shapes import MODELS, Model, Shape, Source
from vibechat import kernels
from vibechat.common import UserError
from vibechat.kernels import tuning

BATCH = 16
Table = dict[str, Any]


def _shape(op: Op, model: Model) -> Shape:
    return Shape(model, BATCH if BATCH in op.batches else op.batches[0])


def time_launches(launches: Sequence[Launch], config: Any, device: torch.device) -> float:
    """Median seconds of a kernel with a configuration, on these sets of operands in turn. What a run overwrites is
    put back before each, untimed, so that a kernel that works in place always meets the numbers it is for."""
    calls = [functools.partial(launch.run, config) for launch in launches]
    return time_calls(calls, device, 0.05, [launch.restore for launch in launches]).median


def best_configs(device: torch.device) -> Table:
    """kernel -> key -> the fastest configuration, by the seconds summed over the models' shapes of that key."""
    seconds: dict[tuple[str, str], dict[Any, float]] = {}
    for op in OPS.values():
        for model in MODELS:
            sets = [op.launches(_shape(op, model), Source(device, seed=seed)) for seed in range(2)]
            for launches in zip(*sets, strict=True):  # two sets of operands, larger than L2 together
                times = seconds.setdefault((launches[0].kernel, launches[0].key), {})
                for config in launches[0].configs:
                    times[config] = times.get(config, 0.0) + time_launches(launches, config, device)
    table: Table = {}
    for (kernel, key), times in seconds.items():
        best = min(times, key=times.__getitem__)
        table.setdefault(kernel, {})[key] = tuning.as_row(best)
        ordered = sorted(times.items(), key=lambda item: item[1])
        said = ", ".join(f"{'/'.join(map(str, config))} {1e6 * s:.1f} us" for config, s in ordered)
        print(f"{kernel} {key}: {said}", flush=True)
    return table


def seconds_of(op: Op, implementation: str, model: Model, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of an op at a model's shapes, forward and backward; infinity where its memory does not suffice."""
    shape = _shape(op, model)
    case = Case(op.name, implementation, model, shape.batch, shape.length, op.passes[0])
    try:
        return time_calls(calls_of(case, device, dtype), device, 0.1).median
    except torch.OutOfMemoryError:
        return float("inf")


def best_ways(device: torch.device, dtype: torch.dtype) -> Table:
    """op -> dtype -> key -> seconds of each way to compute it, of ops that have several."""
    table: Table = {}
    for op in OPS.values():
        for model in MODELS if op.ways else ():
            row = {way: seconds_of(op, f"ours:{way}", model, device, dtype) for way in op.ways}
            key = op.ways_key(_shape(op, model))
            table.setdefault(op.backend_name, {}).setdefault(_name(dtype), {})[key] = row
            print(f"{op.name} {key} {dtype}: " + _milliseconds(row), flush=True)
    return table


def measure_ops(device: torch.device, dtype: torch.dtype) -> Table:
    """op -> dtype -> model -> seconds of the kernel, of eager and of the compiled reference."""
    table: Table = {}
    for op in OPS.values():
        for model in MODELS:
            row = {
                key: seconds_of(op, implementation, model, device, dtype)
                for key, implementation in (("kernel", "ours"), ("eager", "eager"), ("compiled", "compiled"))
            }
            suffix = op.name.removeprefix(op.backend_name)
            table.setdefault(op.backend_name, {}).setdefault(_name(dtype), {})[f"d{model.depth}{suffix}"] = row
            print(f"{op.name} d{model.depth} {dtype}: " + _milliseconds(row), flush=True)
    return table


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _milliseconds(row: dict[str, float]) -> str:
    return ", ".join(f"{key} {1e3 * s:.3f} ms" for key, s in row.items())


def merge(into: Table, new: Table) -> None:
    """Add the rows of a nested table to another."""
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def publish(path: Path, content: dict[str, Any]) -> None:
    """Write a table whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    print(f"wrote {path}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description="measure the kernels' configurations on this GPU")
    parser.add_argument("--ship", action="store_true", help=f"write into {tuning.SHIPPED}")
    parser.add_argument("--out", type=Path, help="write into this directory")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("bench.tune needs a GPU that Triton runs on: torch finds none here")
    device = torch.device("cuda", torch.cuda.current_device())
    slug = tuning.device_slug(device_name(device))
    path = tuning.SHIPPED / f"{slug}.json" if args.ship else tuning.cached_file(slug)
    path = args.out / f"tuned-{slug}.json" if args.out else path
    kernels.set_backend("triton")
    content: Table = {**provenance(device), "configs": {}, "choices": {}, "ops": {}}

    def measured(part: str, table: Table) -> None:
        merge(content[part], table)  # whole after every part: a run that is cut off leaves what it had
        for file in {path, tuning.cached_file(slug)}:
            publish(file, content)
        tuning.forget()  # what comes next runs with what was just found

    measured("configs", best_configs(device))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):  # what training takes first
        measured("choices", best_ways(device, dtype))
        measured("ops", measure_ops(device, dtype))
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
