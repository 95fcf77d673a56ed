"""The step as a whole: one graph, no wait for the device, and activation checkpointing that changes no number."""

import functools
import gc
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import fill_projections
from vibechat.gpt import GPT, GPTConfig
from vibechat.train_step import MicroBatch, TrainStep
from vibechat.trainer import Hooks, Rates, Trainer

CONFIG = GPTConfig(sequence_len=16, vocab_size=67, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
READS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal", "aten::unique")


def batches() -> Iterator[MicroBatch]:
    for seed in itertools.count():
        tokens = torch.randint(67, (2, 17), generator=torch.Generator().manual_seed(seed))
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def make_step(*, checkpointing: bool = False, **kwargs: Any) -> tuple[GPT, TrainStep]:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    model.init_weights()
    fill_projections(model, 0.1)
    model.activation_checkpointing = checkpointing
    return model, TrainStep(model, model.setup_optimizers(), **kwargs)


class CountReads(TorchDispatchMode):
    """Counts operators that bring a number from the device to the host, which waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in READS:
            self.reads.append(func._schema.name)
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------------------------------
# host synchronization


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_brings_no_number_to_the_host(grad_clip: float, checkpointing: bool) -> None:
    """On the meta device, which takes every path that a GPU takes and has no numbers to give."""
    with torch.device("meta"):
        model = GPT(CONFIG)
    model.set_compute_dtype(torch.bfloat16)
    model.activation_checkpointing = checkpointing
    step = TrainStep(model, model.setup_optimizers(), grad_clip=grad_clip)
    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    with CountReads() as count:
        for multiplier in (0.5, 0.4):
            numbers = step([(ids, ids), (ids, ids)], multiplier, 0.9)
    assert numbers.shape == (3,)
    assert count.reads == []


def test_the_count_sees_what_it_should() -> None:
    with CountReads() as count:
        x = torch.ones(3)
        if x.sum() > 2:
            x.sum().item()
        x.nonzero()
        torch.equal(x, x)
    assert len(count.reads) >= 4
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(1, device="meta").item()


def test_the_loop_reads_a_step_when_the_next_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and found-inf flag of step s are read after step s + 1 has been queued, and that is all that is read."""
    _, step = make_step()
    queued: list[int] = []
    real = TrainStep.__call__

    def call(self: TrainStep, *args: Any) -> Tensor:
        queued.append(len(queued))
        return real(self, *args)

    monkeypatch.setattr(TrainStep, "__call__", call)
    reported: list[tuple[int, int]] = []
    trainer = Trainer(
        step,
        batches(),
        micro_batches=1,
        num_iterations=4,
        rates=Rates(32),
        hooks=Hooks(log=lambda record: reported.append((record["step"], queued[-1]))),
    )
    for _ in range(4):
        trainer.step()
    trainer.finish()
    assert reported == [(0, 1), (1, 2), (2, 3), (3, 3)]


def test_the_collector_of_garbage_rests_while_it_trains() -> None:
    _, step = make_step()
    seen: list[tuple[bool, int]] = []

    def watched() -> Iterator[MicroBatch]:
        for batch in batches():
            seen.append((gc.isenabled(), gc.get_freeze_count()))
            yield batch

    frozen = gc.get_freeze_count()
    trainer = Trainer(step, watched(), micro_batches=1, num_iterations=3, rates=Rates(32))
    assert gc.isenabled()
    trainer.train()
    assert gc.isenabled()
    assert [enabled for enabled, _ in seen] == [False, False, False]
    assert seen[0][1] == frozen
    assert seen[1][1] > 10_000  # what the first step left is never looked at again
    assert gc.get_freeze_count() == 0


# ---------------------------------------------------------------------------------------------------------------------
# one graph


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_compiled_step_is_one_graph_without_a_break(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    _, step = make_step(compile=True, checkpointing=checkpointing, say=lambda text: None)
    source = batches()
    for multiplier in (1.0, 0.5, 0.2):
        step([next(source), next(source)], multiplier, 0.9)
    assert step.compiled
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1  # and nothing compiled anew when a rate changed


def test_a_break_would_be_counted() -> None:
    torch._dynamo.reset()
    counters.clear()

    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    torch.compile(broken, backend="eager")(torch.ones(1))
    assert counters["graph_break"]


# ---------------------------------------------------------------------------------------------------------------------
# activation checkpointing, CUDA graphs' way of keeping gradients


def trained(steps: int = 3, **kwargs: Any) -> list[Tensor]:
    model, step = make_step(say=lambda text: None, **kwargs)
    source = batches()
    results = [step([next(source), next(source)], 1.0, 0.9) for _ in range(steps)]
    return [*results, *(p.detach().clone() for p in model.parameters())]


@pytest.mark.parametrize("compile", [False, True])
def test_checkpointing_changes_no_bit(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    for mine, other in zip(trained(checkpointing=True, compile=compile), trained(compile=compile), strict=True):
        assert torch.equal(mine, other)


def test_checkpointing_is_of_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make_step(checkpointing=True)
    monkeypatch.setattr("vibechat.gpt.checkpoint", lambda *args, **kwargs: pytest.fail("checkpointed"))
    inputs, targets = next(batches())
    with torch.no_grad():
        assert model(inputs, targets).isfinite()
    assert len(list(model.generate([1, 2], 3))) == 3


def test_gradients_that_keep_their_memory_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA graphs need them: the buffers of one step are those of the next."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    plain = trained()
    for mine, other in zip(trained(compile=True, cuda_graphs=True), plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    _, step = make_step(compile=True, cuda_graphs=True, say=lambda text: None)
    source = batches()
    step([next(source)])
    buffers = [p.grad.data_ptr() for p in step.parameters if p.grad is not None]
    assert len(buffers) == len(step.parameters)
    assert all(not p.grad.any() for p in step.parameters if p.grad is not None)
    step([next(source)])
    assert [p.grad.data_ptr() for p in step.parameters if p.grad is not None] == buffers


def test_a_trial_leaves_nothing_behind() -> None:
    model, step = make_step()
    before = [p.detach().clone() for p in model.parameters()]
    assert step.fits(2, 16)
    assert all(p.grad is None for p in step.parameters)
    assert all(torch.equal(was, p) for was, p in zip(before, model.parameters(), strict=True))
