"""Reports: the page of a run, whatever the run left behind, and the page of several programs."""

import builtins
import contextlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vibechat.common import UserError
from vibechat.report import (
    DummyReport,
    Report,
    duration,
    flatten,
    get_report,
    markdown,
    read_metrics,
    running_median,
    write_run_report,
)

PLOTS = ["bpb.png", "learning_rate.png", "loss.png", "memory.png", "throughput.png"]


def row(step: int, **changes: Any) -> dict[str, Any]:
    """A line of metrics as the trainer writes it."""
    return {
        "step": step,
        "train/loss": 9.0 * 0.9**step,
        "train/grad_norm": 1.0,
        "train/lr_multiplier": 1.0,
        "train/tok_per_sec": 12_000.0,
        "train/mfu": 0.4,
        "train/mfu_full": 0.5,
        "train/data_wait": 0.002,
        "train/step_seconds": 0.25,
        "train/memory_bytes": 2**30,
    } | {key.replace("_slash_", "/"): value for key, value in changes.items()}


def write_run(run_dir: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)
    return run_dir


def plots(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.glob("*.png"))


# ---------------------------------------------------------------------------------------------------------------------
# the page of a run


def test_a_whole_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "d4-run", [row(0, val_slash_bpb=3.0), *map(row, range(1, 9)), row(9, val_slash_bpb=1.5)])
    (run / "config.json").write_text(
        json.dumps({"depth": 4, "plan": {"tokens": 4_096_000}, "note": "a|b\nc", "seed": None})
    )
    (run / "env.json").write_text(json.dumps({"torch": "2.11.0"}))
    compression = {"this model": 1.5, "zlib -9": 2.5, "bzip2 -9": 2.125, "xz -9e": 2.25}
    path = write_run_report(run, sections={"Compression": ["On the same bytes.", compression], "Samples": ["> Once"]})
    assert path == run / "report.md"
    page = path.read_text()
    for line in [
        "# Run d4-run",
        "| steps | 10 |",
        f"| train loss | 9.0000 at first, {9 * 0.9**9:.4f} at last (nats a token) |",
        "| best validation | 1.5000 bits per byte at step 9 |",
        "| compressors on the same bytes | zlib 2.5000, bzip2 2.1250, xz 2.2500 |",
        "| time in steps | 2.5 s |",
        "| speed | 12,000 tokens/s (median) |",
        "| waiting for data | 0.20% of a step (mean) |",
        "| memory | 1.00 GiB (peak) |",
        "## Compression",
        "> Once",
        "| plan.tokens | 4,096,000 |",
        "| note | a\\|b<br>c |",
        "| torch | 2.11.0 |",
    ]:
        assert line in page.splitlines(), line
    assert "without a finite loss" not in page
    assert "| seed |" not in page  # nothing was said of it
    assert "skipped" not in page
    assert plots(run) == PLOTS
    for name in PLOTS:
        assert f"]({name})" in page
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert not list(run.glob("*.partial"))


def test_sections_stand_in_their_order_before_the_configuration(tmp_path: Path) -> None:
    run = write_run(tmp_path, [row(0)])
    (run / "config.json").write_text("{}")
    page = write_run_report(run, sections={"Zebra": ["z"], "Aardvark": ["a"]}).read_text()
    assert page.index("## Zebra") < page.index("## Aardvark") < page.index("## Configuration")


def test_a_run_of_one_step(tmp_path: Path) -> None:
    assert "| steps | 1 |" in write_run_report(write_run(tmp_path, [row(0, val_slash_bpb=3.0)])).read_text()
    assert plots(tmp_path) == PLOTS


def test_a_run_killed_in_the_middle_of_a_line(tmp_path: Path) -> None:
    page = write_run_report(write_run(tmp_path, [row(0), row(1)], '{"step": 2, "train/lo')).read_text()
    assert "| steps | 2 |" in page
    assert "1 line(s) of metrics.jsonl could not be read" in page


def test_not_a_number_is_counted_and_drawn_around(tmp_path: Path) -> None:
    run = write_run(tmp_path, [row(0), row(1, train_slash_loss=math.nan), row(2, train_slash_loss=math.inf), row(3)])
    page = write_run_report(run).read_text()
    assert "| steps without a finite loss | 2 |" in page
    assert "loss.png" in plots(run)
    only_nan = write_run(tmp_path / "x", [{"step": 0, "train/loss": math.nan}])
    assert "nan" in write_run_report(only_nan).read_text()
    assert plots(only_nan) == []


def test_missing_keys_and_nulls_leave_their_lines_and_plots_out(tmp_path: Path) -> None:
    page = write_run_report(write_run(tmp_path, [{"step": 0, "train/loss": 2.0, "train/mfu": None}])).read_text()
    assert plots(tmp_path) == ["loss.png"]
    for word in ("MFU", "memory", "validation", "## Configuration", "None"):
        assert word not in page


def test_a_plot_of_an_earlier_report_does_not_outlive_its_numbers(tmp_path: Path) -> None:
    write_run_report(write_run(tmp_path, [row(0, val_slash_bpb=3.0)]))
    write_run_report(write_run(tmp_path, [row(0)]))
    assert "bpb.png" not in plots(tmp_path)


def test_a_step_that_stands_twice_counts_once_and_the_later_line_wins(tmp_path: Path) -> None:
    write_run(tmp_path, [row(0), row(1, train_slash_loss=5.0), row(2), row(1, train_slash_loss=4.0)])
    rows, skipped = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert rows[1]["train/loss"] == 4.0
    assert skipped == 0


def test_an_evaluation_after_the_last_step_is_no_step(tmp_path: Path) -> None:
    page = write_run_report(write_run(tmp_path, [row(0), row(1), {"step": 2, "val/bpb": 1.25}])).read_text()
    assert "| steps | 2 |" in page
    assert "1.2500 bits per byte at step 2" in page


@pytest.mark.parametrize(
    "damage", ["[1, 2]", "null", "7", '{"no": "step"}', '{"step": "x"}', "\x00\x00", '{"step": NaN}']
)
def test_a_damaged_line_is_skipped(tmp_path: Path, damage: str) -> None:
    write_run(tmp_path, [row(0)], damage + "\n" + json.dumps(row(1)) + "\n\n")
    rows, skipped = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1]
    assert skipped == 1


@pytest.mark.parametrize("content", [None, "", "{", "\n\n"])
def test_nothing_to_report_is_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl.*has this run finished a step") as error:
        write_run_report(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[1]", "3"])
def test_a_damaged_config_costs_its_table_only(tmp_path: Path, content: str) -> None:
    write_run(tmp_path, [row(0)])
    (tmp_path / "config.json").write_text(content)
    assert "## Configuration" not in write_run_report(tmp_path).read_text()


def test_without_matplotlib_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert "matplotlib is not installed" in write_run_report(write_run(tmp_path, [row(0)])).read_text()
    assert plots(tmp_path) == []


def test_a_run_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    write_run(tmp_path, [{"step": 0}])
    (tmp_path / "report.md.partial").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_run_report(tmp_path)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["step", "train/loss", "train/tok_per_sec", "val/bpb", "other"]),
            st.none() | st.booleans() | st.integers(0, 10**6) | st.floats() | st.text(max_size=3),
        ),
        max_size=6,
    ),
    st.text(max_size=10),
)
def test_no_metrics_file_makes_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], tail: str
) -> None:
    run = tmp_path_factory.mktemp("run")
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail, encoding="utf-8")
    with contextlib.suppress(UserError):  # where no line has a step
        assert write_run_report(run).exists()


# ---------------------------------------------------------------------------------------------------------------------
# the page of several programs


def test_sections_in_the_order_of_their_first_writing(tmp_path: Path) -> None:
    report = Report(str(tmp_path))
    report.reset()
    first = report.log("Tokenizer training", [{"vocabulary": 8192, "time": 1.5}, "Trained on builtin."])
    report.log("Base model", [{"val bpb": 1.5}])
    assert report.log("Tokenizer training", [{"vocabulary": 16384}]) == first
    path = Path(report.generate())
    assert path == tmp_path / "report.md"
    page = path.read_text()
    assert page.startswith("# vibechat report")
    assert "16,384" in page
    assert "8192" not in page
    assert page.index("## Tokenizer training") < page.index("## Base model")


def test_reset_forgets_the_sections(tmp_path: Path) -> None:
    report = Report(str(tmp_path))
    report.log("Old", ["stale"])
    report.generate()
    report.reset()
    assert "stale" not in Path(report.generate()).read_text()


def test_reset_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    Report(str(tmp_path)).reset()
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_generate_without_anything_is_a_header(tmp_path: Path) -> None:
    page = Path(Report(str(tmp_path / "new")).generate()).read_text()
    assert page.startswith("# vibechat report")
    assert "torch" in page


def test_a_section_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name"):
        Report(str(tmp_path)).log("!?", [])


def test_the_report_of_this_machine(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = get_report()
    assert isinstance(report, Report)
    assert Path(report.log("A", ["b"])).parent == base_dir / "report"
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    other = get_report()
    assert isinstance(other, DummyReport)
    assert (other.log("A", []), other.generate(), other.reset()) == ("", "", None)


# ---------------------------------------------------------------------------------------------------------------------
# small things


def test_markdown_of_values() -> None:
    table = markdown(
        [{"a": 1234, "b": 12345, "c": 0.00001234, "d": 1.23456, "e": True, "f": None, "g": [1, 2], "h": -1.0}]
    )
    cells = [line.split(" | ")[1].rstrip(" |") for line in table.splitlines()[2:]]
    assert cells == ["1234", "12,345", "1.234e-05", "1.2346", "yes", "", "1 2", "-1"]
    assert markdown([{}, ""]) == ""


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=8), min_size=1, max_size=4))
def test_no_value_breaks_its_table(table: dict[str, str]) -> None:
    lines = markdown([table]).removesuffix("\n").split("\n")
    assert len(lines) == 2 + len(table)
    assert all(line.replace("\\|", "").count("|") == 3 for line in lines)


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [1]}) == {"a.b.c": 1, "d": [1]}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "0.2 s"), (9.99, "10.0 s"), (42, "42 s"), (59.9, "1 min 0 s"), (192, "3 min 12 s"), (18_420, "5 h 7 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@given(st.lists(st.floats(-10, 10), max_size=40), st.integers(1, 9))
def test_running_median_of_finite_values(values: list[float], window: int) -> None:
    medians = running_median(values, window)
    assert len(medians) == len(values)
    for place, median in enumerate(medians):
        reach = min(window // 2, place, len(values) - 1 - place)
        assert median == statistics.median(values[place - reach : place + reach + 1])


def test_running_median_skips_what_is_not_finite() -> None:
    assert running_median([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]
    assert math.isnan(running_median([math.inf], 1)[0])
