"""The one dial: what follows from a depth, and what a person may set instead."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vibechat.scaling import FINAL_LR_MULTIPLIER, Plan, model_config, plan


def test_depth_20_and_26_are_the_published_models() -> None:
    d20, d26 = plan(20), plan(26)
    assert (d20.num_params, d20.num_iterations) == (560_988_160, 21_400)
    assert d20.tokens == pytest.approx(11.2e9, rel=2e-3)
    assert (d26.model_config.n_embd, d26.model_config.n_head, d26.num_params) == (1664, 13, 1_081_999_360)
    assert d20.embedding_lr == pytest.approx(0.2 * (1280 / 768) ** -0.5)


@given(depth=st.integers(1, 64))
def test_every_depth_is_whole_heads_of_128(depth: int) -> None:
    config = model_config(depth, 64, 300)
    assert config.head_dim == 128
    assert 64 * depth <= config.n_embd < 64 * depth + 128


def test_kv_groups_share_heads() -> None:
    assert model_config(8, 64, 300, kv_group=4).n_kv_head == 1


def test_the_length_is_what_was_asked_for_first() -> None:
    small = {"sequence_len": 64, "vocab_size": 300, "total_batch_size": 1024}
    assert plan(2, **small, num_iterations=7, target_flops=1e12).num_iterations == 7
    by_flops = plan(2, **small, target_flops=1e12)
    assert by_flops.tokens * by_flops.flops_per_token == pytest.approx(1e12, rel=0.01)
    by_ratio = plan(2, **small, target_param_data_ratio=3)
    assert by_ratio.tokens == pytest.approx(3 * by_ratio.num_params, rel=0.01)
    assert plan(2, **small, target_flops=1).num_iterations == 1


@given(iterations=st.integers(1, 5000))
def test_the_schedule_rises_stays_and_falls(iterations: int) -> None:
    run = plan(1, sequence_len=8, vocab_size=16, total_batch_size=8, num_iterations=iterations)
    rates = [run.lr_multiplier(step) for step in range(iterations)]
    assert all(FINAL_LR_MULTIPLIER < rate <= 1 for rate in rates)
    assert max(rates) == 1
    top = rates.index(1)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    momenta = [run.muon_momentum(step) for step in range(iterations)]
    assert momenta == sorted(momenta)
    assert all(0.85 <= momentum <= 0.95 for momentum in momenta)


def test_every_number_is_printed_with_its_formula() -> None:
    run = plan(26)
    table = str(run)
    assert all(name and value and formula for name, value, formula in run.rows())
    assert "1,081,999,360" in table
    assert "20 tokens per parameter" in table
    assert {name for name, _, _ in run.rows()} == run.formulas.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth=0"),
        ({"total_batch_size": 0}, "total_batch_size=0"),
        ({"target_param_data_ratio": -1}, "one of num_iterations"),
    ],
)
def test_no_run_comes_of_nonsense(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**({"depth": 2} | arguments))  # type: ignore[arg-type]


def test_a_plan_is_a_value() -> None:
    assert plan(4) == plan(4)
    assert isinstance(plan(4), Plan)
