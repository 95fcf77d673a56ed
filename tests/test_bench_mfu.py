"""The training benchmark: its arithmetic on recorded runs, and a real run small enough for a test."""

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from bench import baseline, implementations, mfu, plain_gpt
from bench.implementations import DidNotFit
from bench.waterfall import CATEGORIES
from vibechat.common import UserError
from vibechat.fp8 import LEFT_TO_COMPILER

ROOT = Path(__file__).parents[1]

TINY = ["--depth", "1", "--max-seq-len", "16", "--vocab-size", "300", "--device-batch-size", "2", "--device", "cpu"]
TINY += ["--total-batch-size", "32"]


class Recorded:
    """A worker that answers with what was recorded: {implementation: seconds of each round}."""

    seconds: ClassVar[dict[str, list[float]]] = {}
    fits: ClassVar[dict[str, int]] = {}
    started: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, name: str, argv: list[str], micro_batch: int) -> None:
        self.name, self.micro_batch = name, micro_batch
        self.started.append((name, micro_batch))
        self._rounds = iter(self.seconds[name])
        self.facts = {"flops_per_token": 100, "flops_per_token_full": 200, "peak_flops": 64_000.0}
        self.facts |= {"dtype": "float32", "peak_is": "as recorded", "attention": "cuDNN"}
        self.facts["kernels"] = [["rms_norm", "triton", "it is faster"], ["relu2_mlp", "torch", "it is not"]]

    def wait_until_ready(self) -> None:
        if self.micro_batch > self.fits.get(self.name, 1000):
            raise DidNotFit("as recorded")

    def steps(self, count: int) -> dict[str, Any]:
        larger = {1: 1.5, 2: 1.0, 4: 0.8}.get(self.micro_batch, 1.0)  # of the time that two rows at a time take
        return {"seconds": larger * next(self._rounds), "memory_bytes": self.micro_batch * 2**30}

    def waterfall(self) -> dict[str, Any]:
        longest = {"name": "nvjet_hsh", "category": "matmul mlp", "calls": 3, "seconds": 0.5}
        parts = {"matmul mlp": 0.75, "data wait": 0.0, "host gaps": 0.25}
        return {"waterfall": parts, "kernels_by_name": [longest]}

    def __enter__(self) -> "Recorded":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Any]:
    """Run the benchmark on recorded seconds; gives (exit status, standard output, standard error, mfu.json)."""
    monkeypatch.setattr(mfu, "Worker", Recorded)
    monkeypatch.setattr(baseline, "DIRECTORY", tmp_path / "baselines")
    monkeypatch.setenv("OUT", str(tmp_path))

    def call(seconds: dict[str, list[float]], *flags: str, **fits: int) -> tuple[int, str, str, dict[str, Any]]:
        monkeypatch.setattr(Recorded, "seconds", seconds)
        monkeypatch.setattr(Recorded, "fits", fits)
        monkeypatch.setattr(Recorded, "started", [])
        rounds = str(len(next(iter(seconds.values()))))
        status = mfu.main([*TINY, "--rounds", rounds, "--only", *seconds, *flags])
        said = capsys.readouterr()
        return status, said.out, said.err, json.loads((tmp_path / "mfu.json").read_text())

    return call


def test_ratios_are_medians_over_rounds(run: Callable[..., Any]) -> None:
    seconds = {"plain": [1.0, 9.0, 2.0], "vibechat": [0.5, 3.0, 1.6]}  # a slow second round falls on both
    status, output, _, content = run(seconds, "--json")
    assert json.loads(output.splitlines()[-1]) == content
    row = content["rows"]["vibechat"]
    assert status == 0
    assert row["ratio_to_plain"] == 2.0
    assert row["tokens_per_second"] == 32 / 1.6
    assert row["mfu"] == pytest.approx(32 / 1.6 * 100 / 64_000)
    assert row["mfu_full"] == pytest.approx(2 * row["mfu"])
    assert "75.0%" in output  # of the waterfall
    assert "500.000 ms     3x  matmul mlp                nvjet_hsh" in output
    assert "0.064 TFLOP/s in float32: as recorded" not in output
    assert "6.4e-08 TFLOP/s in float32: as recorded" in output
    assert output.count("\nattention: cuDNN\nTriton kernels of vibechat: rms_norm\n") == 1
    assert "a step, as timed             1600.00 ms" in output


def test_what_the_optimizer_takes_stands_beside_what_its_flops_must_take() -> None:
    """16 matrices of 256 x 256 and 8 of 256 x 1024, each so many times 256^3; steps of 235.5 ms at 1.46 TFLOP/s."""
    recorded = json.loads((Path(__file__).parent / "recorded_mfu.json").read_text())
    rows = {line[:32].strip(): line[32:].split() for line in mfu.optimizer_lines(recorded)[1:]}
    one = next(one for one in recorded["runs"] if one["implementation"] == "vibechat")
    passes = 4096 * one["facts"]["flops_per_token"]
    step = statistics.median(each["seconds"] for each in one["rounds"])
    for (form, said), multiple in zip(
        rows.items(), (16 * 30 + 8 * 90, 16 * 30 + 8 * 70, 16 * 20 + 8 * 47), strict=False
    ):
        flops = multiple * 256**3
        share = flops / one["facts"]["peak_flops"] / step
        assert said[0] == f"{flops / 1e9:.1f}", form
        assert said[1] == f"{100 * flops / passes:.1f}%"
        assert said[3] == f"{100 * share:.1f}%"
    taken = statistics.median(each["phases"]["optimizer"] for each in one["rounds"])
    assert rows["the whole optimizer, measured"] == [f"{1e3 * taken:.1f}", f"{100 * taken / step:.1f}%"]
    recorded["machine"]["device_type"] = "cuda"
    said = mfu.optimizer_lines(recorded)[-1].split()
    assert said[-2] == f"{1e3 * one['waterfall']['optimizer']:.1f}", "the host's phases, and not the device's"
    assert mfu.optimizer_lines(recorded | {"runs": []}) == []


def test_everyone_is_measured_where_all_fit_and_at_its_own_best(run: Callable[..., Any]) -> None:
    """Eager fits two rows and the others four; what did not fit ends nobody else's run."""
    seconds = {"eager": [2.0], "compiled": [1.0], "vibechat": [0.5]}
    flags = ("--total-batch-size", "64", "--device-batch-size", "4")
    status, output, _, content = run(seconds, *flags, eager=2)
    assert status == 0
    assert content["workload"]["micro_batch"] == 2
    assert content["did_not_fit"] == {"eager": [4], "compiled": [], "vibechat": []}
    assert content["rows"]["vibechat"]["ratio_to_eager"] == 4.0
    assert content["rows"]["vibechat"]["ratio_to_compiled"] == 2.0
    assert {name: row["micro_batch"] for name, row in content["best"].items()} == {
        "eager": 2,
        "compiled": 4,
        "vibechat": 4,
    }
    assert content["best"]["vibechat"]["tokens_per_second"] == pytest.approx(64 / 0.4)
    assert "each at its own best micro-batch" in output
    assert Recorded.started[:3] == [("eager", 4), ("compiled", 4), ("vibechat", 4)]


def test_one_that_never_fits_leaves_the_others(run: Callable[..., Any]) -> None:
    seconds = {"eager": [2.0], "vibechat": [0.5]}
    status, output, _, content = run(seconds, eager=0)
    assert status == 0
    assert content["did_not_fit"]["eager"] == [2, 1]
    assert list(content["rows"]) == ["vibechat"]
    assert "eager did not fit with 2, 1 rows" in output


def test_one_that_fails_leaves_the_others_and_is_said_at_the_end(run: Callable[..., Any]) -> None:
    class Failing(Recorded):
        def wait_until_ready(self) -> None:
            if self.name == "compiled":
                raise UserError("compiled failed: no compiler")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mfu, "Worker", Failing)
        status, output, errors, content = run({"vibechat": [0.5], "compiled": [1.0], "eager": [2.0]})
    assert status == 2
    assert errors == "error: compiled failed: no compiler\n"
    assert content["rows"]["vibechat"]["ratio_to_eager"] == 4.0
    assert "compiled, 2 rows: compiled failed: no compiler" in output
    assert [name for name, _ in Recorded.started].count("compiled") == 1


def test_all_are_compared_at_the_size_that_was_asked_for_and_then_each_at_its_best(run: Callable[..., Any]) -> None:
    flags = ("--total-batch-size", "64", "--device-batch-size", "4", "--common-batch-size", "1")
    run({"vibechat": [0.5], "eager": [2.0]}, *flags)
    assert Recorded.started == [("vibechat", 1), ("eager", 1), ("vibechat", 4), ("eager", 4)]


def test_one_that_does_not_fit_what_was_asked_for_is_measured_at_its_largest_before_the_others_follow_it(
    run: Callable[..., Any],
) -> None:
    flags = ("--total-batch-size", "64", "--device-batch-size", "4", "--common-batch-size", "4")
    seconds = {"vibechat": [0.5], "compiled": [1.0], "eager": [2.0]}

    class OutOfTime(Recorded):
        def __init__(self, name: str, *args: Any) -> None:
            if len(self.started) == 6:
                raise KeyboardInterrupt
            super().__init__(name, *args)

    for worker in (Recorded, OutOfTime):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mfu, "Worker", worker)
            _, output, _, content = run(seconds, *flags, eager=2)
        assert Recorded.started[:6] == [(name, 4) for name in (*seconds, "vibechat", "compiled")] + [("eager", 2)]
        if worker is OutOfTime:
            assert content["workload"]["micro_batch"] == 4
            assert "at the largest micro-batch that most fit" in output
            assert content["best"]["vibechat"]["ratio_to_eager"] == pytest.approx(2.0 / (0.8 * 0.5))
        else:
            assert Recorded.started[6:] == [("vibechat", 2), ("compiled", 2)]
            assert content["workload"]["micro_batch"] == 2  # fewer rows where not all fit so many
            assert "at the largest micro-batch that all fit" in output


def test_fp8_is_left_out_where_there_is_none(run: Callable[..., Any]) -> None:
    status, output, _, content = run({"fp8": [0.4], "vibechat": [0.5]})
    assert status == 0
    assert "fp8 is left out: it needs a GPU" in output
    assert list(content["rows"]) == ["vibechat"]


def test_an_interrupt_leaves_every_round_that_was_measured(run: Callable[..., Any]) -> None:
    class Interrupted(Recorded):
        ends: ClassVar[list[str]] = []

        def steps(self, count: int) -> dict[str, Any]:
            if not self._left:
                raise KeyboardInterrupt
            self._left -= 1
            return super().steps(count)

        def __init__(self, name: str, *args: Any) -> None:
            super().__init__(name, *args)
            self._left = 2 if name == "vibechat" else 1

        def __exit__(self, kind: object, *_: object) -> None:
            self.ends.append(f"{self.name} {kind}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mfu, "Worker", Interrupted)
        status, output, errors, content = run({"vibechat": [0.5, 0.5, 0.5], "eager": [2.0, 2.0, 2.0]})
    assert status == 130
    assert errors == "interrupted: this is what was measured until then\n"
    assert [len(one["rounds"]) for one in content["runs"]] == [2, 1]
    assert "at the largest micro-batch that all fit" in output
    assert sorted(Interrupted.ends) == [f"{name} {KeyboardInterrupt}" for name in ("eager", "vibechat")]


def test_an_interrupt_ends_the_workers_and_what_they_started(tmp_path: Path) -> None:
    """A real one, in the middle of a round, as bench/gpu.sh gives it when the time is over."""
    command = [sys.executable, "-m", "bench.mfu", *TINY, "--only", "eager", "--rounds", "100000", "--steps", "1"]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OUT": str(tmp_path)}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    while not process.stdout.readline().startswith("round 2: eager"):
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 130, errors
    assert errors == "interrupted: this is what was measured until then\n"
    assert "eager" in output
    assert len(json.loads((tmp_path / "mfu.json").read_text())["runs"][0]["rounds"]) >= 2
    assert children
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def test_time_that_is_up_ends_the_run(run: Callable[..., Any]) -> None:
    status, output, errors, content = run({"eager": [2.0]}, "--minutes", "0")
    assert status == 2
    assert "no time left for the rest" in output
    assert errors.startswith("error: nothing was measured")
    assert content["rows"] == {}


def test_a_real_run_gives_valid_json_whose_waterfalls_add_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    flags = ["--rounds", "2", "--steps", "1", "--warmup", "1", "--only", "eager", "--json"]
    flags += ["--kernels-by-name", "5"]
    assert mfu.main([*TINY, *flags]) == 0
    content = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert content == json.loads((tmp_path / "mfu.json").read_text())
    (one,) = content["runs"]
    assert (one["implementation"], one["micro_batch"]) == ("eager", 2)
    assert len(one["rounds"]) == 2
    for turn in one["rounds"]:
        assert sum(turn["phases"].values()) == pytest.approx(turn["mean_seconds"])
        assert turn["seconds"] > 0 < turn["memory_bytes"]
    parts = one["waterfall"]
    assert tuple(parts) == CATEGORIES
    assert parts["matmul mlp"] > 0 < parts["optimizer"]
    longest = [row["seconds"] for row in one["kernels_by_name"]]
    assert len(longest) == 5
    assert longest == sorted(longest, reverse=True)
    assert longest[-1] > 0
    assert 0 < content["rows"]["eager"]["mfu"] < content["rows"]["eager"]["mfu_full"]
    assert one["facts"]["attention"].endswith("else scaled_dot_product_attention")
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert content["environment"]["commit"]


def test_the_baseline_is_the_same_model() -> None:
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


@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_workers_choose_what_they_are_named_after(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(implementations, "TrainerWork", lambda args, **how: asked.update(how))
    args = mfu.arguments([*TINY, "--kernels", "auto,rms_norm=torch"])
    implementations.make(name, args)
    assert asked == {"compile": name == "compiled", "kernels": "torch"}
    implementations.make("vibechat", args)
    assert asked == {"compile": True, "kernels": "auto,rms_norm=torch", "fp8": False}
    implementations.make("fp8", args)
    assert asked["fp8"] is True


def test_the_fp8_row_runs_norms_as_a_run_in_fp8_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def ask(spec: str, **how: Any) -> None:
        asked.append((spec, how))
        raise Asked

    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(implementations, "set_backend", ask)
    for name in ("fp8", "vibechat"):
        with pytest.raises(Asked):
            implementations.make(name, mfu.arguments([*TINY, "--kernels", "triton"]))
    assert asked == [("triton", {"left_to_compiler": LEFT_TO_COMPILER}), ("triton", {"left_to_compiler": None})]


def test_a_worker_that_runs_out_of_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(name: str, args: Any) -> None:
        raise torch.OutOfMemoryError("no 3 GiB")

    monkeypatch.setattr(implementations, "make", full)
    assert implementations.serve("eager", mfu.arguments(TINY)) == implementations.OUT_OF_MEMORY


def test_what_a_library_prints_is_no_answer() -> None:
    with subprocess.Popen([sys.executable, "-c", "print('a library')\nprint('{}')"], stdout=-1, text=True) as process:
        worker = object.__new__(implementations.Worker)
        worker._process = process
        assert worker._answer() == {}


def test_a_failing_worker_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path) -> None:
    """Among the errors; how it came to it stands in the log."""
    monkeypatch.setenv("OUT", str(tmp_path))
    assert mfu.main([*TINY, "--kernels", "no such", "--only", "vibechat", "--rounds", "1"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: vibechat failed: ")
    assert said.err.count("\n") == 1
    assert "Traceback (most recent call last)" in said.out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--total-batch-size", "33"], "multiple of --max-seq-len x --device-batch-size"),
        (["--device-batch-size", "0"], "multiple of --max-seq-len x --device-batch-size"),
        (["--device-batch-size", "many"], "auto or a number of rows"),
        (["--rounds", "0"], "at least 1"),
        (["--common-batch-size", "3"], "multiple of --max-seq-len x --common-batch-size"),
        (["--kernels-by-name", "-1"], "0 or a number of kernels"),
        (["--kernels-by-name", "9", "--no-waterfall"], "needs the waterfall"),
        (["--depth", "0"], "--depth, --max-seq-len and --vocab-size must be at least 1"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--cuda-graphs"], "--cuda-graphs needs a GPU"),
        (["--check", "--write-baseline"], "not allowed with argument --check"),
        (["--why", "it is faster"], "--who and --why belong to --write-baseline"),
    ],
)
def test_flags_that_make_no_run(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mfu.main([*TINY, *flags])
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mfu.main(["--device", "cuda"])
    assert "--device cuda: PyTorch sees no GPU here" in capsys.readouterr().err
