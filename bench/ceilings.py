"""`python -m bench.ceilings`: what this device reaches on a copy, on a large matmul, and on the model's own matmuls.

The matmuls are those of d12, d20 and d26 for one micro-batch, forward and both gradients: what cuBLAS (or the CPU's
library) gives is what a fused matmul of ours has to match before its epilogue is worth anything: 83% of it where the
epilogue saves two passes over the result. On a GPU ours stands beside it, with the fastest of its configurations.
"""

import argparse
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measure import ResultFile, measure_ceilings, results_directory, time_calls
from bench.shapes import LENGTH, MODELS, VOCABULARY
from vibechat.kernels.language import triton
from vibechat.kernels.matmul import CONFIGS, MatmulConfig, launch


class Matmul(NamedTuple):
    """(rows, inner) @ (inner, columns)."""

    name: str
    rows: int
    columns: int
    inner: int


def model_matmuls(batch: int, *, small: bool = False) -> Iterator[Matmul]:
    """The matmuls of a training step, the largest model first; each also as its two gradients."""
    for model in reversed(MODELS):
        rows, C = (256 if small else batch * LENGTH), (128 if small else model.channels)
        vocabulary = 512 if small else VOCABULARY
        layers = {"qkv": (3 * C, C), "out": (C, C), "up": (4 * C, C), "down": (C, 4 * C), "head": (vocabulary, C)}
        for layer, (columns, inner) in layers.items():
            name = f"d{model.depth} {layer}"
            yield Matmul(name, rows, columns, inner)
            yield Matmul(f"{name} dx", rows, inner, columns)
            yield Matmul(f"{name} dw", columns, inner, rows)


def ours(a: Tensor, b: Tensor) -> tuple[float, MatmulConfig]:
    """Seconds of our matmul a b^T with its fastest configuration."""
    times = {c: time_calls([functools.partial(launch, a, b, config=c)], a.device, 0.05).median for c in CONFIGS}
    best = min(times, key=times.__getitem__)
    return times[best], best


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write ceilings.json."""
    parser = argparse.ArgumentParser(description="copy, matmul, and the model's matmuls")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceilings = measure_ceilings(device)
    print(f"copy {ceilings.copy_bytes_per_second / 1e12:.3f} TB/s", flush=True)
    print(f"large matmul {ceilings.matmul_flops_per_second / 1e12:.2f} TFLOP/s", flush=True)
    results = ResultFile(results_directory(device) / "ceilings.json", device, ceilings)
    results.write()
    for matmul in model_matmuls(args.batch, small=device.type == "cpu"):
        flops = 2 * matmul.rows * matmul.columns * matmul.inner
        a = torch.randn(matmul.rows, matmul.inner, device=device).bfloat16()
        b = torch.randn(matmul.columns, matmul.inner, device=device).bfloat16()
        # a gradient of a weight multiplies what lies transposed, as the backward of a Linear does
        calls: list[Any] = [lambda a=a, b=b: a @ b.mT]
        if matmul.name.endswith("dw"):
            a, b = a.mT.contiguous().mT, b.mT.contiguous().mT
            calls = [lambda a=a, b=b: a @ b.mT]
        timing = time_calls(calls, device, 0.1)
        share = flops / timing.median / ceilings.matmul_flops_per_second
        row = {**matmul._asdict(), **timing._asdict(), "flops": flops, "matmul_share": share}
        said = f"{matmul.name:<14} {flops / timing.median / 1e12:8.2f} TFLOP/s  {100 * share:4.0f}%"
        if device.type == "cuda" and triton is not None and not matmul.name.endswith("dw"):
            seconds, config = ours(a, b)
            row |= {"ours": seconds, "ours_config": config._asdict(), "ours_share_of_library": timing.median / seconds}
            said += (
                f"   ours {flops / seconds / 1e12:8.2f} TFLOP/s, {100 * timing.median / seconds:.0f}% of the library"
            )
        results.add(row)
        print(said, flush=True)
        del a, b, calls
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
