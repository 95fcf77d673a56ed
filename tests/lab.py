"""The real training program in a base directory of its own: runs of a model of a few thousand parameters.

The fixtures are tests/conftest.py's, so that all files share one run that nobody interrupted.
"""

import json
import random
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forge import Forge

STEPS = 30
TINY = {
    "depth": 1,
    "max-seq-len": 32,
    "vocab-size": 300,
    "total-batch-size": 128,
    "device-batch-size": 3,  # 4 rows a step: a full micro-batch and a padded one
    "num-iterations": STEPS,
    "eval-every": 10,
    "eval-tokens": 500,
    "sample-every": -1,
    "save-every": 3,
    "keep": 2,
}


class Lab:
    """A base directory, and runs in it."""

    def __init__(self, forge: Forge, corpus: Path, base: Path) -> None:
        self.forge, self.corpus, self.base = forge, corpus, base
        base.mkdir(exist_ok=True)
        self.output = base.parent / f"{base.name}.output"
        self.printed = ""
        """by the run that nobody interrupted"""
        self._read = 0  # characters of the output

    @property
    def checkpoints(self) -> Path:
        return self.base / "base_checkpoints" / "d1"

    def argv(self, **flags: Any) -> list[str]:
        flags = TINY | {"data": self.corpus, "compile": False} | {k.replace("_", "-"): v for k, v in flags.items()}
        return [f"--{name}={value}" for name, value in flags.items()]

    def start(self, *argv: str, env: dict[str, str] | None = None, **flags: Any) -> int:
        env = {"VIBECHAT_BASE_DIR": str(self.base), **(env or {})}
        return self.forge.start("train", list(argv) or self.argv(**flags), self.output, **env)

    def train(self, *argv: str, **flags: Any) -> tuple[int, str]:
        """(exit status, what it printed)."""
        return self.wait(self.start(*argv, **flags))

    def wait(self, pid: int) -> tuple[int, str]:
        before = self._read
        status = self.forge.wait(pid)
        text = self.output.read_text()
        self._read = len(text)
        return status, text[before:]

    def ended(self) -> int:
        """How many runs have ended by themselves so far, by what they printed last."""
        text = self.output.read_text() if self.output.exists() else ""
        return len(re.findall("^report: |^error: |Error: ", text, re.MULTILINE))

    def steps(self) -> list[int]:
        return sorted(int(p.name[5:]) for p in self.checkpoints.glob("step_*"))

    def metrics(self) -> list[dict[str, Any]]:
        """Of the run of the newest checkpoint (one that is killed before its first is begun anew), or the only one."""
        pattern = "*"
        if steps := self.steps():
            pattern = json.loads((self.checkpoints / f"step_{steps[-1]:06d}" / "meta.json").read_text())["run"]
        (path,) = (self.base / "runs").glob(f"{pattern}/metrics.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]

    def outcome(self) -> tuple[list[tuple[int, float, float]], list[tuple[int, float]], bytes, bytes]:
        """Everything that must be the same bits however often a run was interrupted."""
        rows = self.metrics()
        last = self.checkpoints / f"step_{STEPS:06d}"
        return (
            [(r["step"], r["train/loss"], r["train/grad_norm"]) for r in rows if "train/loss" in r],
            [(r["step"], r["val/bpb"]) for r in rows if "val/bpb" in r],
            (last / "model.safetensors").read_bytes(),
            (last / "optimizer_00000.safetensors").read_bytes(),
        )


@pytest.fixture(scope="session")
def forge() -> Iterator[Forge]:
    forge = Forge()
    yield forge
    forge.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "numbers.jsonl"
    numbers = random.Random(0)
    with open(path, "w") as file:
        for document in range(300):
            words = " ".join(f"{n} and {n + 1} make {2 * n + 1}." for n in numbers.choices(range(50), k=8))
            file.write(json.dumps({"text": f"Document {document}: {words}"}) + "\n")
    return path


@pytest.fixture
def lab(forge: Forge, corpus: Path, tmp_path: Path) -> Lab:
    return Lab(forge, corpus, tmp_path / "lab")


@pytest.fixture(scope="session")
def whole(forge: Forge, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A run that nobody interrupted."""
    lab = Lab(forge, corpus, tmp_path_factory.mktemp("whole") / "lab")
    status, lab.printed = lab.train(sample_every=15)
    assert status == 0, lab.printed
    return lab


def copy_of(whole: Lab, lab: Lab) -> Lab:
    shutil.copytree(whole.base, lab.base, dirs_exist_ok=True)
    return lab


def wait_for_steps(lab: Lab, count: int) -> None:
    """Until a run has reported `count` steps, or has ended, well or badly."""
    ended = lab.ended()
    while max((path.read_text().count("\n") for path in lab.base.glob("runs/*/metrics.jsonl")), default=0) < count:
        if lab.ended() > ended:
            return
        time.sleep(0.005)


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def refusal(lab: Lab, *argv: str, **flags: Any) -> str:
    """The one line that a run which may not begin prints."""
    before = sorted((str(p), p.stat().st_mtime_ns) for p in lab.checkpoints.rglob("*") if p.name != ".lock")
    status, printed = lab.train(*argv, **flags)
    assert status == 2, printed
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert printed.rstrip().endswith(lines[0])
    assert before == sorted((str(p), p.stat().st_mtime_ns) for p in lab.checkpoints.rglob("*") if p.name != ".lock")
    return lines[0]
