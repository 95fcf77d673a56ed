"""The benchmark of casting weights once a step: the two steps that it compares differ in that alone."""

import pytest
import torch

from bench import casts
from vibechat.train_step import MicroBatch, TrainStep

TINY = ["--depth", "1", "--max-seq-len", "16", "--vocab-size", "64", "--device-batch-size", "2", "--no-compile"]


def test_both_take_the_same_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VIBECHAT_DTYPE", "bfloat16")
    losses: dict[type, list[float]] = {TrainStep: [], casts.CastAtEveryUse: []}
    made: dict[type, set[bool]] = {TrainStep: set(), casts.CastAtEveryUse: set()}
    real = TrainStep._accumulate

    def accumulate(self: TrainStep, micro_batches: list[MicroBatch]) -> torch.Tensor:
        loss = real(self, micro_batches)
        losses[type(self)].append(float(loss))
        made[type(self)].add(self._working is None)
        return loss

    monkeypatch.setattr(TrainStep, "_accumulate", accumulate)
    assert casts.main([*TINY, "--micro-batches", "2", "--rounds", "3"]) == 0
    assert losses[TrainStep] == pytest.approx(losses[casts.CastAtEveryUse], rel=1e-2)
    assert made == {TrainStep: {False}, casts.CastAtEveryUse: {True}}
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("2 micro-batches: once ")
    assert sum(line.startswith("round ") for line in said) == 3
