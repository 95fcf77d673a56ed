"""bench.optimizers: which run comes next, and that a comparison which was broken off goes on."""

import json
from pathlib import Path

import pytest

from bench import optimizers
from bench.optimizers import MUON_LR, Results, Run, next_run, print_table, read_results

SEEDS = [1, 2, 3]


def played(bits: dict[float, float], only: list[str]) -> Results:
    """Every run in the order in which it is asked for; AdamW's bits depend on its rate alone."""
    results: Results = {}
    while (run := next_run(results, only, [1.0, 2.0, 4.0], SEEDS)) is not None:
        assert run not in results
        results[run] = {"val_bpb": bits.get(run.matrix_lr, 9.0) + run.seed / 100}
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
    assert capsys.readouterr().out.splitlines()[-1].split() == ["muon", "0.02", "1", "1.2500"]


def test_the_last_validation_counts(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 0, "val/bpb": 3.0}\n{"step": 1}\n{"step": 2, "val/bpb": 2.0}\n{"step": 3}\n')
    assert optimizers.last_bpb(metrics) == 2.0
