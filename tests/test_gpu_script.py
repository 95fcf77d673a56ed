"""bench/gpu.sh, rehearsed: the commands that a GPU will be given, at tiny shapes in Triton's interpreter."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.waterfall import OTHER, WAIT
from vibechat.kernels.language import triton

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench/gpu.sh"
pytestmark = [
    pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured"),
]


def gpu_sh(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    own = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }  # xdist's would be heard
    variables = {**own, "PATH": path, "OUT": str(out), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", SCRIPT, *arguments], env=variables, capture_output=True, text=True, timeout=500)


def test_it_names_its_parts(tmp_path: Path) -> None:
    for arguments in ((), ("everything",)):
        done = gpu_sh(tmp_path / "out", *arguments)
        assert done.returncode == 2
        assert done.stderr == "usage: bench/gpu.sh check|kernels [OP...]|mfu\n"
    assert not (tmp_path / "out").exists()


def test_a_part_without_time_says_so_and_fails(tmp_path: Path) -> None:
    done = gpu_sh(tmp_path, "check", MINUTES="0.01")
    assert done.returncode == 1
    assert "ceilings: no time left" in done.stdout
    assert not list(tmp_path.iterdir())


def python_that(tmp_path: Path, words: str) -> str:
    """A PATH where python3 is a shell script of these cases."""
    python = tmp_path / "bin/python3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/bash\ncase "$*" in {words} esac\n')
    python.chmod(0o755)
    return os.pathsep.join((str(python.parent), os.environ["PATH"]))


@pytest.mark.parametrize("xdist", [True, False])
def test_a_gpu_answers_several_tests_at_a_time_where_pytest_can(xdist: bool, tmp_path: Path) -> None:
    words = f"'-c import xdist') exit {0 if xdist else 1} ;; -c*) echo 1 ;; *) echo asked ;;"
    done = gpu_sh(tmp_path / "out", "check", PATH=python_that(tmp_path, words))
    assert done.returncode == 0, done.stderr
    command = next(line for line in done.stdout.splitlines() if line.startswith("== gpu-tests"))
    assert command.endswith(f"pytest -p no:cacheprovider -q {'-n 3 --dist worksteal ' * xdist}-m gpu tests/gpu")


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_kernels_ends_well_and_leaves_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = gpu_sh(out, "kernels", "qk_norm_rope")
    assert done.returncode == 0, done.stdout + done.stderr
    (tuned,) = out.glob("tuned-*.json")
    names = {"tune.log", tuned.name, "kernels.log", "kernels.json", "kernels.md", "kernels.png"}
    assert {path.name for path in out.iterdir()} == names
    assert len(names) <= 8
    table = json.loads(tuned.read_text())
    assert set(table["configs"]) == {"qk_norm_rope_forward", "qk_norm_rope_backward"}
    (row,) = table["ops"]["qk_norm_rope"]["float32"].values()
    assert row.keys() == {"kernel", "eager", "compiled"}
    rows = json.loads((out / "kernels.json").read_text())["rows"]
    found = {(row["op"], row["implementation"], row["direction"]) for row in rows}
    passes = ("both", "forward", "backward")
    assert found == {("qk_norm_rope", how, way) for how in ("ours", "eager", "compiled") for way in passes}
    assert "| both | qk_norm_rope | 2 | d2 | ours |" in (out / "kernels.md").read_text()


@pytest.mark.slow
def test_mfu_ends_well_and_leaves_what_it_measured(tmp_path: Path) -> None:
    """fp8, which no CPU has, is left out and costs the part nothing."""
    out = tmp_path / "out"
    done = gpu_sh(out, "mfu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in out.iterdir()} == {"mfu.log", "mfu.json", "attention.log", "attention.json"}
    measured = json.loads((out / "mfu.json").read_text())
    assert list(measured["rows"]) == ["vibechat", "compiled", "eager"]
    assert all(row["ms"] > 0 for row in measured["rows"].values())
    for one in measured["runs"]:
        missing = [name for name, seconds in one["waterfall"].items() if seconds <= 0 and name not in (OTHER, WAIT)]
        assert not missing, one["implementation"]
    assert "fp8 is left out" in (out / "mfu.log").read_text()
    ways = {row["way"] for row in json.loads((out / "attention.json").read_text())["rows"]}
    assert {"auto", "sdpa", "cudnn", "flex-window"} <= ways


@pytest.mark.slow
def test_a_step_whose_time_is_over_is_interrupted_and_leaves_what_it_said(tmp_path: Path) -> None:
    """With a python that never ends by itself."""
    endless = "trap 'echo all that I had; exit 130' INT; while :; do sleep 0.1; done"
    path = python_that(tmp_path, f"-c*) echo 0 ;; *bench.mfu*) {endless} ;; *) echo ran ;;")
    done = gpu_sh(tmp_path / "out", "mfu", MINUTES="0.4", PATH=path)
    assert done.returncode == 1
    said = done.stdout.splitlines()
    assert said[2] == "all that I had"
    assert re.fullmatch(r"mfu: its \d+ s were over", said[3])
    assert said[4] == "mfu: exit status 124"
    assert said[-1] == "attention: no time left"
    assert (tmp_path / "out/mfu.log").read_text() == "all that I had\n"
