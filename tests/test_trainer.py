"""The step and the loop, on models small enough to check by hand: accumulation, found-inf, signals, schedules."""

import itertools
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vibechat.common import UserError, compile_obstacle
from vibechat.train_step import MicroBatch, PhaseClock, TrainStep, load_optimizer_data, optimizer_data
from vibechat.trainer import Every, Hooks, NonFiniteError, Rates, Trainer, measure_matmul_flops, memory_bytes

VOCABULARY, CPU = 11, torch.device("cpu")


class Bigram(torch.nn.Module):
    """The smallest language model: next-token logits are a row of a table."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))
        self.poison = 0.0

    def forward(self, inputs: Tensor, targets: Tensor, loss_reduction: str = "mean") -> Tensor:
        logits = self.table[inputs]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=loss_reduction)
        return loss + self.poison * self.table.sum()


class Descent:
    """Gradient descent with momentum under the contract of our optimizers."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float = 1.0) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": parameters, "lr": lr, "initial_lr": lr, "momentum": 0.5}]
        self.state: dict[Any, Any] = {p: {"buffer": torch.zeros_like(p), "count": torch.zeros(())} for p in parameters}
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        assert self.found_inf is not None
        keep = self.found_inf.bool()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                buffer = group["momentum"] * state["buffer"] + p.grad
                state["buffer"].copy_(torch.where(keep, state["buffer"], buffer))
                state["count"] += ~keep
                p.copy_(torch.where(keep, p, p - group["lr"] * buffer))


def make_step(**kwargs: Any) -> tuple[Bigram, Descent, TrainStep]:
    model = Bigram()
    optimizer = Descent(list(model.parameters()))
    return model, optimizer, TrainStep(model, [optimizer], **kwargs)


def rows(count: int, seed: int = 0, ignored: float = 0.0) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randint(0, VOCABULARY, (2, count, 6), generator=generator)
    return inputs, targets.masked_fill(torch.rand(count, 6, generator=generator) < ignored, -1)


def endless() -> Iterator[MicroBatch]:
    return (rows(2, seed) for seed in itertools.count())


def make_trainer(**kwargs: Any) -> tuple[Bigram, Trainer, list[dict[str, Any]]]:
    model, _, train_step = make_step(**{key: kwargs.pop(key) for key in ("grad_clip", "say") if key in kwargs})
    records: list[dict[str, Any]] = []
    hooks = kwargs.pop("hooks", Hooks())
    hooks.log = records.append
    kwargs = {"micro_batches": 2, "num_iterations": 5, "rates": Rates(tokens_per_step=24), **kwargs}
    return model, Trainer(train_step, kwargs.pop("batches", endless()), hooks=hooks, **kwargs), records


# ---------------------------------------------------------------------------------------------------------------------
# the step


def test_accumulated_micro_batches_equal_one_large_batch() -> None:
    """Also where targets are ignored unevenly, which a mean over micro-batches of means gets wrong."""
    batch = rows(8, ignored=0.4)
    results = []
    for sizes in ([8], [4, 4], [1, 2, 5], [1] * 8):
        model, _, train_step = make_step()
        parts = list(zip(batch[0].split(sizes), batch[1].split(sizes), strict=True))
        for _ in range(3):
            loss, norm, suppressed = train_step(parts, 0.3, 0.9).tolist()
        results.append((loss, norm, model.table.detach().clone()))
        assert suppressed == 0
    for loss, norm, table in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert norm == pytest.approx(results[0][1], rel=1e-5)
        torch.testing.assert_close(table, results[0][2], rtol=1e-5, atol=1e-6)


def test_the_loss_is_mean_nats_over_the_targets_that_count() -> None:
    model, _, train_step = make_step()
    inputs, targets = rows(5, ignored=0.5)
    expected = model(inputs, targets, loss_reduction="mean").item()
    assert train_step([(inputs, targets)])[0].item() == pytest.approx(expected, rel=1e-6)


def test_a_padded_micro_batch_counts_nothing() -> None:
    batch = rows(4)
    padding = (torch.zeros_like(batch[0]), torch.full_like(batch[1], -1))
    tables = []
    for parts in ([batch], [batch, padding]):
        model, _, train_step = make_step()
        train_step(parts)
        tables.append(model.table.detach())
    assert torch.equal(*tables)


def test_schedules_reach_the_groups() -> None:
    _, optimizer, train_step = make_step()
    train_step([rows(2)], 0.25, 0.75)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.25, 0.75)
    train_step([rows(2)], 0.5)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.5, 0.75)


@pytest.mark.parametrize("clip", [0.01, 1e9])
def test_gradient_clipping(clip: float) -> None:
    model, _, train_step = make_step(grad_clip=clip)
    plain, _, plain_step = make_step()
    before = model.table.detach().clone()
    norm = train_step([rows(2)])[1].item()
    assert norm == pytest.approx(plain_step([rows(2)])[1].item())  # what is reported is the norm before clipping
    update, plain_update = model.table.detach() - before, plain.table.detach() - before
    torch.testing.assert_close(update, plain_update * min(1.0, clip / norm), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_a_non_finite_step_touches_nothing(poison: float) -> None:
    model, optimizer, train_step = make_step(grad_clip=1.0)
    train_step([rows(2)])
    before = [model.table.detach().clone(), *(value.clone() for value in optimizer.state[model.table].values())]
    model.poison = poison
    assert train_step([rows(2)])[2].item() == 1
    model.poison = 0.0
    after = [model.table.detach(), *optimizer.state[model.table].values()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert train_step([rows(2)])[2].item() == 0  # the flag is of the step, not of the run
    assert not torch.equal(model.table, before[0])


def test_a_compiler_that_fails_costs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(function: Callable[..., Tensor], **kwargs: Any) -> Callable[..., Tensor]:
        def fail(*args: Any) -> Tensor:
            function(*args).backward()  # what a failure in the backward leaves behind
            raise RuntimeError("\n  no such compiler: g++\nlong story")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    lines: list[str] = []
    model, _, train_step = make_step(compile=True, say=lines.append)
    eager, _, eager_step = make_step()
    for _ in range(2):
        assert torch.equal(train_step([rows(2)]), eager_step([rows(2)]))
    assert torch.equal(model.table, eager.table)
    assert lines[0].startswith("compiling the model")
    assert lines[1:] == [
        "torch.compile failed, training goes on without it: RuntimeError: no such compiler: g++",
    ]
    assert not train_step.compiled
    with pytest.raises(RuntimeError, match="no such compiler"):
        make_step(compile=True, must_compile=True, say=lines.append)[2]([rows(2)])


def test_phases_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(now)) ** 2)
    clock = PhaseClock(CPU)
    clock.start()
    for phase in ("data", "forward+backward", "data", "optimizer"):
        clock.mark(phase)
    assert clock.seconds == {"data": 3 + 7, "forward+backward": 5, "optimizer": 9}
    assert clock.total == 24


def test_optimizer_state_goes_by_parameter_name() -> None:
    model, optimizer, train_step = make_step()
    train_step([rows(2)])
    saved = {
        name: {k: v.clone() for k, v in state.items()} for name, state in optimizer_data(model, [optimizer]).items()
    }
    assert saved.keys() == {"table"}
    other, fresh, _ = make_step()
    load_optimizer_data(other, [fresh], saved)
    assert all(torch.equal(fresh.state[other.table][key], value) for key, value in saved["table"].items())
    for wrong in ({}, {"table": {}}, {"table": {**saved["table"], "buffer": torch.zeros(1)}}, {**saved, "more": {}}):
        if wrong.keys() == {"table", "more"}:
            wrong["more"] = {"x": torch.zeros(1)}
        with pytest.raises(UserError, match="optimizer state of"):
            load_optimizer_data(other, [fresh], wrong)


# ---------------------------------------------------------------------------------------------------------------------
# the loop


def test_records_hold_one_line_a_step_in_order() -> None:
    _, trainer, records = make_trainer(
        rates=Rates(24, flops_per_token=10.0, flops_per_token_full=20.0, peak_flops=1e6),
        lr_multiplier=lambda s: 1 / (s + 1),
    )
    assert trainer.train() == 0
    assert [record["step"] for record in records] == list(range(5))
    assert [record["train/lr_multiplier"] for record in records] == [1 / (s + 1) for s in range(5)]
    for record in records:
        assert record["train/mfu_full"] == pytest.approx(2 * record["train/mfu"])
        assert record["train/mfu"] == pytest.approx(record["train/tok_per_sec"] * 10 / 1e6)
        assert record["train/tok_per_sec"] == pytest.approx(24 / record["train/step_seconds"])
        assert 0 <= record["train/data_wait"] <= 1
        assert record["train/memory_bytes"] > 1 << 20
    assert records[0]["train/loss"] > records[-1]["train/loss"] > 0


def test_a_step_is_reported_while_the_next_is_under_way() -> None:
    _, trainer, records = make_trainer()
    trainer.step()
    assert records == []
    trainer.step()
    assert [record["step"] for record in records] == [0]
    trainer.finish()
    trainer.finish()
    assert [record["step"] for record in records] == [0, 1]


def test_what_happens_between_steps() -> None:
    seen: list[tuple[str, int]] = []

    def evaluate(step: int) -> float:
        seen.append(("evaluate", step))
        return 10.0 + step

    def save(step: int) -> Path:
        seen.append(("save", step))
        return Path(str(step))

    hooks = Hooks(evaluate=evaluate, save=save, sample=lambda step: seen.append(("sample", step)))
    _, trainer, records = make_trainer(hooks=hooks, every=Every(evaluate=2, sample=3, save=2))
    trainer.train()
    assert seen == [
        ("evaluate", 0),
        ("save", 2),
        ("evaluate", 2),
        ("sample", 3),
        ("save", 4),
        ("evaluate", 4),
        ("save", 5),
        ("evaluate", 5),
        ("sample", 5),
    ]
    assert {r["step"]: r["val/bpb"] for r in records if "val/bpb" in r} == {0: 10.0, 2: 12.0, 4: 14.0, 5: 15.0}
    assert records[-1] == {"step": 5, "val/bpb": 15.0}
    assert trainer.last_checkpoint == Path("5")


def test_minus_one_turns_a_periodic_thing_off_and_the_end_is_still_saved() -> None:
    seen: list[int] = []
    hooks = Hooks(save=lambda step: seen.append(step) or Path("x"), evaluate=lambda step: pytest.fail("evaluated"))
    make_trainer(hooks=hooks)[1].train()
    assert seen == [5]


def test_a_finished_run_that_is_continued_saves_nothing_again() -> None:
    hooks = Hooks(save=lambda step: pytest.fail("saved"), evaluate=lambda step: 1.5)
    _, trainer, records = make_trainer(
        hooks=hooks, start=5, last_checkpoint=Path("step_000005"), every=Every(evaluate=100, save=1)
    )
    assert trainer.train() == 0
    assert records == [{"step": 5, "val/bpb": 1.5}]


def test_a_continued_run_equals_an_uninterrupted_one_bitwise() -> None:
    model, whole, records = make_trainer()
    whole.train()
    first, half, records_a = make_trainer(num_iterations=3)
    half.train()
    second, rest, records_b = make_trainer(start=3, batches=itertools.islice(endless(), 6, None))
    second.load_state_dict(first.state_dict())
    load_optimizer_data(second, rest.train_step.optimizers, optimizer_data(first, half.train_step.optimizers))
    rest.train()
    assert torch.equal(model.table, second.table)
    assert [r["train/loss"] for r in records] == [r["train/loss"] for r in records_a + records_b]


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_non_finite_loss_stops_the_run(at: int) -> None:
    """One step late, naming step, rank and the last good checkpoint, and without saving what came after."""
    saved: dict[int, Tensor] = {}

    def batches() -> Iterator[MicroBatch]:
        for step in itertools.count():
            model.poison = math.nan if step == at else 0.0
            if step == at:
                saved[-1] = model.table.detach().clone()
            yield rows(2, step)

    def save(step: int) -> Path:
        saved[step] = model.table.detach().clone()
        return Path(f"step_{step:06d}")

    model, trainer, records = make_trainer(
        batches=batches(), micro_batches=1, hooks=Hooks(save=save), every=Every(save=2)
    )
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    message = str(caught.value)
    assert f"step {at}, rank 0: loss nan" in message
    last = at - at % 2
    assert f"last good checkpoint is step_{last:06d}" in message if last else "none was saved yet" in message
    assert max(saved) == (last or -1)
    assert [r["step"] for r in records] == list(range(at))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(number: signal.Signals, status: int) -> None:
    saved: list[int] = []
    lines: list[str] = []

    def batches() -> Iterator[MicroBatch]:
        for step in itertools.count():
            if step == 2:
                os.kill(os.getpid(), number)
            yield rows(2, step)

    hooks = Hooks(
        save=lambda step: saved.append(step) or Path("x"), evaluate=lambda s: pytest.fail("no"), say=lines.append
    )
    _, trainer, records = make_trainer(batches=batches(), micro_batches=1, hooks=hooks)
    before = signal.getsignal(number)
    assert trainer.train() == status
    assert signal.getsignal(number) is before
    assert saved == [3]  # the step under way was finished
    assert [r["step"] for r in records] == [0, 1, 2]
    assert "stopped after 3 of 5 steps" in lines[-1]


def test_a_second_ctrl_c_interrupts() -> None:
    def batches() -> Iterator[MicroBatch]:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        yield rows(2)

    _, trainer, _ = make_trainer(batches=batches(), micro_batches=1)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_a_save_that_fails_on_the_way_is_a_warning_and_at_the_end_an_error() -> None:
    lines: list[str] = []

    def save(step: int) -> Path:
        raise UserError("the disk is full")

    _, trainer, records = make_trainer(hooks=Hooks(save=save, say=lines.append), every=Every(save=2))
    with pytest.raises(UserError, match="the disk is full"):
        trainer.train()
    assert len(lines) == 2
    assert "training goes on" in lines[0]
    assert len(records) == 5


def test_what_torch_compile_lacks_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    assert "no C++ compiler was found" in (compile_obstacle("cpu") or "")
    compiler = tmp_path / "compiler"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", f"{compiler} --fast")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    assert "headers are missing" in (compile_obstacle("cpu") or "")
    (tmp_path / "Python.h").touch()
    assert compile_obstacle("cpu") is None
    assert "untested" in (compile_obstacle("mps") or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "Triton is missing" in (compile_obstacle("cuda") or "")


def test_memory_and_matmul_rate_are_plausible() -> None:
    assert 1 << 20 < memory_bytes(CPU) < 1 << 40
    assert measure_matmul_flops(CPU, torch.float32, size=64, seconds=0.0) > 1e6
