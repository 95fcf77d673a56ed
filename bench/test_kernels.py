"""`pytest bench --benchmark-only`: every op, implementation, shape and pass, as a share of what the device can do.

pytest-benchmark times calls with the launch and a synchronization in them, which is what a person waits for; the
device's own seconds, bytes, FLOPs, shares of the measured ceilings and peak extra memory stand in each row's
extra_info, and in bench/results/<device>/kernels.json (or $OUT).
"""

from typing import Any

import pytest
import torch

from bench.cases import Case, all_cases, calls_of, cost_of
from bench.measure import Ceilings, ResultFile, peak_extra_bytes, time_calls
from bench.shapes import usual_dtype

CASES = list(all_cases(torch.device("cuda" if torch.cuda.is_available() else "cpu")))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_kernel(case: Case, benchmark: Any, device: torch.device, ceilings: Ceilings, results: ResultFile) -> None:
    dtype = usual_dtype(device)
    try:
        calls = calls_of(case, device, dtype)
        timing = time_calls(calls, device)
    except torch.OutOfMemoryError:
        results.add({**case._asdict(), "model": f"d{case.model.depth}", "error": "out of memory"})
        pytest.skip("out of memory, which is this row's result")
    cost = cost_of(case, dtype.itemsize)
    row = {
        **case._asdict(),
        "model": f"d{case.model.depth}",
        "dtype": str(dtype).removeprefix("torch."),
        **timing._asdict(),
        "bytes": cost.bytes,
        "flops": cost.flops,
        "bandwidth_share": cost.bytes / timing.median / ceilings.copy_bytes_per_second,
        "matmul_share": cost.flops / timing.median / ceilings.matmul_flops_per_second,
        "peak_extra_bytes": peak_extra_bytes(calls[0], device),
    }
    results.add(row)
    benchmark.extra_info.update(row)

    def waited_for() -> None:
        calls[0]()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(waited_for, rounds=5, warmup_rounds=1)
    assert timing.median > 0
