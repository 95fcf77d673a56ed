"""The real training program killed, stopped, damaged and continued: the same bits as if nothing had happened."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.lab import STEPS, Lab, copy_of, flip_last_byte, refusal, wait_for_steps

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.xdist_group("train"),
]


def run_until_done(lab: Lab, whole: Lab, interrupt: Any, most: int = 60) -> int:
    """Start, interrupt and continue until a run ends by itself; returns how many were killed."""
    for kills in range(most):
        pid = lab.start(resume="auto")
        interrupt(pid, kills)
        status, printed = lab.wait(pid)
        if status == 0:
            assert lab.outcome() == whole.outcome()
            return kills
        assert status == -signal.SIGKILL, printed
    pytest.fail("never came to an end")


def test_kills_at_random_instants_change_no_bit(lab: Lab, whole: Lab) -> None:
    """Whatever they hit (set-up, a step, an evaluation, a save), the outcome is the same."""
    moments = random.Random(1)

    def interrupt(pid: int, kills: int) -> None:
        if kills < 8:
            if kills != 4:  # that one dies while it is being set up
                wait_for_steps(lab, min(29, max(lab.steps(), default=0) + moments.randrange(1, 6)))
            time.sleep(moments.uniform(0.0, 0.03))
            os.kill(pid, signal.SIGKILL)

    assert run_until_done(lab, whole, interrupt) >= 3


def test_kills_in_the_middle_of_a_save_change_no_bit(lab: Lab, whole: Lab) -> None:
    caught = 0

    def interrupt(pid: int, kills: int) -> None:
        nonlocal caught
        names = ("model.safetensors", "optimizer_00000.safetensors", "meta.json", "manifest.json", ".", ".")
        ended = lab.ended()
        while kills < len(names) and lab.ended() == ended:
            if any((found / names[kills]).exists() for found in lab.checkpoints.glob(".tmp-*")):
                os.kill(pid, signal.SIGKILL)
                caught += bool(list(lab.checkpoints.glob(".tmp-*")))
                return

    run_until_done(lab, whole, interrupt)
    assert caught >= 1  # killed before the rename
    assert not list(lab.checkpoints.glob(".tmp-*"))


def test_a_start_that_was_killed_at_once_is_begun_anew(lab: Lab, whole: Lab) -> None:
    pid = lab.start(resume="auto", save_every=-1)
    wait_for_steps(lab, 2)
    os.kill(pid, signal.SIGKILL)
    assert lab.wait(pid)[0] == -signal.SIGKILL
    assert lab.train(resume="auto")[0] == 0
    assert lab.outcome() == whole.outcome()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_can_be_continued(lab: Lab, whole: Lab, number: int, status: int) -> None:
    pid = lab.start(save_every=-1)
    wait_for_steps(lab, 3)
    os.kill(pid, number)
    found, printed = lab.wait(pid)
    assert found == status, printed
    (step,) = lab.steps()
    assert f"stopped after {step} of {STEPS} steps" in printed
    assert lab.train(resume="auto")[0] == 0
    assert lab.outcome()[0] == whole.outcome()[0]
    assert lab.outcome()[2:] == whole.outcome()[2:]


@pytest.mark.slow
def test_a_compiled_run_that_is_killed_changes_no_bit(corpus: Path, tmp_path: Path) -> None:
    """Through scripts/train.py, as a person starts it: what it repeats after the kill is what it did before it."""
    lab = Lab(None, corpus, tmp_path / "lab")  # type: ignore[arg-type]
    flags = lab.argv(compile=True, num_iterations=12, eval_every=-1, save_every=5, keep=-1, resume="auto")
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "",  # Inductor starts ten processes that load torch, to see what the CPU can do
        "PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "VIBECHAT_BASE_DIR": str(lab.base),
    }
    losses: list[dict[int, float]] = []
    for kill in (True, False):
        with (
            open(lab.output, "a") as output,
            subprocess.Popen(
                [sys.executable, "-m", "scripts.train", *flags],
                cwd=Path(__file__).parent.parent,
                env=env,
                stdout=output,
                stderr=output,
            ) as run,
        ):
            if kill:
                wait_for_steps(lab, 9)
                run.kill()
        assert run.returncode == (-signal.SIGKILL if kill else 0), lab.output.read_text()
        losses.append({row["step"]: row["train/loss"] for row in lab.metrics()})
        shutil.rmtree(lab.checkpoints / "step_000010", ignore_errors=True)  # if it came so far: continue after step 5
    before, after = losses
    assert list(after) == list(range(12))
    assert len(before) >= 9
    assert before == {step: after[step] for step in before}
    printed = lab.output.read_text()
    assert "after step 5" in printed
    assert printed.count("compiling the model") == 2
    assert "torch.compile failed" not in printed


# ---------------------------------------------------------------------------------------------------------------------
# continued


def test_a_damaged_checkpoint_is_passed_over(lab: Lab, whole: Lab) -> None:
    copy_of(whole, lab)
    flip_last_byte(lab.checkpoints / "step_000030" / "optimizer_00000.safetensors")
    status, printed = lab.train(resume="30")
    assert status == 2
    assert "error: " in printed
    assert "step_000030 is corrupt: optimizer_00000.safetensors" in printed
    status, printed = lab.train(resume="auto")
    assert status == 0, printed
    assert "step_000030 is corrupt" in printed
    assert "after step 27" in printed
    assert "step 30 is set aside" in printed
    assert lab.outcome() == whole.outcome()
    for step in lab.steps():
        flip_last_byte(lab.checkpoints / f"step_{step:06d}" / "loader.json")
    assert re.search("no checkpoint in .* is whole", refusal(lab, resume="auto"))


def test_a_finished_run_that_is_continued_changes_nothing(lab: Lab, whole: Lab) -> None:
    copy_of(whole, lab)
    assert lab.train(resume="auto")[0] == 0
    assert lab.outcome() == whole.outcome()


def test_the_demo_is_continued_by_itself(lab: Lab) -> None:
    status, printed = lab.train(demo=True, num_iterations=4)
    assert status == 0, printed
    assert "step 4: saved" in printed
    assert "base_checkpoints/demo" in printed
    status, printed = lab.train(demo=True, num_iterations=4)
    assert status == 0, printed
    assert "continuing" in printed
    assert "after step 4" in printed


def test_a_step_in_the_past_can_be_continued(lab: Lab, whole: Lab) -> None:
    copy_of(whole, lab)
    status, printed = lab.train(resume="27")
    assert status == 0, printed
    assert lab.outcome() == whole.outcome()


def test_a_live_run_keeps_others_out(lab: Lab) -> None:
    pid = lab.start(num_iterations=100_000, save_every=-1, eval_every=-1)
    try:
        wait_for_steps(lab, 2)
        other = Lab(lab.forge, lab.corpus, lab.base)
        other.output = lab.base / "other.output"
        message = refusal(other, resume="auto")
        assert "locked by a live run" in message
        assert "--resume auto" in message
    finally:
        os.kill(pid, signal.SIGKILL)
        lab.forge.wait(pid)
