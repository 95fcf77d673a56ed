"""Kernels in Triton's interpreter: a second pytest run, TRITON_INTERPRET=1, since that is decided on decoration."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from vibechat import kernels
from vibechat.kernels import backend
from vibechat.kernels.language import INTERPRETING

if INTERPRETING:
    import tests.interpreted.corrections  # noqa: F401

    settings.register_profile("interpreted", deadline=None, derandomize=bool(os.environ.get("CI")))
    settings.load_profile("interpreted")


if "TRITON_INTERPRET" not in os.environ:
    collect_ignore_glob = ["test_*.py"]  # `make test` comes back with it; tests/test_compiled_kernels.py sees to that


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETING:
        for item in items:  # the whole session's, whatever directory this file is in
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason="Triton is not installed"))


@pytest.fixture(autouse=True)
def kernels_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Public ops run their kernels, and every fallback has its line again."""
    monkeypatch.setattr(backend, "_requested", {})
    monkeypatch.setattr(backend, "_decided", {})
    monkeypatch.setattr(backend, "_said", set())
    kernels.set_backend("triton")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch.empty hands out is full of NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)  # with fill_uninitialized_memory, which is on by default
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
