"""Timing of one op: seconds with their spread, peak extra memory, and the ceilings that a share is of.

On a GPU each iteration is timed by events on the device, on inputs that rotate past the L2 cache; on a CPU by the
clock. Inputs are random, never zeros, which multiply faster than anything that a model computes.
"""

import gc
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vibechat.common import cpu_name
from vibechat.kernels.language import triton
from vibechat.kernels.tuning import device_slug

CYCLES_PER_SECOND = 2e9  # of a GPU's clock, at most
L2_BYTES = 128 * 2**20  # more than the L2 of any GPU that we know, so that inputs of an iteration come from memory


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    low: float
    """the fifth part is faster"""
    high: float
    """the fifth part is slower"""


def summarize(seconds: Sequence[float]) -> Timing:
    """Median and the 20th and 80th percentile."""
    ordered = sorted(seconds)
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8)]
    return Timing(statistics.median(ordered), *at)


def time_calls(
    calls: Sequence[Callable[[], Any]],
    device: torch.device,
    budget_seconds: float = 0.25,
    prepare: Sequence[Callable[[], Any] | None] = (),
) -> Timing:
    """Time calls that do the same on different inputs, in turn, for about `budget_seconds` after a warm-up; what
    `prepare` has for a call is done before it each time and not timed.

    A GPU is first kept busy for as long as the host takes to queue all of them: a call that the device finishes before
    the next launch is there would be timed with the host's Python in it, of which a training step sees nothing.
    """
    pairs = [(before or _nothing, call) for before, call in itertools.zip_longest(prepare, calls)]
    for before, call in pairs:
        before()
        call()
    _synchronize(device)
    start = time.perf_counter()
    for before, call in pairs:
        before()
        call()
    queued = (time.perf_counter() - start) / len(calls)
    _synchronize(device)
    estimate = (time.perf_counter() - start) / len(calls)
    count = max(5, min(200, int(budget_seconds / max(estimate, 1e-7))))
    turn = itertools.islice(itertools.cycle(pairs), count)
    if device.type != "cuda":
        seconds = []
        for before, call in turn:
            before()
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return summarize(seconds)
    marks = []
    torch.cuda._sleep(int(count * queued * CYCLES_PER_SECOND))
    for before, call in turn:
        before()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return summarize([begin.elapsed_time(end) / 1e3 for begin, end in marks])


def _nothing() -> None:
    return None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Device memory that a call needs beyond what was there before, or None where nobody counts it."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


class Ceilings(NamedTuple):
    """What the device reaches on the simplest work, measured in the same run."""

    copy_bytes_per_second: float
    matmul_flops_per_second: float


def measure_ceilings(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Ceilings:
    """A copy of a large tensor (read and write counted) and a large square matmul."""
    large = device.type == "cuda"
    source = torch.randn((512 if large else 16) * 2**18, device=device)  # 512 MiB, or 16
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], device)
    size = 8192 if large else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    matmul = time_calls([lambda: a @ b], device, budget_seconds=0.5)
    return Ceilings(2 * source.nbytes / copy.median, 2 * size**3 / matmul.median)


def device_name(device: torch.device) -> str:
    """The device as its vendor names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def results_directory(device: torch.device) -> Path:
    """$OUT if it is set, else bench/results/<device>/."""
    folder = device_slug(device_name(device)) if device.type == "cuda" else "cpu"
    directory = Path(os.environ["OUT"]) if "OUT" in os.environ else Path(__file__).parent / "results" / folder
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def triton_version() -> str | None:
    """Of Triton, where it is installed."""
    return triton.__version__ if triton else None


def command_line() -> str:
    """What was typed to run this program, without the place where it lies."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
    return shlex.join(["python", *program.split(), *sys.argv[1:]])


def commit_of(directory: Path) -> str:
    """The commit that a tree is at, with "-dirty" if a tracked file differs from it that benchmarks do not write
    themselves; "unknown" where there is none."""

    def git(*arguments: str) -> str:
        return subprocess.check_output(["git", *arguments], cwd=directory, text=True, stderr=subprocess.DEVNULL).strip()

    written = [f":(top,exclude)bench/{folder}" for folder in ("results", "baselines")]
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *written)
        return git("describe", "--always") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance(device: torch.device) -> dict[str, Any]:
    """What a number needs beside it: commit, command, device, versions, time."""
    return {
        "device": device_name(device),
        "commit": os.environ.get("COMMIT") or commit_of(Path(__file__).parent),
        "command": command_line(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def publish(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all, by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


class ResultFile:
    """A JSON file that is whole after every row: rows survive a run that is cut off."""

    def __init__(self, path: Path, device: torch.device, ceilings: Ceilings) -> None:
        self.path = path
        self.content: dict[str, Any] = {**provenance(device), "ceilings": ceilings._asdict(), "rows": []}

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and publish."""
        self.content["rows"].append(row)
        self.write()

    def write(self) -> None:
        """Publish the file."""
        publish(self.path, self.content)
