"""The gate on recorded runs: a slowed one fails, an equal one passes; and how a baseline may change."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import baseline, mfu
from vibechat.common import UserError

RECORDED = json.loads((Path(__file__).parent / "recorded_mfu.json").read_text())
COMMAND = "python -m bench.mfu ..."


@pytest.fixture(autouse=True)
def baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(baseline, "DIRECTORY", tmp_path / "baselines")
    return tmp_path / "baselines"


def recorded(**machine: Any) -> dict[str, Any]:
    run = copy.deepcopy(RECORDED)
    run["machine"].update(machine)
    return run


def slowed(run: dict[str, Any], factor: float, names: tuple[str, ...] = ("vibechat",)) -> dict[str, Any]:
    """The run as it would have been, had these implementations taken `factor` times as long."""
    run = copy.deepcopy(run)
    for one in run["runs"]:
        if one["implementation"] in names:
            for turn in one["rounds"]:
                turn["seconds"] *= factor
    at = {one["implementation"]: one for one in run["runs"]}
    run["rows"] = mfu.table_of(run["workload"]["total_batch_size"], at)
    return run


ALL = ("eager", "compiled", "vibechat", "plain")


def holds(run: dict[str, Any]) -> bool:
    return baseline.check(run, baseline.find(run, COMMAND))[0]


def test_the_recording_is_one_of_a_run() -> None:
    assert slowed(recorded(), 1.0)["rows"] == RECORDED["rows"]


@pytest.mark.parametrize(("factor", "passes"), [(0.8, True), (1.0, True), (1.04, True), (1.06, False), (2.0, False)])
def test_a_slowed_run_fails_and_an_equal_one_passes(factor: float, passes: bool) -> None:
    run = recorded()
    baseline.record(run, "a test", "it is the first")
    assert holds(slowed(run, factor)) is passes


@given(st.floats(0.2, 5))
def test_a_machine_that_is_slower_for_all_is_no_regression(factor: float) -> None:
    """On a CPU: the ratio is what is held. On a GPU MFU is held too, and a slower machine fails."""
    for device_type in ("cpu", "cuda"):
        run = recorded(device_type=device_type, device=f"{device_type} of {factor}")
        baseline.record(run, "a test", "it is the first")
        assert holds(slowed(run, factor, ALL)) is (device_type == "cpu" or factor < 1 / 0.95)


def test_the_tolerance_comes_from_the_spread_and_is_never_under_five_per_cent() -> None:
    run = recorded()
    baseline.record(run, "a test", "it is the first")
    known = baseline.find(run, COMMAND)
    for spread, allowed in ((0.0, 0.05), (0.049, 0.05), (0.12, 0.12)):
        run["rows"]["vibechat"]["pair_spread"] = spread
        assert baseline.tolerance(run, known) == pytest.approx(max(allowed, known["numbers"]["spread"]))
    run["rows"]["vibechat"]["pair_spread"] = 0.3
    with pytest.raises(UserError, match="spread by 30%, which says nothing"):
        baseline.tolerance(run, known)
    with pytest.raises(UserError, match="needs a quiet machine"):
        baseline.record(run, "a test", "noise")


@given(st.lists(st.floats(0.5, 2), min_size=1, max_size=9))
def test_spread(values: list[float]) -> None:
    found = baseline.spread(values)
    assert 0 <= found <= (max(values) - min(values)) / min(values)
    assert baseline.spread([2 * value for value in values]) == pytest.approx(found)
    assert baseline.spread([1.0] * len(values)) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"threads": 64},
        {"instruction_set": "AVX2"},
        {"torch": "9.9.9"},
        {"triton": "9.9.9"},
        {"python": "3.99"},
    ],
)
def test_another_machine_needs_a_baseline_of_its_own(change: dict[str, Any]) -> None:
    baseline.record(recorded(), "a test", "it is the first")
    (name,) = change
    with pytest.raises(UserError, match=f"nearest differs in {name}.*make one with `{COMMAND}`"):
        baseline.find(recorded(**change), COMMAND)


def test_another_workload_needs_a_baseline_of_its_own() -> None:
    run = recorded()
    baseline.record(run, "a test", "it is the first")
    run["workload"]["depth"] += 1
    with pytest.raises(UserError, match="nearest differs in depth"):
        baseline.find(run, COMMAND)
    with pytest.raises(UserError, match="this device has none"):
        baseline.find(recorded(device="another"), COMMAND)


def test_a_change_records_who_why_and_from_what_to_what(baselines: Path) -> None:
    run = recorded()
    first = baseline.record(run, "Ada", "the first measurement")
    second = baseline.record(slowed(run, 0.5), "Grace", "fused the MLP")
    assert "none -> " in first
    assert "by Grace: fused the MLP" in second
    (entry,) = json.loads(baseline.file_of(run).read_text())["baselines"]
    old, new = entry["history"]
    assert [(one["who"], one["why"]) for one in (old, new)] == [
        ("Ada", "the first measurement"),
        ("Grace", "fused the MLP"),
    ]
    assert old["from"] is None
    assert new["from"] == old["to"] == baseline.numbers(run)
    assert new["to"] == entry["numbers"]
    assert new["to"]["ratio_to_eager"] == pytest.approx(2 * old["to"]["ratio_to_eager"])
    assert {"when", "commit", "command"} <= new.keys()


@pytest.mark.parametrize(("who", "why"), [("", "why"), ("who", ""), (" ", "why")])
def test_nobody_changes_a_baseline_without_a_name_and_a_reason(who: str, why: str, baselines: Path) -> None:
    with pytest.raises(UserError, match="--who NAME and --why TEXT"):
        baseline.record(recorded(), who, why)
    assert not baselines.exists()


def test_the_commands(baselines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing: an error that names the command, and that command works; then equal passes and slowed fails."""
    path = tmp_path / "mfu.json"
    path.write_text(json.dumps(RECORDED))
    assert mfu.main(["--recorded", str(path), "--check"]) == 2
    command = capsys.readouterr().err.split("`")[1]
    assert command.startswith("python -m bench.mfu ")
    words = command.split()[3:]
    words[words.index("NAME")], words[words.index("TEXT")] = "Ada", "first"
    assert mfu.main(["--recorded", str(path), "--write-baseline"]) == 2
    assert not baselines.exists()
    assert mfu.main(words) == 0
    assert mfu.main(["--recorded", str(path), "--check"]) == 0
    path.write_text(json.dumps(slowed(RECORDED, 1.2)))
    assert mfu.main(["--recorded", str(path), "--check"]) == 1
    output = capsys.readouterr().out
    assert "ratio_to_eager" in output
    assert "FAILS" in output


def test_a_recording_without_eager_cannot_be_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded()
    del run["rows"]["vibechat"]["ratio_to_eager"]
    (tmp_path / "mfu.json").write_text(json.dumps(run))
    assert mfu.main(["--recorded", str(tmp_path / "mfu.json"), "--check"]) == 2
    with pytest.raises(UserError, match="vibechat and eager"):
        baseline.record(run, "a test", "nothing")
    assert mfu.main(["--recorded", str(tmp_path / "no such file"), "--check"]) == 2
    assert "error: " in capsys.readouterr().err


def test_what_a_machine_is() -> None:
    machine = baseline.machine(torch.device("cpu"))
    assert machine["threads"] == torch.get_num_threads()
    assert machine["torch"] == torch.__version__
    assert machine["instruction_set"]
    assert machine["device_type"] == "cpu"


def test_the_baselines_in_the_repository_are_whole() -> None:
    for path in (Path(baseline.__file__).parent / "baselines").glob("*.json"):
        for entry in json.loads(path.read_text())["baselines"]:
            history = entry["history"]
            assert [one["from"] for one in history] == [None, *(one["to"] for one in history[:-1])]
            assert history[-1]["to"] == entry["numbers"]
            assert set(baseline.WORKLOAD) < entry["key"].keys()
            assert all(one["who"] and one["why"] for one in history)
