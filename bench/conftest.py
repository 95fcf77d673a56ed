"""What the benchmarks share: the device, its ceilings measured in this run, and the file that rows go to."""

from collections.abc import Iterator

import pytest
import torch

from bench.measure import Ceilings, ResultFile, measure_ceilings, results_directory
from bench.shapes import can_run_kernels
from vibechat import kernels


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def ceilings(device: torch.device) -> Ceilings:
    return measure_ceilings(device)


@pytest.fixture(scope="session")
def results(device: torch.device, ceilings: Ceilings) -> ResultFile:
    return ResultFile(results_directory(device) / "kernels.json", device, ceilings)


@pytest.fixture(autouse=True)
def kernels_where_they_exist(device: torch.device) -> Iterator[None]:
    kernels.set_backend("triton" if can_run_kernels(device) else "torch")
    yield
    kernels.set_backend("auto")
