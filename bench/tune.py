"""Measure on this GPU which configuration of each kernel is fastest, and whether the kernels beat plain PyTorch.

`python -m bench.tune` writes what `vibechat.kernels.tuning` reads: $VIBECHAT_BASE_DIR/kernels/<device>.json, or, with
`--ship`, vibechat/kernels/tuned/<device>.json (with `--out DIR` anywhere else). Configurations are timed at batch 16
of the depths 12, 20 and 26; an op's verdict is its forward and backward over these, against the reference eager and
compiled, each with the winning configurations. Until this has run, `auto` takes no kernel.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench.cases import OPS, Case, calls_of
from bench.measure import device_name, provenance, time_calls
from bench.shapes import LENGTH, MODELS, launches
from vibechat import kernels
from vibechat.common import UserError
from vibechat.kernels import tuning

BATCH = 16


def best_configs(device: torch.device, batch: int = BATCH) -> dict[str, dict[str, list[int]]]:
    """kernel -> width of a block -> the fastest [rows, warps], summed over the models of that width."""
    seconds: dict[tuple[str, int], dict[tuning.Config, float]] = {}
    for model in MODELS:
        sets = [list(launches(model, batch, str(device))) for _ in range(2)]  # two sets of operands, larger than L2
        for launch, other in zip(*sets, strict=True):
            of_kernel = seconds.setdefault((launch.kernel, launch.width), {})
            for config in launch.configs:
                calls = [functools.partial(one.run, config) for one in (launch, other)]
                of_kernel[config] = of_kernel.get(config, 0.0) + time_calls(calls, device, 0.05).median
    table: dict[str, dict[str, list[int]]] = {}
    for (kernel, width), times in seconds.items():
        best = min(times, key=times.__getitem__)
        table.setdefault(kernel, {})[str(width)] = list(best)
        said = ", ".join(f"{c.rows}x{c.warps} {1e6 * s:.1f} us" for c, s in sorted(times.items(), key=lambda kv: kv[1]))
        print(f"{kernel} {width}: {said}", flush=True)
    return table


def op_seconds(op: str, implementation: str, device: torch.device, dtype: torch.dtype, batch: int = BATCH) -> float:
    """Seconds of an op forward and backward, summed over the models."""
    cases = [Case(op, implementation, model, batch, LENGTH, "both") for model in MODELS]
    return sum(time_calls(calls_of(case, device, dtype), device, 0.1).median for case in cases)


def verdicts(device: torch.device, batch: int = BATCH) -> dict[str, dict[str, dict[str, float]]]:
    """op -> dtype -> seconds of the kernel, of eager and of the compiled reference."""
    kernels.set_backend("triton")
    table: dict[str, dict[str, dict[str, float]]] = {}
    for op in OPS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            row = {
                key: op_seconds(op, implementation, device, dtype, batch)
                for key, implementation in (("kernel", "ours"), ("eager", "eager"), ("compiled", "compiled"))
            }
            table.setdefault(op, {})[str(dtype).removeprefix("torch.")] = row
            print(f"{op} {dtype}: " + ", ".join(f"{key} {1e3 * s:.3f} ms" for key, s in row.items()), flush=True)
    return table


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
    content: dict[str, Any] = {**provenance(device), "configs": best_configs(device)}
    publish(path, content)  # the configurations are whole; the verdicts take longer
    publish(tuning.cached_file(slug), content)
    tuning.forget()
    content["ops"] = verdicts(device)
    publish(path, content)
    publish(tuning.cached_file(slug), content)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
