"""The prediction: it adds up, it is the field's arithmetic, and what it says of eager is what eager does."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import predict
from bench.cost_table import CountBytes
from bench.waterfall import CATEGORIES
from vibechat.gpt import GPT
from vibechat.kernels import linear_cross_entropy
from vibechat.kernels.cost import loss_cost
from vibechat.scaling import model_config

D26 = model_config(26, 2048, 65_536)


@given(st.integers(1, 30), st.integers(1, 64), st.sampled_from(predict.FORMS), st.floats(0.5, 1))
def test_a_prediction_adds_up_and_is_slower_where_matmuls_are(depth: int, rows: int, form: str, share: float) -> None:
    config = model_config(depth, 2048, 65_536)
    best, real = (predict.predict(config, rows, form, matmul_share=s) for s in (1.0, share))
    assert sum(real.parts.values()) == pytest.approx(real.seconds)
    assert all(seconds > 0 for seconds in real.parts.values())
    assert real.seconds >= best.seconds
    assert real.parts.keys() < set(CATEGORIES)
    assert real.mfu(full=True) > real.mfu()


@pytest.mark.parametrize("depth", [12, 20, 26])
def test_the_flops_are_the_models_own(depth: int) -> None:
    config = model_config(depth, 2048, 65_536)
    with torch.device("meta"):
        model = GPT(config)
    found = predict.predict(config, 4, "vibechat")
    assert found.flops_full / found.tokens == pytest.approx(model.estimate_flops(), rel=1e-3)
    assert found.flops / found.tokens == pytest.approx(model.estimate_flops(causal=True), rel=1e-3)


def test_the_roofline_of_d26_as_the_field_has_it() -> None:
    """Milliseconds at 32 rows, 788 TFLOP/s and 4.3 TB/s, worked out by others before this model was."""
    eager, ours = (predict.predict(D26, 32, form, fused_mlp=True) for form in ("eager", "vibechat"))
    default = predict.predict(D26, 32, "eager", attention="flash2")
    milliseconds = {name: 1e3 * seconds for name, seconds in ours.parts.items()}
    assert milliseconds["matmul qkv+o"] == pytest.approx(143.7, rel=0.01)
    assert milliseconds["matmul mlp"] == pytest.approx(287.4, rel=0.01)
    assert milliseconds["matmul lm_head"] == pytest.approx(54.4, rel=0.01)
    assert milliseconds["attention"] == pytest.approx(106.5, rel=0.01)
    assert 1e3 * default.parts["attention"] == pytest.approx(180.6, rel=0.01)
    assert eager.parts["attention"] == ours.parts["attention"]
    assert milliseconds["activation"] == pytest.approx(5.3, rel=0.02)
    assert 1e3 * ours.seconds == pytest.approx(628, rel=0.05)
    assert ours.mfu() == pytest.approx(0.672, rel=0.05)
    assert 1e3 * predict.predict(D26, 32, "compiled").seconds == pytest.approx(669, rel=0.05)


def test_the_bars_are_within_what_is_predicted() -> None:
    """58% causal MFU and 1.35 times eager, with matmuls at 90% of the large one; the 58% with the fused MLP alone."""
    found = {form: predict.predict(D26, 16, form, matmul_share=0.9) for form in predict.FORMS}
    assert predict.predict(D26, 16, "vibechat", matmul_share=0.9, fused_mlp=True).mfu() > 0.58
    assert found["eager"].seconds / found["vibechat"].seconds > 1.35
    assert found["compiled"].seconds / found["vibechat"].seconds > 1.0


def test_the_optimizer_is_newton_schulz_and_its_states() -> None:
    """Depth 26 at 788 TFLOP/s: 9.6 and 9.1 TFLOP with triangles, 4.3 TB/s for 864 and 218 million parameters."""
    ours, compiled = (
        predict.predict(D26, 32, form, micro_batches=1).parts["optimizer"] for form in ("vibechat", "compiled")
    )
    states = (36 * 864e6 + 32 * 218e6) / 4.3e12
    assert ours == pytest.approx(18.7e12 / 788e12 + states, rel=0.01)
    assert compiled == pytest.approx((14.4e12 + 14.4e12) / 788e12 + states, rel=0.01)


def test_what_the_loss_moves_is_counted() -> None:
    rows, width, vocabulary = 2048, 16, 4096
    x, w = (torch.empty(n, width, dtype=torch.bfloat16, device="meta").requires_grad_() for n in (rows, vocabulary))
    targets = torch.zeros(rows, dtype=torch.long, device="meta")
    with CountBytes() as counted:
        loss = linear_cross_entropy(x, w, targets)
        torch.autograd.grad(loss, (x, w))
    assert counted.total / (rows * vocabulary) == pytest.approx(predict.LOGIT_BYTES["eager"] + 6, rel=0.05)
    ours = loss_cost(65_536, 1664, 65_536, 2, training=True).bytes / 65_536**2
    assert ours == pytest.approx(predict.LOGIT_BYTES["vibechat"] + 6, rel=0.05)


def test_the_fused_mlp_is_vibechats_alone() -> None:
    both = {
        form: [predict.predict(D26, 16, form, fused_mlp=fused) for fused in (False, True)] for form in predict.FORMS
    }
    changed = {form: plain.seconds != fused.seconds for form, (plain, fused) in both.items()}
    assert changed == {"eager": False, "compiled": False, "vibechat": True}


def test_it_prints_waterfalls_of_d12_d20_and_d26_that_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main([]) == 0
    tables = capsys.readouterr().out.split("\n\n")[1:]
    assert [table.split(",")[0] for table in tables] == ["d12", "d20", "d26"]
    for table in tables:
        lines = table.splitlines()[2:]
        rows = {line[:28].strip(): [float(x.rstrip("%").replace(",", "")) for x in line[28:].split()] for line in lines}
        parts = [numbers for name, numbers in rows.items() if name in CATEGORIES]
        assert len(parts) == 10
        for summed, said in zip(zip(*parts, strict=True), rows["the micro-step"], strict=True):
            assert sum(summed) == pytest.approx(said, abs=0.6)  # each is rounded to a tenth
        assert all(0 < share < 100 for share in rows["MFU, causal"] + rows["MFU, full"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--depths", "12", "0"], "must be positive"),
        (["--rows", "-1"], "must be positive"),
        (["--ceilings", "no such file"], "--ceilings no such file: not what bench.ceilings writes"),
        (["--ceilings", __file__], "not what bench.ceilings writes"),
    ],
)
def test_what_is_no_prediction(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        predict.main(flags)
    assert words in capsys.readouterr().err


def test_measured_ceilings_replace_the_stated_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ceilings.json"
    slow = {"copy_bytes_per_second": 1e12, "matmul_flops_per_second": 100e12}
    path.write_text(json.dumps({"ceilings": slow, "rows": []}))
    assert predict.main(["--depths", "26"]) == 0
    stated = capsys.readouterr().out
    assert predict.main(["--depths", "26", "--ceilings", str(path)]) == 0
    measured = capsys.readouterr().out
    assert "copy 4.30 TB/s, matmul 788 TFLOP/s" in stated
    assert "copy 1.00 TB/s, matmul 100 TFLOP/s" in measured
    assert "d26, 16 rows of 2048" in stated
    assert "MFU, causal" in stated
    assert predict.read_ceilings(path) == predict.Ceilings(1e12, 100e12)
