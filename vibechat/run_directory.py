"""What a run leaves behind, `<base>/runs/<id>/{config.json, env.json, metrics.jsonl}`, and what it shows meanwhile.

metrics.jsonl holds one JSON object a step, in the order of the steps, written as soon as the step is known. A run that
continues from a checkpoint drops the lines past it, and a line that a kill cut short, so that each step stands once.
"""

import contextlib
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

import vibechat
from vibechat.common import DummyWandb, UserError, compute_dtype, cpu_name, get_base_dir, get_dist_info, print0

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

METRICS = "metrics.jsonl"
BAR_WIDTH, WIDE = 24, 120  # columns; narrower terminals have no room for the bar


class RunDirectory:
    """An open `runs/<id>`. Make it with `create` or `reopen`; close it, or use it in a `with` statement."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_id = path.name
        self._metrics: TextIO = open(path / METRICS, "a", encoding="utf-8")  # noqa: SIM115 it lives as long as the run

    @classmethod
    def create(cls, name: str) -> "RunDirectory":
        """A new directory `runs/<name>`, or `<name>-2` and so on if there is one; raises UserError for a bad name."""
        check_run_name(name)
        runs = Path(get_base_dir()) / "runs"
        runs.mkdir(exist_ok=True)
        count = 1
        while True:
            path = runs / (name if count == 1 else f"{name}-{count}")
            try:
                path.mkdir()
            except FileExistsError:
                count += 1
            else:
                return cls(path)

    @classmethod
    def reopen(cls, run_id: str, step: int) -> "RunDirectory":
        """Continue `runs/<run_id>` after `step` updates: what it says of later steps is dropped."""
        path = Path(get_base_dir()) / "runs" / run_id
        path.mkdir(parents=True, exist_ok=True)  # somebody may have tidied it away
        kept = []
        with contextlib.suppress(FileNotFoundError), open(path / METRICS, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    if line.endswith("\n") and json.loads(line)["step"] < step:
                        kept.append(line)
        temporary = path / f".{METRICS}.tmp"
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path / METRICS)
        return cls(path)

    def write(self, name: str, document: dict[str, Any]) -> None:
        """Write `document` as JSON into the file `name`."""
        (self.path / name).write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl; it outlives this process from now on."""
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()

    def sync(self) -> None:
        """Flush the metrics to the disk (a checkpoint is about to promise that they are there)."""
        os.fsync(self._metrics.fileno())

    def close(self) -> None:
        """Close the metrics."""
        self._metrics.close()

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_run_name(name: str) -> None:
    """Raises UserError for a name that is none for a directory."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"--run {name!r}: use letters, digits, '.', '_' and '-', and start with a letter or digit")


def new_run_name(model_tag: str) -> str:
    """A name for a run that was given none: the tag and the time."""
    return f"{model_tag}_{datetime.datetime.now():%Y%m%d-%H%M%S}"


def environment(device: torch.device, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What a number measured here depends on: versions, commit, device, command."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "command": list(sys.argv if argv is None else argv),
        "begun": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        **versions(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "platform": platform.platform(),
        "device": f"{device.type}: {name}",
        "compute_dtype": str(compute_dtype(device)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "cuda": torch.version.cuda,
        "pid": os.getpid(),
    }


def versions() -> dict[str, str]:
    """Of what the bits of a training run depend on."""
    return {"vibechat": vibechat.__version__, "python": platform.python_version(), "torch": torch.__version__}


def _git(*arguments: str) -> str | None:
    """What git says of the source tree, or None where it is not a checkout of ours."""
    root = Path(vibechat.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), *arguments]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None


# ---------------------------------------------------------------------------------------------------------------------
# what it shows


class Display:
    """A progress bar with live numbers on a terminal; elsewhere a plain line for each step."""

    REFRESH_SECONDS = 0.1

    def __init__(self, num_iterations: int, start: int = 0) -> None:
        self.num_iterations = num_iterations
        self._bar: RichProgress | None = None
        self._last_refresh = 0.0
        self._seconds: list[float] = []  # of the last steps, without the first, which compiles
        self._seen = 0
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            console = Console()  # of this terminal; the library's own remembers the width of an earlier one
            bar = [BarColumn(bar_width=BAR_WIDTH)] if console.width >= WIDE else []
            columns = (*bar, MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=console, auto_refresh=False)
            self._task = self._bar.add_task("", total=num_iterations, completed=start)
            self._bar.start()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def step(self, record: dict[str, Any]) -> None:
        """Show a finished step's metrics."""
        if "train/loss" not in record:
            return
        self._seen += 1
        if self._seen > 1:
            self._seconds = [*self._seconds[-19:], record["train/step_seconds"]]
        done = record["step"] + 1
        parts = list(self._parts(record, done))
        if self._bar is None:
            print(
                f"step {done:0{len(str(self.num_iterations))}d}/{self.num_iterations} | " + " | ".join(parts),
                flush=True,
            )
            return
        width = self._bar.console.width
        room = width - 2 * len(str(self.num_iterations)) - 2 - (BAR_WIDTH + 1 if width >= WIDE else 0)
        while len(" ".join(parts)) > room and len(parts) > 2:
            del parts[1]  # the loss and the time left go last
        self._bar.update(self._task, completed=done, description=" ".join(parts))
        if time.monotonic() - self._last_refresh > self.REFRESH_SECONDS or done == self.num_iterations:
            self._bar.refresh()
            self._last_refresh = time.monotonic()

    def _parts(self, record: dict[str, Any], done: int) -> Iterable[str]:
        yield f"loss {record['train/loss']:.4f}"
        yield f"norm {record['train/grad_norm']:.3f}"
        yield f"lr x{record['train/lr_multiplier']:.3f}"
        yield f"{1000 * record['train/step_seconds']:.0f} ms"
        yield f"{record['train/tok_per_sec']:,.0f} tok/s"
        if "train/mfu" in record:
            yield f"mfu {100 * record['train/mfu']:.1f}%"
        yield f"data {100 * record['train/data_wait']:.1f}%"
        if self._seconds:
            mean = sum(self._seconds) / len(self._seconds)
            yield f"eta {datetime.timedelta(seconds=round(mean * (self.num_iterations - done)))}"

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def open_wandb(run_id: str, config: dict[str, Any]) -> Any:
    """A wandb run where wandb is installed, on rank 0; else something that forgets, and a line that says so."""
    if get_dist_info()[1] != 0:
        return DummyWandb()
    try:
        import wandb
    except ImportError:
        print0("wandb is not installed (pip install wandb): logging to files only")
        return DummyWandb()
    return wandb.init(project="vibechat", name=run_id, id=run_id, config=config, resume="allow")
