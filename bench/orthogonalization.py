"""Is newton_schulz as fast and as accurate as it should be? `python -m bench.orthogonalization`.

All matrices of d26 (104 of 1664 x 1664 and 52 of 1664 x 6656), normalized before, against the iteration that Muon is
usually given: bfloat16, in standard form, under torch.compile. Held to what an H200 is asked:

    time         of the whole model's orthogonalization: at most 30 ms
    ratio        compiled / ours: at least 1.35 on the square matrices and 1.9 on the 4:1 ones
    error        relative, against the polynomial in float64: at most half of the compiled bfloat16 form's, on normal
                 matrices and on such with singular values from 1 to 1e-3
    first call   of newton_schulz on both shapes in a process of its own, Triton's cache empty: at most 5 s

Beside the time stand two rooflines: what the device needs for the FLOPs that are done, at the rate of a large matmul
in the same run, and the 23.7 ms of triangles, one restart and 788 TFLOP/s.

Rows go to orthogonalization.json as they are measured. In Triton's interpreter it is a rehearsal on one tiny matrix of
each shape; on a CPU without it the plain form is what runs. Where there is no GPU the first call's kernels are compiled
for sm_90 and not run, and what counts is the processor's time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measure import ResultFile, measure_ceilings, results_directory, time_calls
from bench.ops.newton_schulz import matrices
from bench.shapes import Model, Source, can_run_kernels, scale_of
from vibechat import kernels
from vibechat.common import UserError, compute_dtype
from vibechat.kernels import normalization
from vibechat.kernels.cost import newton_schulz_flops
from vibechat.kernels.language import INTERPRETING, triton
from vibechat.kernels.newton_schulz import launch, orthogonalize, spans, standard_form
from vibechat.kernels.normalization import normalized

STEPS = 5
ROOFLINE_FLOPS = 788e12  # of cuBLAS on an H200 in bfloat16, 8192^3
SHAPES = {"square": False, "4:1": True}  # whether they are wide
TIME_BAR, ERROR_BAR, FIRST_CALL_BAR = 30.0, 0.5, 5.0  # ms, of the other's, s
RATIO_BARS = {"square": 1.35, "4:1": 1.9}


class Row(NamedTuple):
    """One number and what it is held to."""

    what: str
    value: float
    unit: str
    bar: float | None = None
    least: bool = False
    """whether the bar is the least that will do; else it is the most"""

    @property
    def met(self) -> bool | None:
        """None where there is no bar."""
        if self.bar is None:
            return None
        return self.value >= self.bar if self.least else self.value <= self.bar

    def line(self, judged: bool) -> str:
        """As printed; `judged` where the bar's device ran."""
        said = f"{self.what:<44}{self.value:>10.3f} {self.unit:<8}"
        if self.bar is not None:
            said += f"{'at least' if self.least else 'at most'} {self.bar:g}"
            said += f": {'met' if self.met else 'MISSED'}" if judged else ""
        return said.rstrip()


def seconds(model: Model, device: torch.device, compiled: Callable[..., Tensor]) -> dict[str, tuple[float, float]]:
    """shape -> seconds of (ours, the compiled bfloat16 form), and under "all" ours of both shapes in one call."""
    dtype = _our_dtype(device)
    found, inputs = {}, {}
    for name, wide in SHAPES.items():
        count, m, n = matrices(model, wide)
        g = Source(device, torch.float32).randn(1 if INTERPRETING else count, m, n)
        inputs[name], theirs = (normalized(g, d) for d in (dtype, torch.bfloat16))
        del g
        found[name] = (
            time_calls([lambda x=inputs[name]: orthogonalize(x, STEPS)], device, 0.5).median,  # type: ignore[misc]
            time_calls([lambda x=theirs: compiled(x, STEPS)], device, 0.5).median,  # type: ignore[misc]
        )
        del theirs
    whole = time_calls([lambda: [orthogonalize(x, STEPS) for x in inputs.values()]], device, 0.5).median
    return found | {"all": (whole, sum(theirs for _, theirs in found.values()))}


def errors(model: Model, device: torch.device, compiled: Callable[..., Tensor]) -> Iterator[tuple[str, float, float]]:
    """(input, error of ours, error of the compiled bfloat16 form), each rounding the same float32 matrix first."""
    for shape, wide in SHAPES.items():
        _, m, n = matrices(model, wide)
        normal = Source(device, torch.float32).randn(1, m, n)
        for kind, g in (("normal", normal), ("1 to 1e-3", ill_conditioned(normal))):
            truth = standard_form(normalized(g.double()), STEPS)
            ours = orthogonalize(normalized(g, _our_dtype(device)), STEPS)
            theirs = compiled(normalized(g, torch.bfloat16), STEPS)
            yield f"{shape}, {kind}", relative(ours, truth), relative(theirs, truth)


def ill_conditioned(normal: Tensor) -> Tensor:
    """Matrices (count, m, n), m <= n, with the singular values 1 to 1e-3, evenly spaced in their logarithm."""
    u = torch.linalg.qr(normal[..., : normal.size(-2)]).Q  # (count, m, m)
    v = torch.linalg.qr(normal.mT).Q  # (count, n, m)
    return u * torch.logspace(0, -3, normal.size(-2), device=normal.device) @ v.mT


def relative(value: Tensor, truth: Tensor) -> float:
    """Error in the Frobenius norm."""
    return ((value.double() - truth).norm() / truth.norm()).item()


def _our_dtype(device: torch.device) -> torch.dtype:
    return torch.float16 if can_run_kernels(device) else compute_dtype(device)  # as Muon has it


# ---------------------------------------------------------------------------------------------------------------------
# the first call


def first_call(model: Model, device: torch.device) -> float:
    """Seconds of the first call in this process, on all matrices of a model; where there is no GPU, processor seconds
    of compiling what it would launch."""
    if device.type == "cuda":
        kernels.set_backend("triton")
        stacks = [Source(device).randn(*matrices(model, wide)) for wide in SHAPES.values()]
        torch.cuda.synchronize()
        start = time.perf_counter()
        for g in stacks:
            kernels.newton_schulz(g, STEPS)
        torch.cuda.synchronize()
        return time.perf_counter() - start
    from bench.compile_only import compile_only  # which needs Triton's compiler, and not its interpreter

    before = os.times()
    with compile_only():
        for wide in SHAPES.values():
            g = Source("meta").randn(*matrices(model, wide))
            x = torch.empty_like(g, dtype=torch.float16)
            normalization.launch(g, x)
            launch(x, STEPS)
    return sum(os.times()[:4]) - sum(before[:4])  # with the processes that it started


def first_calls(device: torch.device) -> Iterator[tuple[str, float]]:
    """(the state of Triton's cache, seconds) of a first call in a new process, twice with the same cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = cache
        command = [sys.executable, "-m", "bench.orthogonalization", "--first-call", device.type]
        for state in ("empty", "full"):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"the first call failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            yield state, float(json.loads(done.stdout.splitlines()[-1]))


# ---------------------------------------------------------------------------------------------------------------------
# everything


def rows(model: Model, device: torch.device, matmul_flops_per_second: float) -> Iterator[Row]:
    """Each number as it is measured."""
    kernels.set_backend("triton" if can_run_kernels(device) else "torch")
    compiled = torch.compile(standard_form, dynamic=False, backend="aot_eager" if INTERPRETING else "inductor")
    times = seconds(model, device, compiled)
    restarts = len(spans(STEPS, _our_dtype(device))) - 1
    flops = sum(
        newton_schulz_flops(*matrices(model, w), restarts=restarts if w else -1, symmetric=can_run_kernels(device))
        for w in SHAPES.values()
    )
    one_restart = sum(newton_schulz_flops(*matrices(model, w), restarts=1 if w else -1) for w in SHAPES.values())
    yield Row(f"all matrices of d{model.depth}", 1e3 * times["all"][0], "ms", TIME_BAR)
    yield Row("  at the measured matmul rate", 1e3 * flops / matmul_flops_per_second, "ms")
    yield Row("  one restart, 788 TFLOP/s", 1e3 * one_restart / ROOFLINE_FLOPS, "ms")
    yield Row("  compiled bfloat16", 1e3 * times["all"][1], "ms")
    for name, bar in RATIO_BARS.items():
        ours, theirs = times[name]
        yield Row(f"{name}: ours", 1e3 * ours, "ms")
        yield Row(f"{name}: compiled bfloat16 / ours", theirs / ours, "x", bar, least=True)
    for what, ours, theirs in errors(model, device, compiled):
        yield Row(f"error, {what}: ours", ours, "")
        yield Row(f"error, {what}: ours / bfloat16's", ours / theirs, "x", ERROR_BAR)
    for state, taken in first_calls(device) if triton is not None else ():
        what = "first call" if device.type == "cuda" else "processor time of its kernels for sm_90"
        yield Row(f"{what}, cache {state}", taken, "s", FIRST_CALL_BAR)


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write every row."""
    parser = argparse.ArgumentParser(description="newton_schulz on all matrices of a model, held to its bars")
    parser.add_argument("--first-call", metavar="DEVICE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = torch.device(args.first_call or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = scale_of(device).models[0]
    if args.first_call:
        print(json.dumps(first_call(model, device)))
        return 0
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    file = ResultFile(results_directory(device) / "orthogonalization.json", device, measure_ceilings(device, dtype))
    ceiling = file.content["ceilings"]["matmul_flops_per_second"]
    judged = "H200" in file.content["device"]
    if not judged:
        print(f"{file.content['device']}: the bars are an H200's", flush=True)
    for row in rows(model, device, ceiling):
        file.add(row._asdict() | {"met": row.met if judged else None})
        print(row.line(judged), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
