"""Measure on this GPU which configuration of each kernel is fastest, which of several ways to compute an op is, and
whether the kernels beat plain PyTorch.

`python -m bench.tune` writes what `vibechat.kernels.tuning` reads: $VIBECHAT_BASE_DIR/kernels/<device>.json, and with
`--ship` vibechat/kernels/tuned/<device>.json too (or with `--out DIR` a copy there). It times the shapes of the depths
26, 20 and 12, op by op: first the configurations of its kernels, then with the fastest of them the ways to compute it,
then with the best of those the op forward and backward against the reference eager and compiled. Until this has run,
`auto` takes no kernel. With TRITON_INTERPRET=1 it rehearses on a CPU, at tiny shapes: what that measures means nothing.
"""

import argparse
import functools
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case, calls_of
from bench.measure import device_name, provenance, publish, time_calls
from bench.ops import OPS, Launch, Op
from bench.shapes import Shape, Source, can_run_kernels, scale_of, usual_dtype
from vibechat import kernels
from vibechat.common import UserError
from vibechat.kernels import tuning
from vibechat.micro_batch import is_out_of_memory

Table = dict[str, Any]


def shapes_of(op: Op, device: torch.device) -> Iterator[Shape]:
    """Those that a device is measured at."""
    scale = scale_of(device)
    for model in scale.models:
        yield Shape(model, scale.batch or op.batches[0], scale.length)


def time_launches(launches: Sequence[Launch], config: Any, device: torch.device) -> float:
    """Median seconds of a kernel with a configuration, on these sets of operands in turn. What a run overwrites is
    put back before each, untimed, so that a kernel that works in place always meets the numbers it is for."""
    calls = [functools.partial(launch.run, config) for launch in launches]
    return time_calls(calls, device, 0.05, [launch.restore for launch in launches]).median


def best_configs(op: Op, device: torch.device, dtype: torch.dtype) -> Table:
    """kernel -> key -> the fastest configuration, by the seconds summed over the models' shapes of that key."""
    seconds: dict[tuple[str, str], dict[Any, float]] = {}
    for shape in shapes_of(op, device):
        sets = [op.launches(shape, Source(device, dtype, seed)) for seed in range(2)]  # together larger than L2
        for launches in zip(*sets, strict=True):
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


def seconds_of(op: Op, implementation: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of an op at a shape, forward and backward; infinity where its memory does not suffice."""
    case = Case(op.name, implementation, *shape, op.passes[0])
    try:
        return time_calls(calls_of(case, device, dtype), device, 0.1).median
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return float("inf")


def best_ways(op: Op, device: torch.device, dtype: torch.dtype) -> Table:
    """op -> dtype -> key -> seconds of each way to compute it, if it has several."""
    table: Table = {}
    for shape in shapes_of(op, device) if op.ways else ():
        row = {way: seconds_of(op, f"ours:{way}", shape, device, dtype) for way in op.ways}
        table[op.ways_key(shape)] = row
        print(f"{op.name} {op.ways_key(shape)} {dtype}: " + _milliseconds(row), flush=True)
    return {op.backend_name: {_name(dtype): table}} if table else {}


def against_plain(op: Op, device: torch.device, dtype: torch.dtype) -> Table:
    """op -> dtype -> model -> seconds of the kernel, of eager and of the compiled reference."""
    table: Table = {}
    for shape in shapes_of(op, device):
        row = {
            key: seconds_of(op, implementation, shape, device, dtype)
            for key, implementation in (("kernel", "ours"), ("eager", "eager"), ("compiled", "compiled"))
        }
        model = f"d{shape.model.depth}{op.name.removeprefix(op.backend_name)}"
        table[model] = row
        print(f"{op.backend_name} {model} {dtype}: " + _milliseconds(row), flush=True)
    return {op.backend_name: {_name(dtype): table}}


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


def main(argv: list[str] | None = None) -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description="measure the kernels on this GPU")
    parser.add_argument("--ship", action="store_true", help=f"write into {tuning.SHIPPED}")
    parser.add_argument("--out", type=Path, help="write into this directory")
    names = dict.fromkeys([*OPS, *(op.backend_name for op in OPS.values())])  # a backend's: all of its entries
    parser.add_argument("--ops", nargs="+", choices=names, help="these alone; what is known of others stays")
    args = parser.parse_args(argv)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if not can_run_kernels(device):
        raise UserError("bench.tune needs a GPU that Triton runs on: torch finds none here")
    slug = tuning.device_slug(device_name(device))
    path = tuning.SHIPPED / f"{slug}.json" if args.ship else tuning.cached_file(slug)
    path = args.out / f"tuned-{slug}.json" if args.out else path
    kernels.set_backend("triton")
    known = tuning.read_table(slug)
    content: Table = {**provenance(device), **{part: known.get(part, {}) for part in ("configs", "choices", "ops")}}

    failed: list[str] = []

    def measured(part: str, measure: Callable[..., Table], op: Op, dtype: torch.dtype) -> None:
        try:
            merge(content[part], measure(op, device, dtype))
        except Exception:  # costs the others nothing
            traceback.print_exc()
            failed.append(f"{part} of {op.name} in {dtype}")
            return
        for file in dict.fromkeys((path, tuning.cached_file(slug))):
            publish(file, content)  # whole after every part: a run that is cut off leaves what it had
        tuning.forget()  # what comes next runs with what was just found

    usual = usual_dtype(device)
    others = [dtype for dtype in (torch.bfloat16, torch.float16, torch.float32) if dtype != usual]
    for dtype in [usual, *(others if device.type == "cuda" else ())]:  # what training takes first
        for op in [op for op in OPS.values() if not args.ops or {op.name, op.backend_name} & set(args.ops)]:
            if dtype == usual:
                measured("configs", best_configs, op, dtype)
            measured("choices", best_ways, op, dtype)
            measured("ops", against_plain, op, dtype)
    print(f"wrote {path}", flush=True)
    if failed:
        print(f"error: not measured, see above: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
