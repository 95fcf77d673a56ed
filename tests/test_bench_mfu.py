"""The training benchmark: its arithmetic on recorded runs, and a real run small enough for a test."""

import json
from typing import Any

import pytest

from bench import mfu, plain_gpt

TINY = ["--depth", "1", "--max-seq-len", "16", "--vocab-size", "300", "--device-batch-size", "2", "--device", "cpu"]


def recorded(seconds: float, **more: Any) -> dict[str, Any]:
    phases = {"data": 0.1 * seconds, "forward+backward": 0.8 * seconds, "optimizer": 0.1 * seconds}
    flops = {"flops_per_token": 100, "flops_per_token_full": 200, "peak_flops": 64_000.0, "dtype": "float32"}
    return {"seconds": seconds, "mean_seconds": seconds, "phases": phases, "memory_bytes": 2**30, **flops, **more}


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds: dict[str, list[float]], *flags: str
) -> tuple[int, str]:
    queues = {name: iter(values) for name, values in seconds.items()}
    monkeypatch.setattr(mfu, "in_a_process_of_its_own", lambda name, argv: recorded(next(queues[name])))
    rounds = str(len(next(iter(seconds.values()))))
    status = mfu.main([*TINY, "--rounds", rounds, "--only", *seconds, *flags])
    return status, capsys.readouterr().out


def test_ratios_are_medians_over_rounds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"plain": [1.0, 9.0, 2.0], "vibechat": [0.5, 3.0, 1.6]}  # a slow second round falls on both
    status, output = run(monkeypatch, capsys, seconds, "--json")
    rows = json.loads(output.splitlines()[-1])["rows"]
    assert status == 0
    assert rows["vibechat"]["ratio_to_plain"] == 2.0
    assert rows["vibechat"]["tokens_per_second"] == 32 / 1.6
    assert rows["vibechat"]["mfu"] == pytest.approx(32 / 1.6 * 100 / 64_000)
    assert rows["vibechat"]["mfu_full"] == pytest.approx(2 * rows["vibechat"]["mfu"])
    assert "forward+backward" in output


@pytest.mark.parametrize(("ours", "status"), [(0.76, 0), (0.78, 1)])
def test_the_gate_holds_at_the_bar(
    ours: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, capsys, {"plain": [1.0], "vibechat": [ours]}, "--check")[0] == status


def test_a_real_run_reports_steps_whose_phases_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert mfu.main([*TINY, "--data", "synthetic", "--steps", "3", "--warmup", "1", "--worker", "eager"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sum(result["phases"].values()) == pytest.approx(result["mean_seconds"])
    assert result["seconds"] > 0
    assert result["peak_flops"] > 1e8


def test_the_baseline_is_the_same_model() -> None:
    import torch

    from vibechat.gpt import GPT
    from vibechat.scaling import model_config

    plain = plain_gpt.PlainGPT(2, 16, 300, torch.float32)
    ours = GPT(model_config(2, 16, 300))
    ours.init_weights()
    ours.set_compute_dtype(torch.float32)
    pairs = {"embed": "transformer.wte", "head": "lm_head"}
    for i in range(2):
        names = {"attention.q": "attn.c_q", "attention.k": "attn.c_k", "attention.v": "attn.c_v"}
        names |= {"attention.out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
        pairs |= {f"blocks.{i}.{theirs}": f"transformer.h.{i}.{mine}" for theirs, mine in names.items()}
    weights = ours.state_dict()
    for name in [name for name in weights if "c_proj" in name]:
        weights[name] = torch.randn_like(weights[name]) / 10
    ours.load_state_dict(weights)
    plain.load_state_dict(
        {f"{theirs}.weight": weights[f"{mine}.weight"] for theirs, mine in pairs.items()}, strict=False
    )
    tokens = torch.randint(300, (2, 17))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    torch.testing.assert_close(plain(inputs, targets), ours(inputs, targets), atol=1e-5, rtol=1e-5)


def test_a_failing_worker_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert mfu.main([*TINY, "--data", "synthetic", "--device", "cuda:7", "--only", "eager", "--rounds", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: eager failed: ")


def test_a_batch_that_does_not_divide_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mfu.main([*TINY, "--total-batch-size", "33"])
    assert "multiple of --max-seq-len" in capsys.readouterr().err
