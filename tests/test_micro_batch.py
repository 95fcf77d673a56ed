"""--device-batch-size auto: the memory model in numbers, and the trial that has the last word."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vibechat import micro_batch
from vibechat.common import UserError
from vibechat.gpt import GPT, GPTConfig
from vibechat.micro_batch import check_memory, free_bytes, largest_micro_batch, predicted_micro_batch, row_bytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(GPTConfig(16, 32, 2, 1, 1, 16))
    model.init_weights()
    return model


def test_the_model_in_numbers() -> None:
    d26 = GPTConfig(2048, 65_536, 26, 13, 13, 1664)
    assert row_bytes(d26, 2) == 2048 * 26 * 20 * 1664 * 2
    assert 3 < row_bytes(d26, 2) / 2**30 < 4  # GiB: 32 rows beside 18 GiB of parameters and states fill an H200


@given(rows=st.integers(1, 1000), free=st.none() | st.integers(0, 10**9))
def test_a_prediction_is_a_power_of_two_that_fits(model: GPT, rows: int, free: int | None) -> None:
    size = predicted_micro_batch(model, rows, free)
    assert 1 <= size <= rows
    assert size & (size - 1) == 0
    if free is not None and size > 1:
        assert size * row_bytes(model.config, 2) <= free
    if free is None:
        assert 2 * size > rows


def test_more_memory_never_means_fewer_rows(model: GPT) -> None:
    sizes = [predicted_micro_batch(model, 64, free) for free in range(0, 10**7, 50_000)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (1, 64)


def test_on_a_cpu(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    assert largest_micro_batch(model, 100, CPU) == 8
    assert largest_micro_batch(model, 3, CPU) == 2
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: 0)
    assert largest_micro_batch(model, 100, CPU) == 1
    found = free_bytes(CPU)
    assert found is None or found > 1 << 20


def test_a_model_that_is_too_large_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: 12_000)
    check_memory(1000, CPU)
    with pytest.raises(UserError, match=r"1,001 parameters need .* on cpu: choose a smaller --depth"):
        check_memory(1001, CPU)
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: None)
    check_memory(10**15, CPU)


@pytest.mark.parametrize("most", [0, 1, 5, 64])
def test_the_trial_halves_until_it_fits(model: GPT, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """As on a GPU that has room for `most` rows, whatever the memory model thought."""
    tried: list[int] = []
    real = model.forward

    def forward(idx: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        tried.append(idx.size(0))
        if idx.size(0) > most:
            raise torch.OutOfMemoryError
        return real(idx, *args, **kwargs)

    fits = micro_batch._fits
    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: 1 << 40)
    monkeypatch.setattr(micro_batch, "_fits", lambda model, rows, device: fits(model, rows, CPU))
    before = [p.detach().clone() for p in model.parameters()]
    if most == 0:
        with pytest.raises(UserError, match="not even one row"):
            largest_micro_batch(model, 64, CUDA)
        assert tried == [64, 32, 16, 8, 4, 2, 1]
    else:
        assert largest_micro_batch(model, 64, CUDA) == {1: 1, 5: 4, 64: 64}[most]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
