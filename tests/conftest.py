"""What every test shares: a base directory of its own, and one torch thread a worker."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.lab import corpus, forge, lab, whole  # noqa: F401 - one uninterrupted run for all files

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("vibechat", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("vibechat")


@pytest.fixture(autouse=True)
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's own models."""
    path = tmp_path / "base"
    monkeypatch.setenv("VIBECHAT_BASE_DIR", str(path))
    return path


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A continuous-integration run in which nothing passed proves nothing, and is not green."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    asked_for_all = os.environ.get("CI") and not session.config.option.markexpr
    if asked_for_all and session.exitstatus == pytest.ExitCode.OK and reporter and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
