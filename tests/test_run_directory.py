"""What a run leaves behind and shows: each step once whatever happened, and every number where it was promised."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.terminal import Terminal
from vibechat.common import DummyWandb, UserError
from vibechat.run_directory import Display, RunDirectory, environment, new_run_name, open_wandb

RECORD = {
    "train/loss": 2.123456,
    "train/grad_norm": 0.5,
    "train/lr_multiplier": 1.0,
    "train/tok_per_sec": 11702.0,
    "train/mfu": 0.251,
    "train/data_wait": 0.012,
    "train/step_seconds": 0.35,
}


def lines(run: RunDirectory) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_one_object_a_line_and_there_at_once(base_dir: Path) -> None:
    with RunDirectory.create("d4") as run:
        assert run.path == base_dir / "runs" / "d4"
        for step in range(3):
            run.append({"step": step, "train/loss": 1 / 3})
            assert lines(run)[-1] == {"step": step, "train/loss": 1 / 3}  # in full precision
        run.sync()


def test_a_name_that_is_taken_gets_a_number() -> None:
    assert [RunDirectory.create("a").run_id for _ in range(3)] == ["a", "a-2", "a-3"]
    for name in ("../a", "", "a/b"):
        with pytest.raises(UserError, match="--run"):
            RunDirectory.create(name)
    assert RunDirectory.create(new_run_name("d4")).run_id.startswith("d4_2")


def test_a_continued_run_drops_what_lies_past_its_checkpoint() -> None:
    with RunDirectory.create("a") as run:
        for step in range(6):
            run.append({"step": step})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "train/lo')  # cut short by a kill
    with RunDirectory.reopen("a", 4) as again:
        again.append({"step": 4})
        assert again.path == run.path
    assert lines(run) == [{"step": step} for step in range(5)]
    assert sorted(p.name for p in run.path.iterdir()) == ["metrics.jsonl"]


def test_a_run_that_was_tidied_away_can_be_continued() -> None:
    with RunDirectory.reopen("gone", 4) as run:
        run.append({"step": 4})
    assert lines(run) == [{"step": 4}]


def test_environment_says_what_a_number_depends_on() -> None:
    found = json.loads(json.dumps(environment(torch.device("cpu"), ["train.py", "--depth", "4"])))
    assert found["command"] == ["train.py", "--depth", "4"]
    assert found["torch"] == torch.__version__
    assert found["device"].startswith("cpu: ")
    assert {"commit", "dirty", "python", "vibechat", "threads", "compute_dtype", "platform"} <= found.keys()


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(1000)
    for step in (0, 1):
        display.step({"step": step, **RECORD})
    display.say("val bpb [bold]")
    display.step({"step": 2, "val/bpb": 1.5})  # not a training step
    display.close()
    out = capsys.readouterr().out.splitlines()
    assert out[0] == (
        "step 0001/1000 | loss 2.1235 | norm 0.500 | lr x1.000 | 350 ms | 11,702 tok/s | mfu 25.1% | data 1.2%"
    )
    assert out[1].endswith("| eta 0:05:49")  # 998 steps of 0.35 s
    assert out[2:] == ["val bpb [bold]"]


def shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> str:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with open(terminal.name, "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        display = Display(2)
        for step in (0, 1):
            display.step({"step": step, **RECORD})
            display.say(f"line {step} [bold]")
        display.close()
    return terminal.text()


def test_a_terminal_gets_a_live_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = shown_on_a_terminal(monkeypatch, 160)
    assert "2/2" in shown
    assert "11,702 tok/s" in shown
    assert "line 0 [bold]" in shown
    assert "\x1b[2K" in shown  # it redraws its line instead of filling the screen
    assert "norm 0.500" in shown
    assert "\u2501" in shown


@pytest.mark.parametrize("columns", [60, 80, 100, 119])
def test_a_narrow_terminal_gets_what_matters(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    shown = shown_on_a_terminal(monkeypatch, columns)
    assert "2/2" in shown
    assert "loss 2.1235" in shown
    assert "eta 0:00:00" in shown
    assert "\u2026" not in shown  # nothing is cut
    assert ("norm 0.500" in shown.rpartition("2/2")[2]) == (columns >= 100)


def test_wandb_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fake = types.SimpleNamespace(init=lambda **settings: calls.append(settings) or "the run")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert open_wandb("d4-run", {"depth": 4}) == "the run"
    assert calls == [
        {"project": "vibechat", "name": "d4-run", "id": "d4-run", "config": {"depth": 4}, "resume": "allow"}
    ]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert isinstance(open_wandb("d4-run", {}), DummyWandb)
