"""The real training program, finished and refused, on a model of a few thousand parameters."""

import importlib.util
import json
import math
import os
import re
import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.hub_server import HubServer
from tests.lab import STEPS, Lab, copy_of, flip_last_byte, refusal
from tests.terminal import Terminal
from vibechat.checkpoint_manager import load_model
from vibechat.common import UserError
from vibechat.programs import tok_train
from vibechat.programs.train import DEFAULTS, IDENTITY, OF_THIS_PROCESS, Config, settle, with_demo
from vibechat.sources.hub import SOURCES
from vibechat.tokenizer import RustBPETokenizer

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.xdist_group("train"),
]

# ---------------------------------------------------------------------------------------------------------------------
# a run and what it leaves


def test_a_run_learns_and_leaves_what_it_promised(whole: Lab) -> None:
    rows = whole.metrics()
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert rows[0]["train/loss"] == pytest.approx(5.7, abs=0.1)  # ln 300
    assert rows[-2]["train/loss"] < 4.0
    assert [row["step"] for row in rows if "val/bpb" in row] == [0, 10, 20, 30]
    assert rows[-1]["val/bpb"] < rows[0]["val/bpb"] / 1.5
    keys = {"train/tok_per_sec", "train/mfu", "train/mfu_full", "train/data_wait", "train/step_seconds"}
    assert keys | {"train/memory_bytes", "train/lr_multiplier", "train/grad_norm"} <= rows[0].keys()
    (run,) = (whole.base / "runs").iterdir()
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "env.json", "metrics.jsonl", "report.md"} <= names
    assert any(name.endswith(".png") for name in names)
    assert json.loads((run / "config.json").read_text())["device_batch_size"] == 3
    assert json.loads((run / "env.json").read_text())["device"].startswith("cpu")
    assert whole.steps() == [27, 30]
    assert not list(whole.checkpoints.glob(".tmp*"))
    meta = json.loads((whole.checkpoints / "step_000030" / "meta.json").read_text())
    assert {"tokenizer", "data", "model_config", "train_config", "versions", "run", "step"} <= meta.keys()
    assert meta["val_bpb"] == pytest.approx(rows[20]["val/bpb"])  # what was known when it was saved


def test_a_run_says_what_it_does(whole: Lab) -> None:
    printed = whole.printed
    assert "no tokenizer in" in printed
    assert "training one of 300 tokens" in printed
    assert "4 rows of 32 tokens a step, in 2 micro-batches of 3" in printed
    assert "TFLOP/s" in printed
    assert re.search(r"^  attention +torch +blocked matmuls up to 1024 tokens", printed, re.MULTILINE)
    assert printed.index("memory of a step, as planned") < printed.index("step 07/30")
    assert re.search(r"^step 07/30 \| loss \d", printed, re.MULTILINE)
    for name in ("this model", "zlib -9", "bzip2 -9", "xz -9e"):
        assert re.search(rf"^  {name} +\d\.\d{{4}}$", printed, re.MULTILINE)
    assert "step 15: samples" in printed
    assert "\x1b" not in printed  # no terminal, no control sequences
    assert "Traceback" not in printed
    assert "Warning" not in printed


def test_a_terminal_gets_a_progress_bar(lab: Lab, whole: Lab) -> None:
    terminal = Terminal()
    copy_of(whole, lab)
    lab.output = Path(terminal.name)
    lab.forge.wait(lab.start(resume="auto"))
    shown = terminal.text()
    assert "30/30" in shown
    assert "\x1b[" in shown


def test_the_losses_do_not_depend_on_the_micro_batch(lab: Lab, whole: Lab) -> None:
    assert lab.train(device_batch_size=4, eval_every=-1, save_every=-1)[0] == 0
    for mine, other in zip(lab.metrics(), whole.metrics()[:-1], strict=True):
        assert mine["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3)


def test_base_loss_scores_what_was_saved(whole: Lab, tmp_path: Path) -> None:
    argv = ["--eval-tokens=500", "--device-batch-size=3", "--max-tokens=8"]
    output = tmp_path / "output"
    pid = whole.forge.start("base_loss", argv, output, VIBECHAT_BASE_DIR=str(whole.base))
    assert whole.forge.wait(pid) == 0, output.read_text()
    printed = output.read_text()
    scores = re.findall(r"this model +(\d\.\d{4})", printed)
    assert len(scores) == 2
    assert scores[1] == f"{whole.metrics()[-1]['val/bpb']:.4f}"
    assert printed.count("xz -9e") >= 2


def test_load_model(whole: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIBECHAT_BASE_DIR", str(whole.base))
    cpu = torch.device("cpu")
    model, tokenizer, meta = load_model("base", cpu, "eval")
    assert not model.training
    assert meta["step"] == STEPS
    assert tokenizer.get_vocab_size() == model.config.vocab_size == 300
    ids = torch.tensor([tokenizer.encode("Document 1: 2 and 3 make 5.", prepend="<|bos|>")])
    loss = model(ids[:, :-1], ids[:, 1:]).item()
    assert loss < 3.0 < math.log(300)
    earlier, _, meta = load_model("base", cpu, "train", "d1", 27)
    assert earlier.training
    assert meta["step"] == 27
    assert earlier(ids[:, :-1], ids[:, 1:]).item() != loss
    for arguments, complaint in (
        (("base", cpu, "eval", "d1", 5), "steps there: 27, 30"),
        (("base", cpu, "eval", "d2"), "no checkpoint in"),
        (("sft", cpu, "eval"), "no model in"),
        (("pre", cpu, "eval"), "base, mid, sft, rl"),
    ):
        with pytest.raises(UserError, match=complaint):
            load_model(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="phase"):
        load_model("base", cpu, "test")


def test_load_model_refuses_another_tokenizer_and_passes_over_damage(
    lab: Lab, whole: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_of(whole, lab)
    monkeypatch.setenv("VIBECHAT_BASE_DIR", str(lab.base))
    cpu = torch.device("cpu")
    flip_last_byte(lab.checkpoints / "step_000030" / "model.safetensors")
    assert load_model("base", cpu, "eval")[2]["step"] == 27
    assert "step_000030 is corrupt" in capsys.readouterr().out
    RustBPETokenizer.train_from_iterator(["some other text, some other tokens"], 270).save(str(lab.base / "tokenizer"))
    with pytest.raises(UserError, match="another tokenizer"):
        load_model("base", cpu, "eval", "d1", 27)
    flip_last_byte(lab.checkpoints / "step_000027" / "meta.json")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        load_model("base", cpu, "eval")


# ---------------------------------------------------------------------------------------------------------------------
# what is refused, and what is got round


ADAMW = {"matrix_optimizer": "adamw", "matrix_lr": 0.003}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"depth": 0}, "--depth 0: must be at least 1"),
        ({"device_batch_size": 0}, "--device-batch-size 0: must be at least 1"),
        ({"eval_tokens": -5}, "--eval-tokens -5: must be at least 1"),
        ({"matrix_lr": -0.1}, "--matrix-lr -0.1: must be at least 0"),
        ({"matrix_optimizer": "adamw"}, "--matrix-optimizer adamw: also needs --matrix-lr"),
        (ADAMW | {"normuon": True}, "--matrix-optimizer adamw: leave out --normuon, which"),
        (ADAMW | {"matrix_weight_decay": 0.1}, "--matrix-optimizer adamw: leave out --matrix-weight-decay, which"),
        (ADAMW | {"normuon": True, "matrix_weight_decay": 0.1}, "leave out --normuon and --matrix-weight-decay, which"),
        ({"grad_clip": "nan"}, "--grad-clip nan: must be a usable number"),
        ({"target_flops": "inf"}, "--target-flops inf: must be a usable number"),
        ({"seed": 2**64}, f"--seed {2**64}: must be a usable number"),
        ({"total_batch_size": 100}, "--total-batch-size 100: must be a multiple of --max-seq-len 32"),
        ({"num_iterations": 0}, "one of num_iterations, target_flops and target_param_data_ratio must be positive"),
        ({"run": "../elsewhere"}, "--run '../elsewhere': use letters"),
        ({"model_tag": "../other"}, "model tag"),
        ({"kernels": "fast"}, "--kernels fast"),
        ({"attention": "fast"}, "--attention fast: unknown"),
        ({"attention": "cudnn"}, "--attention cudnn: it needs a CUDA GPU"),
        ({"cuda_graphs": True}, "--cuda-graphs needs a CUDA GPU and --compile: leave it out"),
        ({"fp8": True}, "--fp8: it needs a GPU of compute capability 8.9 or later"),
        ({"resume": "soon"}, "never, auto or a step"),
        ({"resume": 99}, "the steps there: none"),
    ],
)
def test_flags_that_make_no_run_are_refused_before_anything_is_done(lab: Lab, flags: dict, words: str) -> None:
    assert words in refusal(lab, **flags)
    assert not list(lab.base.glob("data/*"))
    assert not list(lab.base.glob("tokenizer/*"))
    assert not list(lab.base.glob("runs/*"))


def test_a_model_that_is_too_large_is_refused(lab: Lab) -> None:
    assert re.search(r"parameters need .* GB .* choose a smaller --depth", refusal(lab, depth=400))


def test_what_is_refused(lab: Lab, whole: Lab, tmp_path: Path) -> None:
    copy_of(whole, lab)
    assert "--resume auto" in refusal(lab)
    assert "the steps there: 27, 30" in refusal(lab, resume="5")
    assert "--seed 7: the checkpoint was trained with 42" in refusal(lab, resume="auto", seed=7)
    assert "--compile True: the checkpoint was trained with False" in refusal(lab, resume="auto", compile=True)
    assert "has 300 tokens" in refusal(lab, model_tag="other", vocab_size=400)
    other = tmp_path / "other.jsonl"
    other.write_text(lab.corpus.read_text()[:-1] + "\n" + json.dumps({"text": "more"}) + "\n")
    assert "the data is not what it was trained with" in refusal(lab, resume="auto", data=other)
    shutil.rmtree(lab.base / "tokenizer")
    refusal(lab, resume="auto")  # it is not trained anew
    assert lab.train(model_tag="other", vocab_size=280, num_iterations=1)[0] == 0
    assert "the tokenizer is not what it was trained with" in refusal(lab, resume="auto")


def test_a_loss_that_is_not_finite_stops_the_run(lab: Lab) -> None:
    """A learning rate beyond all reason makes one; the weights that are saved are from before."""
    status, printed = lab.train(matrix_lr=1e38, embedding_lr=1e38, unembedding_lr=1e38, eval_every=-1, save_every=1)
    assert status == 2, printed
    error = printed.splitlines()[-1]
    found = re.fullmatch(r"error: step (\d+), rank 0: loss .*; the last good checkpoint is .*step_(\d+)", error)
    assert found, error
    assert int(found[2]) == int(found[1]) == max(lab.steps())
    assert len(lab.metrics()) == int(found[1])


def test_profile_writes_a_trace_and_a_missing_wandb_costs_a_line(lab: Lab) -> None:
    status, printed = lab.train(
        profile=True, num_iterations=8, eval_every=-1, run="traced", wandb=importlib.util.find_spec("wandb") is None
    )
    if importlib.util.find_spec("wandb") is None:
        assert "wandb is not installed" in printed
    assert status == 0, printed
    assert "Warning" not in printed
    (trace,) = lab.base.glob("runs/traced/trace.json")
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert any("aten::" in name for name in names)


def test_text_of_the_hub_is_downloaded_as_far_as_the_run_needs_it(lab: Lab) -> None:
    """And a run that is continued needs no network; without one and without shards, a line says what can be done."""
    texts = [json.loads(line)["text"] for line in lab.corpus.read_text().splitlines()]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=50)
    shard = sink.getvalue().to_pybytes()
    source = SOURCES["fineweb-edu"]
    server = HubServer(source.repo, dict.fromkeys(source.wanted(1), shard))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    flags = {"data": "fineweb-edu", "num_iterations": 3, "eval_every": -1, "resume": "auto"}
    env = {"HF_ENDPOINT": server.endpoint, "NO_PROXY": "127.0.0.1"}
    try:
        status, printed = lab.train(env=env, **flags)
    finally:
        server.shutdown()
        server.server_close()
    assert status == 0, printed
    assert "fineweb-edu: 384 tokens are read from 1 training shards" in printed
    assert [f"{name}: " in printed for name in source.wanted(1)] == [True, True]
    status, printed = lab.train(env=env, **flags)
    assert status == 0, printed
    assert "after step 3" in printed
    flags = {"data": "climbmix", "num_iterations": 3, "model_tag": "other"}
    assert "--data builtin needs no network" in refusal(lab, env={"HF_HUB_OFFLINE": "1"}, **flags)
    assert "python -m vibechat.dataset --source climbmix -n" in refusal(lab, num_shards=-1, **flags)


# ---------------------------------------------------------------------------------------------------------------------
# the flags


KNOWN = """--depth --max-seq-len --device-batch-size --total-batch-size --num-iterations --target-flops --eval-every
--target-param-data-ratio --eval-tokens --sample-every --save-every --keep --resume --model-tag --run --data --compile
--kernels"""


def test_flags_carry_the_names_that_people_know() -> None:
    assert {flag.removeprefix("--").replace("-", "_") for flag in KNOWN.split()} <= vars(Config()).keys()
    assert {"vocab_size", "max_chars"} <= vars(tok_train.Config()).keys()


def test_every_default_is_filled_in() -> None:
    for gpu in (False, True):
        settings = settle(Config(), gpu=gpu, before=None)
        for name, values in DEFAULTS.items():
            assert getattr(settings, name) == values[0 if gpu else 1]
    assert settle(Config(depth=7), gpu=False, before=None).depth == 7


def test_another_measure_of_length_replaces_the_number_of_iterations() -> None:
    assert settle(Config(target_flops=1e15), gpu=False, before=None).num_iterations == -1
    assert settle(Config(target_param_data_ratio=3.0), gpu=False, before=None).num_iterations == -1
    assert settle(Config(num_iterations=7, target_flops=1e15), gpu=False, before=None).num_iterations == 7


@pytest.mark.parametrize(
    ("variable", "setting"), [("VIBECHAT_KERNELS", "kernels"), ("VIBECHAT_ATTENTION", "attention")]
)
def test_a_variable_says_what_a_flag_does_not(variable: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "")
    assert getattr(settle(Config(), gpu=True, before=None), setting) == "auto"
    monkeypatch.setenv(variable, "torch" if setting == "kernels" else "math")
    assert getattr(settle(Config(), gpu=True, before=None), setting) in ("torch", "math")
    assert getattr(settle(Config(**{setting: "auto"}), gpu=True, before=None), setting) == "auto"


def test_a_continued_run_takes_what_was_not_said_from_its_checkpoint() -> None:
    first = settle(Config(depth=2, eval_every=7, data="a.txt", seed=5), gpu=False, before=None)
    before = json.loads(json.dumps(vars(first)))
    again = settle(Config(resume="auto", save_every=9), gpu=True, before=before)
    assert (again.depth, again.eval_every, again.data, again.seed, again.save_every) == (2, 7, "a.txt", 5, 9)
    assert again.resume == "auto"
    del before["matrix_optimizer"]  # as in a checkpoint that is older than the flag
    assert settle(Config(resume="auto"), gpu=False, before=before).matrix_optimizer == "muon"
    assert {*IDENTITY, *OF_THIS_PROCESS, *DEFAULTS} <= vars(first).keys()


def test_what_an_older_version_recorded_beside_adamw_and_did_nothing_with_is_dropped() -> None:
    before = vars(settle(Config(**ADAMW), gpu=False, before=None)) | {"normuon": True, "matrix_weight_decay": 0.1}
    for said in ({}, {"normuon": True}, ADAMW):
        again = settle(Config(resume="auto", **said), gpu=False, before=before)
        assert (again.matrix_optimizer, again.matrix_lr) == ("adamw", 0.003)
        assert (again.normuon, again.matrix_weight_decay) == (False, 0.0)
    with pytest.raises(UserError, match=r"--matrix-weight-decay 0\.2: the checkpoint was trained with 0\.1"):
        settle(Config(resume="auto", matrix_weight_decay=0.2), gpu=False, before=before)
    with_muon = before | {"matrix_optimizer": "muon"}
    assert settle(Config(resume="auto"), gpu=False, before=with_muon).normuon


def test_muons_options_are_on_but_in_checkpoints_that_were_trained_without() -> None:
    def of_muon(config: Config, before: dict[str, object] | None = None) -> tuple[object, object]:
        settled = settle(config, gpu=False, before=before)
        return settled.normuon, settled.matrix_weight_decay

    assert of_muon(Config()) == (True, 0.1)
    assert of_muon(Config(normuon=False, matrix_weight_decay=0.0)) == (False, 0.0)
    assert of_muon(Config(**ADAMW)) == (False, 0.0)
    recorded = vars(settle(Config(), gpu=False, before=None))
    assert of_muon(Config(resume="auto"), recorded) == (True, 0.1)
    older = {name: value for name, value in recorded.items() if name not in ("normuon", "matrix_weight_decay")}
    assert of_muon(Config(resume="auto"), older) == (False, 0.0)


def test_demo_gives_way_to_what_was_said() -> None:
    assert with_demo(Config()) == Config()
    demo = with_demo(Config(demo=True))
    assert (demo.model_tag, demo.resume) == ("demo", "auto")
    assert with_demo(Config(demo=True, model_tag="mine")).model_tag == "mine"
