"""Numbers become a page that a person reads: tables in Markdown, plots as PNG beside them.

Two kinds of page:

- `write_run_report(run_dir)` turns what one training run left behind (metrics.jsonl, config.json, env.json) into
  report.md with plots of loss, bits per byte, learning rate, throughput and memory. It reads what is there: a run of
  one step, one that was killed in the middle of a line, one that was resumed, one that met a NaN.
- `Report` gathers sections from several programs (tokenizer, base model, chat ...) into one page; `get_report()` gives
  the one under the base directory, and on ranks other than 0 one that forgets everything.

Matplotlib is loaded only when something is drawn, without a window system; where it is missing, the page says so and
has no plots.
"""

import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import vibechat
from vibechat.common import UserError, get_base_dir, get_dist_info

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[int, float]
COMPRESSORS = ("zlib", "bzip2", "xz")

# ---------------------------------------------------------------------------------------------------------------------
# one page for several programs


class Report:
    """A page made of sections, one file each, in the order in which they were first written."""

    def __init__(self, report_dir: str) -> None:
        """`report_dir` is created when the first section is written."""
        self.directory = Path(report_dir)

    def log(self, section: str, data: Sequence[Mapping[str, Any] | str]) -> str:
        """Write one section, replacing the one of that name; dicts become tables, strings paragraphs.

        Returns the path of the section's file. Raises UserError if the directory cannot be written.
        """
        slug = re.sub(r"[^a-z0-9]+", "-", section.lower()).strip("-")
        if not slug:
            raise UserError(f"report section {section!r}: give it a name with letters or digits")
        files = self._section_files()
        number = next((n for n, name, _ in files if name == slug), max((n for n, _, _ in files), default=0) + 1)
        path = self.directory / f"{number:02d}-{slug}.md"
        stamp = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
        _write(path, f"## {section}\n\n{stamp}\n\n{markdown(data)}")
        return str(path)

    def generate(self) -> str:
        """Join header and sections into report.md and return its path."""
        header = self.directory / "header.md"
        pages = [header.read_text(encoding="utf-8") if header.exists() else _header()]
        pages += [path.read_text(encoding="utf-8") for _, _, path in self._section_files()]
        path = self.directory / "report.md"
        _write(path, "\n".join(pages))
        return str(path)

    def reset(self) -> None:
        """Forget every section and write a header that says when, where and with what the page was begun."""
        for _, _, path in self._section_files():
            path.unlink()
        (self.directory / "report.md").unlink(missing_ok=True)
        _write(self.directory / "header.md", _header())

    def _section_files(self) -> list[tuple[int, str, Path]]:
        """(number, slug, path) of every section, in order."""
        found = []
        for path in self.directory.glob("*.md"):
            if match := re.fullmatch(r"(\d+)-([a-z0-9-]+)\.md", path.name):
                found.append((int(match[1]), match[2], path))
        return sorted(found)


class DummyReport:
    """What ranks other than 0 hold in place of a Report: it forgets everything."""

    def log(self, section: str, data: Sequence[Mapping[str, Any] | str]) -> str:
        """Forget it; returns an empty path."""
        return ""

    def generate(self) -> str:
        """Nothing to generate; returns an empty path."""
        return ""

    def reset(self) -> None:
        """Nothing to forget."""


def get_report() -> Report | DummyReport:
    """The report under the base directory on rank 0, one that forgets everything elsewhere."""
    return Report(str(Path(get_base_dir()) / "report")) if get_dist_info()[1] == 0 else DummyReport()


def _header() -> str:
    stamp = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    facts = {
        "begun": stamp,
        "vibechat": vibechat.__version__ + (f" ({commit})" if (commit := _commit()) else ""),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
    }
    if torch.cuda.is_available():
        facts["GPUs"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"# vibechat report\n\n{markdown([facts])}"


def _commit() -> str:
    """The commit that this source tree stands at; empty outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# the page of one run


def write_run_report(run_dir: Path, *, sections: Mapping[str, Sequence[Mapping[str, Any] | str]] | None = None) -> Path:
    """Write report.md and its plots into a run's directory, from the metrics, config and env files found there.

    Args:
        run_dir: `runs/<id>`; metrics.jsonl must be in it, config.json and env.json may be.
        sections: further tables and paragraphs by heading, printed before the configuration. Entries named zlib, bzip2
            and xz in any of their tables (bits per byte) become lines in the plot of bits per byte.

    Returns:
        The path of report.md.

    Raises:
        UserError: if there is no metrics.jsonl, or nothing in it can be read, or the directory cannot be written.
    """
    run_dir, sections = Path(run_dir), sections or {}
    rows, skipped = read_metrics(run_dir / "metrics.jsonl")
    series = {key: _series(rows, key) for key in sorted({key for row in rows for key in row} - {"step"})}
    compressors = _compressors(sections)
    page = [f"# Run {run_dir.resolve().name}\n", markdown([_summary(rows, series, compressors)])]
    if skipped:
        page.append(f"{skipped} line(s) of metrics.jsonl could not be read and were skipped.\n")
    plots = _draw_plots(run_dir, series, compressors)
    if plots is None:
        page.append("Plots are missing: matplotlib is not installed.\n")
    else:
        page += [f"![{title}]({name})\n" for title, name in plots]
    page += [f"## {title}\n\n{markdown(data)}" for title, data in sections.items()]
    for title, name in (("Configuration", "config.json"), ("Machine", "env.json")):
        if (data := _read_json(run_dir / name)) is not None:
            told = {key: value for key, value in flatten(data).items() if value is not None}
            page.append(f"## {title}\n\n{markdown([told])}")
    path = run_dir / "report.md"
    _write(path, "\n".join(page))
    return path


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(rows in order of step, number of lines that could not be read).

    Lines of the same step become one row in which the later line wins. A line that a kill cut short counts as
    unreadable. Raises UserError if the file is missing or no line of it can be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; has this run finished a step?") from error
    rows: dict[int, dict[str, Any]] = {}
    skipped = 0
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
            rows.setdefault(int(row["step"]), {}).update(row)
        except (ValueError, TypeError, KeyError, OverflowError):
            skipped += 1
    if not rows:
        raise UserError(f"{path} holds no readable line; has this run finished a step?")
    return [rows[step] for step in sorted(rows)], skipped


def _series(rows: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    """(step, value) wherever the key holds a number, NaN and infinities included."""
    return [
        (int(row["step"]), float(row[key]))
        for row in rows
        if isinstance(row.get(key), int | float) and not isinstance(row[key], bool)
    ]


def _finite(series: Iterable[Point]) -> list[float]:
    return [value for _, value in series if math.isfinite(value)]


def _compressors(sections: Mapping[str, Sequence[Mapping[str, Any] | str]]) -> dict[str, float]:
    """Bits per byte of zlib, bzip2 and xz, wherever they stand in the sections' tables."""
    found: dict[str, float] = {}
    for table in (entry for data in sections.values() for entry in data if isinstance(entry, Mapping)):
        for key, value in flatten(table).items():
            name = next((name for name in COMPRESSORS if name in key.lower()), None)
            if name and isinstance(value, int | float) and math.isfinite(value):
                found[name] = float(value)
    return found


def _summary(
    rows: Sequence[Mapping[str, Any]], series: Mapping[str, list[Point]], compressors: Mapping[str, float]
) -> dict[str, str]:
    """The first table of the page: what a person asks first."""

    def over(key: str, reduce: Callable[[list[float]], float], show: Callable[[float], str]) -> str:
        values = _finite(series.get(key, []))
        return show(reduce(values)) if values else ""

    losses, bpb = series.get("train/loss", []), series.get("val/bpb", [])
    bad = sum(not math.isfinite(value) for _, value in losses)
    best = min(((value, step) for step, value in bpb if math.isfinite(value)), default=None)
    memory = "train/memory_bytes"
    summary = {
        "steps": str(len(losses) or len(rows)),
        "train loss": f"{losses[0][1]:.4f} at first, {losses[-1][1]:.4f} at last (nats a token)" if losses else "",
        "steps without a finite loss": str(bad) if bad else "",
        "validation": f"{bpb[-1][1]:.4f} bits per byte at step {bpb[-1][0]}" if bpb else "",
        "best validation": f"{best[0]:.4f} bits per byte at step {best[1]}" if best else "",
        "compressors on the same bytes": ", ".join(f"{name} {value:.4f}" for name, value in compressors.items()),
        "time in steps": over("train/step_seconds", sum, duration),
        "speed": over("train/tok_per_sec", statistics.median, lambda v: f"{v:,.0f} tokens/s (median)"),
        "MFU": over("train/mfu", statistics.median, lambda v: f"{v:.1%} (median; causal attention counted as such)"),
        "waiting for data": over("train/data_wait", statistics.mean, lambda v: f"{v:.2%} of a step (mean)"),
        "memory": over(memory, max, lambda v: f"{v / 2**30:.2f} GiB (peak)"),
    }
    return {key: value for key, value in summary.items() if value}


# ---------------------------------------------------------------------------------------------------------------------
# plots

BLUE, ORANGE, GREEN, RED, INK = "#2f6690", "#c8742a", "#4f8a5b", "#b23a48", "#333333"


def _draw_plots(
    run_dir: Path, series: Mapping[str, list[Point]], compressors: Mapping[str, float]
) -> list[tuple[str, str]] | None:
    """Draw what there are numbers for; (title, file name) of each plot, or None without matplotlib."""
    try:
        import matplotlib  # noqa: F401 - asks whether it is there
    except ImportError:
        return None

    def loss(axes: "Axes") -> None:
        _line(axes, series["train/loss"], BLUE, smooth=True)
        axes.set_ylabel("loss (nats a token)")

    def bpb(axes: "Axes") -> None:
        _line(axes, series["val/bpb"], BLUE, label="this model", marker="o")
        for (name, value), style in zip(compressors.items(), ("-", "--", ":"), strict=False):
            axes.axhline(value, color=ORANGE, linestyle=style, linewidth=1.2, label=f"{name} {value:.3f}")
        axes.set_ylabel("bits per byte")
        if compressors:
            axes.legend(frameon=False)

    def learning_rate(axes: "Axes") -> None:
        _line(axes, series["train/lr_multiplier"], BLUE)
        axes.set_ylabel("times the peak rate")
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])

    def speed(axes: "Axes") -> None:
        _line(axes, series["train/tok_per_sec"], BLUE, smooth=True)
        axes.set_ylabel("tokens/s")
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")

    def mfu(axes: "Axes") -> None:
        _line(axes, [(step, 100 * value) for step, value in series["train/mfu"]], GREEN, smooth=True)
        axes.set_ylabel("MFU (%)")
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])

    def memory(axes: "Axes") -> None:
        _line(axes, [(step, value / 2**30) for step, value in series["train/memory_bytes"]], BLUE)
        axes.set_ylabel("memory (GiB)")
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])

    drawn = []
    for title, name, panels in (
        ("Training loss", "loss.png", [("train/loss", loss)]),
        ("Validation bits per byte", "bpb.png", [("val/bpb", bpb)]),
        ("Learning rate", "learning_rate.png", [("train/lr_multiplier", learning_rate)]),
        ("Throughput", "throughput.png", [("train/tok_per_sec", speed), ("train/mfu", mfu)]),
        ("Memory", "memory.png", [("train/memory_bytes", memory)]),
    ):
        wanted = [draw for key, draw in panels if _finite(series.get(key, []))]
        if wanted:
            _figure(run_dir / name, title, wanted)
            drawn.append((title, name))
        else:
            (run_dir / name).unlink(missing_ok=True)  # from an earlier report of the same run
    return drawn


def _figure(path: Path, title: str, panels: Sequence[Callable[["Axes"], None]]) -> None:
    """One PNG with panels above each other over the same steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    figure = Figure(
        figsize=(8, 2.1 + 2.1 * len(panels)), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    )
    FigureCanvasAgg(figure)  # draws without a window system, and without pyplot's global state
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    for axes, draw in zip(all_axes, panels, strict=True):
        axes.grid(True, color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b5b5b5")
        axes.tick_params(colors=INK, labelsize=9)
        draw(axes)
        axes.yaxis.label.set_color(INK)
        axes.margins(x=0.02)
    figure.align_ylabels(all_axes)
    all_axes[-1].set_xlabel("step (optimizer updates)", color=INK)
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    partial = path.with_name(path.name + ".partial")
    try:
        figure.savefig(partial, format="png")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _line(
    axes: "Axes", points: Sequence[Point], color: str, *, label: str = "", marker: str = "", smooth: bool = False
) -> None:
    """Draw points; with `smooth` the raw values stay faint behind a running median that hides no jump."""
    steps = [step for step, _ in points]
    values = [value if math.isfinite(value) else math.nan for _, value in points]
    marker = marker if len(points) <= 60 else ""
    if len(points) == 1:
        marker = "o"
    window = max(1, len(points) // 50)
    if smooth and window > 2:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        values = running_median(values, window)
    for step in [step for step, value in points if not math.isfinite(value)][:100]:
        axes.axvline(step, color=RED, linewidth=0.8, alpha=0.6)  # here was no number
    axes.plot(steps, values, color=color, linewidth=1.6, marker=marker, markersize=4, label=label or None)


def running_median(values: Sequence[float], window: int) -> list[float]:
    """The median of the finite values in a window centred on each place; NaN where there are none."""
    medians = []
    for place in range(len(values)):
        reach = min(window // 2, place, len(values) - 1 - place)  # shrinks at the ends, so that no end is bent
        near = [value for value in values[place - reach : place + reach + 1] if math.isfinite(value)]
        medians.append(statistics.median(near) if near else math.nan)
    return medians


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def markdown(data: Sequence[Mapping[str, Any] | str]) -> str:
    """Dicts as two-column tables, strings as paragraphs; empty entries are left out."""
    parts = []
    for entry in data:
        if isinstance(entry, str):
            parts.append(entry.strip() + "\n")
        elif entry:
            rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in entry.items()]
            parts.append("\n".join(["| | |", "| --- | --- |", *rows]) + "\n")
    return "\n".join(part for part in parts if part.strip())


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def duration(seconds: float) -> str:
    """42 s, 3 min 12 s, 5 h 7 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _cell(value: Any) -> str:
    """A value as a table shows it: short numbers, thousands separated, no bar or line break that ends the cell."""
    if isinstance(value, bool) or value is None:
        text = {True: "yes", False: "no", None: ""}[value]
    elif isinstance(value, int):
        text = f"{value:,}" if abs(value) >= 10_000 else str(value)
    elif isinstance(value, float):
        whole = value == round(value, 0) and abs(value) < 1e15
        text = f"{value:,.0f}" if whole else f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"
    elif isinstance(value, list | tuple):
        text = " ".join(map(str, value))
    else:
        text = str(value)
    return text.replace("|", "\\|").replace("\r", " ").replace("\n", "<br>")


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if the file is missing or holds anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _write(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it, so that no one ever reads half of it."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
