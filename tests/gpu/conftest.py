"""What the tests on a GPU share: one that loses the device costs no other."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def the_device_is_there_afterwards() -> Iterator[None]:
    """After an illegal access every call of this process fails: pytest-xdist is left to start another."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        said = f"the device is lost to this process: {error}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(said, 1)
        print(said, file=sys.stderr, flush=True)
        os._exit(1)
