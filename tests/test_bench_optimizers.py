"""bench.optimizers: which run comes next, and that a comparison which was broken off goes on."""

import json
from pathlib import Path

import pytest

from bench import optimizers
from bench.optimizers import MUON_LR, Results, Run, next_run, print_table, read_results

SEEDS = [1, 2, 3]
OF_OPTIMIZERS = ("matrix-optimizer", "matrix-lr", "normuon", "matrix-weight-decay")


def played(bits: dict[float, float], only: list[str]) -> Results:
    """Every run in the order in which it is asked for; bits depend on the decay, or else on the rate, alone."""
    results: Results = {}
    while (run := next_run(results, only, [1.0, 2.0, 4.0], SEEDS, [0.1, 0.2])) is not None:
        assert run not in results
        results[run] = {"val_bpb": bits.get(run.decay or run.matrix_lr, 9.0) + run.seed / 100}
    return results


def test_the_best_rate_of_the_sweep_runs_with_every_seed() -> None:
    results = played({1.0: 3.0, 2.0: 1.0, 4.0: 2.0}, ["adamw"])
    assert list(results) == [Run("adamw", rate, 1) for rate in (1.0, 2.0, 4.0)] + [Run("adamw", 2.0, s) for s in (2, 3)]


@pytest.mark.parametrize(
    ("bits", "best"),
    [({1.0: 3.0, 2.0: 2.0, 4.0: 1.0, 8.0: 0.5, 16.0: 0.6}, 8.0), ({1.0: 1.0, 2.0: 2.0, 4.0: 3.0, 0.5: 1.5}, 1.0)],
)
def test_a_sweep_whose_best_is_at_an_end_goes_on(bits: dict[float, float], best: float) -> None:
    results = played(bits, ["adamw"])
    assert {run.matrix_lr for run in results} == set(bits)
    assert {run.seed for run in results if run.matrix_lr == best} == set(SEEDS)


def test_a_sweep_that_never_turns_ends() -> None:
    falling = {2.0**k: -float(k) for k in range(20)}
    assert len(played(falling, ["adamw"])) == 3 + optimizers.MOST_EXTRA_RATES + 2


def test_muon_runs_with_every_seed_after_adamw() -> None:
    results = played({1.0: 3.0, 2.0: 1.0, 4.0: 2.0}, ["adamw", "muon"])
    assert list(results)[-3:] == [Run("muon", MUON_LR, seed) for seed in SEEDS]


@pytest.mark.parametrize("best", [0.1, 0.2])
def test_options_come_one_at_a_time_after_muon_and_then_both(best: float) -> None:
    results = played({best: 1.0}, ["cautious", "both", "normuon", "muon"])
    plain = [Run(name, MUON_LR, seed) for name in ("muon", "normuon") for seed in SEEDS]
    sweep = [Run("cautious", MUON_LR, 1, decay) for decay in (0.1, 0.2)]
    cautious = [Run("cautious", MUON_LR, seed, best) for seed in (2, 3)]
    assert list(results) == [*plain, *sweep, *cautious, *(Run("both", MUON_LR, seed, best) for seed in SEEDS)]
    assert list(played({}, ["both"])) == [Run("both", MUON_LR, seed, 0.1) for seed in SEEDS]


def test_a_run_is_told_its_optimizer_and_nothing_of_the_options_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[str, dict[str, str]] = {}

    def run(command: list[str], **_: object) -> object:
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in command[2:])
        said[flags["run"]] = {name: flags[name] for name in flags if name in OF_OPTIMIZERS}
        metrics = tmp_path / "base" / "runs" / flags["run"] / "metrics.jsonl"
        metrics.parent.mkdir(parents=True)
        metrics.write_text('{"val/bpb": 1.5}\n')
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(optimizers.subprocess, "run", run)
    assert optimizers.main(["--out", str(tmp_path), "--seeds", "1", "--rates", "0.001", "--decays", "0.1"]) == 0
    swept = [run for run in read_results(tmp_path / "runs.jsonl") if run.optimizer == "adamw"]
    muon = {"matrix-optimizer": "muon", "matrix-lr": "0.02"}
    assert said == {
        **{run.tag: {"matrix-optimizer": "adamw", "matrix-lr": f"{run.matrix_lr}"} for run in swept},
        "muon-0.02-1": muon | {"normuon": "false", "matrix-weight-decay": "0.0"},
        "normuon-0.02-1": muon | {"normuon": "true", "matrix-weight-decay": "0.0"},
        "cautious-0.02-0.1-1": muon | {"normuon": "false", "matrix-weight-decay": "0.1"},
        "both-0.02-0.1-1": muon | {"normuon": "true", "matrix-weight-decay": "0.1"},
    }


def test_options_are_compared_with_muon_seed_by_seed(capsys: pytest.CaptureFixture[str]) -> None:
    """Seeds differ by a whole bit, the option by a tenth, and not the same tenth."""
    bits = {1: (1.0, 0.9), 2: (2.0, 1.88), 3: (3.0, 2.92)}
    results: Results = {Run("muon", MUON_LR, seed): {"val_bpb": muon} for seed, (muon, _) in bits.items()}
    results |= {Run("normuon", MUON_LR, seed): {"val_bpb": option} for seed, (_, option) in bits.items()}
    print_table(results | {Run("cautious", MUON_LR, 2, 0.1): {"val_bpb": 2.5}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert ["cautious", "0.02", "0.1", "1", "2.5000", "+0.5000"] in lines
    assert ["muon", "0.02", "0", "3", "2.0000", "1.0000"] in lines
    assert ["normuon", "0.02", "0", "3", "1.9000", "1.0101", "-0.1000", "0.0200"] in lines


def test_a_comparison_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    trained: list[Run] = []

    def train(run: Run, args: object) -> dict[str, object]:
        if len(trained) == 2:
            raise SystemExit("error: broken off")
        trained.append(run)
        return run._asdict() | {"val_bpb": 1.0 + run.matrix_lr * run.seed}

    monkeypatch.setattr(optimizers, "train", train)
    command = ["--out", str(tmp_path), "--only", "muon"]
    with pytest.raises(SystemExit, match="broken off"):
        optimizers.main(command)
    assert set(read_results(tmp_path / "runs.jsonl")) == set(trained)
    trained[:] = trained[:1]  # what was trained before does not count against this half
    assert optimizers.main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == SEEDS
    assert "1.0400   0.0200" in capsys.readouterr().out  # mean and sample deviation of 1.02, 1.04, 1.06


def test_one_seed_has_no_deviation(capsys) -> None:
    print_table({Run("muon", 0.02, 1): {"val_bpb": 1.25}})
    assert capsys.readouterr().out.splitlines()[-1].split() == ["muon", "0.02", "0", "1", "1.2500"]


def test_the_last_validation_counts(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 0, "val/bpb": 3.0}\n{"step": 1}\n{"step": 2, "val/bpb": 2.0}\n{"step": 3}\n')
    assert optimizers.last_bpb(metrics) == 2.0
