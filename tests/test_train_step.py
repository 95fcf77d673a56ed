"""The training step on the real model with its real optimizers, compiled and not."""

import functools
import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from vibechat.gpt import GPT, GPTConfig
from vibechat.loss_eval import evaluate_bpb
from vibechat.train_step import MicroBatch, TrainStep, optimizer_data

CONFIG = GPTConfig(sequence_len=16, vocab_size=67, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
POISONED = 66  # a token that `batch` never draws


def batch(seed: int) -> MicroBatch:
    tokens = torch.randint(POISONED, (2, CONFIG.sequence_len + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def make_step(*, compile: bool = False) -> tuple[GPT, TrainStep]:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    model.init_weights()
    return model, TrainStep(model, model.setup_optimizers(), compile=compile)


@pytest.fixture
def without_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile captures graphs and runs them as they are, which is what takes seconds and not minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()


def everything(model: GPT, step: TrainStep) -> list[Tensor]:
    """Parameters and optimizer states."""
    states = optimizer_data(model, step.optimizers)
    tensors = [*model.parameters(), *(value for state in states.values() for value in state.values())]
    return [tensor.detach().clone() for tensor in tensors]


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_touches_nothing(without_code_generation: None, compile: bool, poison: float) -> None:
    """A token whose embedding is not finite makes the loss of each batch that holds it not finite."""
    model, step = make_step(compile=compile)
    model.transformer.wte.weight.data[POISONED] = poison
    assert step([batch(0), batch(1)])[2].item() == 0
    model.transformer.wte.weight.data[POISONED] = poison  # weight decay or momentum may have moved it
    before = everything(model, step)
    inputs, targets = batch(2)
    inputs[0, 3] = POISONED
    loss, _, suppressed = step([batch(3), (inputs, targets)]).tolist()
    assert not math.isfinite(loss)
    assert suppressed == 1
    for was, now in zip(before, everything(model, step), strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)
    assert step([batch(4), batch(5)])[2].item() == 0
    assert any(not torch.equal(was, now) for was, now in zip(before, everything(model, step), strict=True))


def test_evaluation_and_samples_do_not_recompile_the_training_graph(without_code_generation: None) -> None:
    model, step = make_step(compile=True)
    token_bytes = torch.ones(CONFIG.vocab_size, dtype=torch.int32)
    step([batch(0)])
    captured = counters["stats"]["unique_graphs"]
    assert captured >= 1
    for seed in (1, 2):
        assert math.isfinite(evaluate_bpb(model, iter([batch(seed), batch(seed + 10)]), 2, token_bytes))
        assert len(list(model.generate([1, 2, 3], 30, seed=seed))) == 30
        step([batch(seed + 20)], 0.5, 0.9)
    assert counters["stats"]["unique_graphs"] == captured
    assert step.compiled
