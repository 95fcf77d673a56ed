"""The benchmark of activation checkpointing: it counts what autograd keeps, and its two steps are of one model."""

import re

import pytest
import torch

from bench import checkpointing, turns
from vibechat.memory_plan import memory_plan
from vibechat.scaling import model_config
from vibechat.train_step import MicroBatch, TrainStep

TINY = ["--max-seq-len", "64", "--vocab-size", "256", "--device-batch-size", "2", "--no-compile"]


def test_it_counts_what_one_more_layer_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """With checkpointing two inputs a layer, as the plan has it; without many times as much."""
    monkeypatch.setenv("VIBECHAT_DTYPE", "bfloat16")
    kept: dict[bool, list[int]] = {}
    for wanted in (True, False):
        for depth in (2, 1):  # both are 128 channels wide
            args = turns.parser("", "", 1).parse_args([*TINY, "--depth", str(depth)])
            step = turns.make_step(args, checkpointing=wanted)
            kept.setdefault(wanted, []).append(checkpointing.kept_bytes(step, turns.random_rows(args)[0]))
            assert all(p.grad is None for p in step.parameters)
    layers = {wanted: two - one for wanted, (two, one) in kept.items()}
    name = "activations kept for the backward"
    plans = [memory_plan(model_config(depth, 64, 256), 2, "eager", checkpointing=True) for depth in (2, 1)]
    assert layers[True] == pytest.approx(plans[0].parts[name] - plans[1].parts[name], rel=0.02)
    assert layers[False] > 5 * layers[True]


def test_both_take_the_same_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    losses: dict[bool, list[float]] = {True: [], False: []}
    real = TrainStep._accumulate

    def accumulate(self: TrainStep, micro_batches: list[MicroBatch]) -> torch.Tensor:
        loss = real(self, micro_batches)
        losses[bool(self.model.activation_checkpointing)].append(float(loss))
        return loss

    monkeypatch.setattr(TrainStep, "_accumulate", accumulate)
    assert checkpointing.main([*TINY, "--depth", "1", "--rounds", "2"]) == 0
    assert losses[True] == losses[False]
    assert len(losses[True]) == 3 + 2
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"1 micro-batches: without .* ms a step, with .* ms a step, ratio .*", said[-2])
    without, kept, _ = map(float, re.findall(r"\d+\.\d+", said[-1]))
    assert said[-1].startswith("kept for the backward of a micro-batch: without ")
    assert kept < without
