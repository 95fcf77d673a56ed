"""What the tests on a GPU share: one that fails, or loses the device, costs no other."""

import gc
import os
import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def nothing_is_left_of_it() -> Iterator[None]:
    """Python keeps a failed test's exception, and with it its tensors. And after an illegal access every call of this
    process fails: pytest-xdist is left to start another."""
    yield
    if vars(sys).pop("last_value", None) is not None:
        for name in ("last_exc", "last_type", "last_traceback"):
            vars(sys).pop(name, None)
        gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        said = f"the device is lost to this process: {error}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(said, 1)
        print(said, file=sys.stderr, flush=True)
        os._exit(1)
