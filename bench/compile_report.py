"""What the compiler makes of every kernel, without a GPU: registers, spills, shared memory, occupancy, matrix
instructions, TMA and 128-bit loads and stores.

`python -m bench.compile_report` prints the table for sm_90 beside what each op must move and what eager PyTorch moves;
`--target sm_80` (or sm_100, sm_120, gfx942, all) compiles for others; `--write` makes the sm_90 table the budget in
vibechat/kernels/budgets.json, so that a change of a kernel shows as a diff of it. Tests hold every kernel to it.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from bench.compile_only import HOPPER_BLOCK_BYTES, TARGETS, Statistics, compile_only, statistics
from bench.cost_table import cost_lines
from bench.ops import OPS, Launch
from bench.shapes import MODELS, Shape, Source

BUDGETS = Path("vibechat/kernels/budgets.json")


class Compiled(NamedTuple):
    """A kernel that was compiled, under the name that it has in the budgets."""

    name: str
    kernel: Any


def all_launches() -> list[Launch]:
    """Every kernel at every model's shapes, each specialization once."""
    found: dict[tuple[str, str], Launch] = {}
    for op in OPS.values():
        for model in MODELS:
            for launch in op.launches(Shape(model, op.batches[0]), Source("meta")):
                found.setdefault((launch.kernel, launch.specialization or launch.key), launch)
    return list(found.values())


def compile_launch(launch: Launch, config: Any, target: str = "sm_90") -> Compiled:
    """The kernel of a launch, compiled for a target and not run."""
    with compile_only(TARGETS[target]) as kernels:
        launch.run(config)
    assert len({id(kernel) for kernel in kernels}) == 1, f"{launch.kernel} launches {len(kernels)} kernels"
    return Compiled(launch.name(config), kernels[0])


def faults(name: str, found: Statistics, needs: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with a kernel for sm_90 whatever its budget says; it must have some of what it `needs`."""
    wrong = []
    if found.stack or found.spills:
        wrong.append(f"{name}: {found.stack} bytes of stack and {found.spills} accesses to it: registers spill")
    if found.shared > HOPPER_BLOCK_BYTES:
        wrong.append(f"{name}: {found.shared} bytes of shared memory, {HOPPER_BLOCK_BYTES} can be had")
    if found.occupancy < 1:
        wrong.append(f"{name}: no block fits on an SM")
    return wrong + [f"{name}: no {field.replace('_', ' ')}" for field in needs if not getattr(found, field)]


def read_budgets() -> dict[str, Any]:
    """The budgets file: the Triton that made it, and per kernel its statistics."""
    return json.loads(BUDGETS.read_text(encoding="utf-8"))


def compile_all(target: str) -> Iterator[tuple[Launch, str, Any]]:
    """(launch, name, kernel) of every specialization; in the kernel's place the error that kept it from compiling."""
    for launch in all_launches():
        for config in launch.configs:
            try:
                yield launch, *compile_launch(launch, config, target)
            except Exception as error:  # the compiler's own, of any kind: a row of the report
                yield launch, launch.name(config), error


def _cannot(name: str, error: Exception) -> str:
    return f"{name}: cannot be compiled: {' '.join(str(error).split())[:200] or repr(error)}"


def _report_nvidia(target: str, wrong: list[str]) -> dict[str, Statistics]:
    print(f"\n{target}\n{'kernel':<60}" + "".join(f"{field:>12}" for field in Statistics._fields))
    table = {}
    for launch, name, kernel in compile_all(target):
        if isinstance(kernel, Exception):
            wrong.append(_cannot(name, kernel))
            print(wrong[-1], flush=True)
            continue
        found = table[name] = statistics(kernel)
        print(f"{name:<60}" + "".join(f"{value:>12}" for value in found), flush=True)
        wrong += faults(name, found, launch.needs)
    return table


def _report_amd(target: str) -> None:
    print(f"\n{target}\n{'kernel':<60}{'binary bytes':>14}{'shared':>12}")
    for _, name, kernel in compile_all(target):
        if isinstance(kernel, Exception):
            print(_cannot(name, kernel), flush=True)
        else:
            print(f"{name:<60}{len(kernel.asm['hsaco']):>14}{kernel.metadata.shared:>12}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Print the tables that were asked for; 1 if a kernel is at fault on sm_90."""
    parser = argparse.ArgumentParser(description="compile every kernel without a GPU and say what came out")
    parser.add_argument("--target", choices=(*TARGETS, "all"), default="sm_90")
    parser.add_argument("--write", action="store_true", help=f"write the sm_90 table to {BUDGETS}")
    args = parser.parse_args(argv)
    targets = list(TARGETS) if args.target == "all" else [args.target]
    print(f"triton {triton.__version__}, torch {torch.__version__}, {platform.machine()}; compiled, not run")
    wrong: list[str] = []
    for target in targets:
        start = time.perf_counter()
        if target.startswith("gfx"):
            _report_amd(target)
        else:
            table = _report_nvidia(target, wrong if target == "sm_90" else [])
            if target == "sm_90" and args.write:
                write_budgets(table)
        print(f"{target}: {time.perf_counter() - start:.1f} s")
    print("\n" + "\n".join(cost_lines()))
    for fault in wrong:
        print(f"error: {fault}")
    return bool(wrong)


def write_budgets(table: dict[str, Statistics]) -> None:
    """Make these statistics the budget."""
    rows = {name: found._asdict() for name, found in sorted(table.items())}
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    text = f'{{\n  "triton": "{triton.__version__}",\n  "target": "sm_90",\n  "kernels": {{\n{lines}\n  }}\n}}\n'
    BUDGETS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
