"""The waterfall: it adds up whatever the trace holds, and puts what it knows where it belongs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.waterfall import (
    CATEGORIES,
    GAPS,
    OTHER,
    PHASE,
    STEP,
    WAIT,
    Event,
    Part,
    Shapes,
    TraceClock,
    category,
    kernel_lines,
    kernels_by_name,
    matmul_family,
    read_trace,
    timeline,
    waterfall,
    waterfall_lines,
)

SHAPES = Shapes(rows=96, channels=128, head_dim=64, vocabulary=1000)


def event(name: str, start: float, stop: float, kind: str = "cpu_op", **more: Any) -> Event:
    return Event(name, kind, start, stop, more.pop("thread", 1), **more)


def step(stop: float, *events: Event, phases: tuple[tuple[str, float], ...] = ()) -> list[Event]:
    marks = [event(PHASE + name, time, time, "user_annotation") for name, time in phases]
    return [event(STEP, 0, stop, "user_annotation"), *marks, *events]


# ---------------------------------------------------------------------------------------------------------------------
# adding up


@st.composite
def nested(draw: st.DrawFn, begin: float = 0, end: float = 1000, depth: int = 0) -> list[Event]:
    """Operators inside operators, as a thread has them."""
    events, at = [], begin
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.floats(at, end))
        stop = draw(st.floats(start, end))
        names = ["aten::mm", "aten::mul", "graph_0_cpp_fused_exp2_log", "CompiledFunction", "aten::embedding"]
        sizes = draw(
            st.lists(st.lists(st.sampled_from([1, 64, 96, 128, 512, 1000]), min_size=2, max_size=3), max_size=3)
        )
        events.append(event(draw(st.sampled_from(names)), start, stop, sizes=sizes))
        if depth < 2:
            events += draw(nested(start, stop, depth + 1))
        at = stop
    return events


@given(nested(), st.lists(st.floats(0, 1000), min_size=4, max_size=4).map(sorted))
def test_operators_add_up_to_the_step(operators: list[Event], marks: list[float]) -> None:
    names = ("data", "forward+backward", "optimizer", "other")
    operators = [one for one in operators if one.start >= marks[0]]  # no operator reaches over the end of the loader
    parts = waterfall(timeline(step(1000, *operators, phases=tuple(zip(names, marks, strict=True))), SHAPES))
    assert tuple(parts) == CATEGORIES
    assert sum(parts.values()) == pytest.approx(1000e-6)
    assert all(seconds >= -1e-12 for seconds in parts.values())
    assert parts[WAIT] == pytest.approx(marks[0] / 1e6)


kernels = st.builds(
    lambda start, length, name, link: event(name, start, start + length, "kernel", thread=7, link=link),
    st.floats(-100, 1100),
    st.floats(0, 300),
    st.sampled_from(["nvjet_hsh", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "triton_poi_fused_add_3"]),
    st.sampled_from([None, 1, 2, 99]),
)


@given(st.lists(kernels, min_size=1, max_size=12), st.lists(st.floats(0, 1000), min_size=4, max_size=4).map(sorted))
def test_kernels_add_up_to_the_step(on_device: list[Event], marks: list[float]) -> None:
    """Also where streams overlap, and where a kernel began before the step or ends after it."""
    host = [event("aten::mm", 5, 6, sizes=[[96, 128], [128, 512]], link=1), event("aten::mul", 900, 901, link=2)]
    names = ("data", "forward+backward", "optimizer", "other")
    parts = waterfall(timeline(step(1000, *host, *on_device, phases=tuple(zip(names, marks, strict=True))), SHAPES))
    assert sum(parts.values()) == pytest.approx(1000e-6)
    assert all(seconds >= -1e-12 for seconds in parts.values())


def test_without_a_step_there_is_no_waterfall() -> None:
    with pytest.raises(ValueError, match="holds no step"):
        timeline([event("aten::mm", 0, 1)], SHAPES)


# ---------------------------------------------------------------------------------------------------------------------
# on a CPU


def test_what_is_inside_another_counts_once_and_the_rest_is_the_hosts() -> None:
    line = timeline(
        step(
            100,
            event("aten::linear", 10, 50, sizes=[[96, 128], [384, 128]]),
            event("aten::mm", 20, 50, sizes=[[96, 128], [128, 384]]),
            event("aten::_fused_adamw_", 70, 90),
            phases=(("data", 5), ("forward+backward", 60), ("optimizer", 95), ("other", 100)),
        ),
        SHAPES,
    )
    parts = waterfall(line)
    named = {row["name"]: round(row["seconds"] * 1e6) for row in kernels_by_name(line, 10)}
    assert named == {"aten::mm": 30, "aten::_fused_adamw_": 20, "aten::linear": 10}
    micro = {name: round(seconds * 1e6) for name, seconds in parts.items() if seconds}
    assert micro.pop("matmul qkv+o") == 30
    assert micro.pop("optimizer") == 20
    assert micro.pop(WAIT) == 5
    assert sum(micro.values()) == 45
    assert micro[GAPS] >= 35


@pytest.mark.parametrize(
    ("sizes", "family"),
    [
        ([[96, 128], [128, 384]], "matmul qkv+o"),
        ([[96, 128], [128, 128]], "matmul qkv+o"),
        ([[384, 96], [96, 128]], "matmul qkv+o"),
        ([[96, 128], [128, 512]], "matmul mlp"),
        ([[512, 96], [96, 128]], "matmul mlp"),
        ([[48, 128], [128, 1000]], "matmul lm_head"),  # of a chunk of rows
        ([[1000, 48], [48, 128]], "matmul lm_head"),
    ],
)
def test_a_matmul_belongs_to_the_family_of_its_shape(sizes: list[list[int]], family: str) -> None:
    assert matmul_family(sizes, SHAPES) == family


def test_as_many_rows_as_the_hidden_layer_is_wide_do_not_confuse_it() -> None:
    shapes = Shapes(rows=512, channels=128, head_dim=64, vocabulary=1000)
    assert matmul_family([[512, 128], [128, 384]], shapes) == "matmul qkv+o"
    assert matmul_family([[512, 128], [128, 512]], shapes) == "matmul mlp"


@pytest.mark.parametrize(
    ("sizes", "family"),
    [
        ([[65536, 1664], [1664, 4992]], "matmul qkv+o"),
        ([[1664, 65536], [65536, 1664]], "matmul qkv+o"),
        ([[65536, 1664], [1664, 6656]], "matmul mlp"),
        ([[6656, 65536], [65536, 1664]], "matmul mlp"),
        ([[65536, 1664], [1664, 65536]], "matmul lm_head"),
        ([[4096, 1664], [1664, 65536]], "matmul lm_head"),  # of a chunk of rows
        ([[65536, 4096], [4096, 1664]], "matmul lm_head"),
    ],
)
def test_as_many_rows_as_the_vocabulary_is_large_do_not_confuse_it(sizes: list[list[int]], family: str) -> None:
    """Depth 26 with 32 rows of 2048 tokens."""
    shapes = Shapes(rows=65536, channels=1664, head_dim=128, vocabulary=65536)
    assert matmul_family(sizes, shapes) == family


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [[3, 2, 32, 64]], "attention"),
        ("aten::bmm", [[6, 32, 64], [6, 64, 32]], "attention"),
        ("vibechat::qk_norm_rope_forward", [[3, 32, 2, 64]], "norms and rope"),
        ("vibechat::add_rms_norm_backward", [[3, 32, 128]], "norms and rope"),
        ("aten::rms_norm", [[3, 32, 128]], "norms and rope"),
        ("vibechat::relu2_mlp", [[96, 128]], "matmul mlp"),
        ("aten::embedding_dense_backward", [[3, 32, 128]], "embedding"),
        ("aten::relu", [[96, 512]], "activation"),
        ("aten::mul", [[48, 1000], []], "loss"),
        ("aten::copy_", [[512, 128], [512, 128]], "casts and sums of weights"),
        ("aten::copy_", [[128, 512], [128, 512]], "casts and sums of weights"),
        ("aten::add_", [[1000, 128], [1000, 128]], "casts and sums of weights"),
        ("aten::add", [[3, 32, 128], [3, 32, 128]], "norms and rope"),
        ("aten::cat", [[3, 32, 2, 32], [3, 32, 2, 32]], "norms and rope"),
        ("graph_0_cpp_fused__to_copy_add_mean_pow_rsqrt_4", [], "norms and rope"),
        ("triton_red_fused__to_copy_exp2_log_mul_sum_2", [], "loss"),
        ("triton_poi_fused_pow_threshold_backward_9", [], "activation"),
        ("triton_poi_fused_embedding_1", [], "embedding"),
        ("triton_poi_fused_sin_0", [], OTHER),
        ("CompiledFunctionBackward", [], GAPS),
        ("autograd::engine::evaluate_function: MmBackward0", [], GAPS),
        ("aten::isfinite", [[1]], OTHER),
        ("aten::_foreach_copy_", [], "casts and sums of weights"),
    ],
)
def test_categories(name: str, sizes: list[list[int]], expected: str) -> None:
    assert category(event(name, 0, 1, sizes=[size for size in sizes if size]), SHAPES) == expected


def test_a_real_step_on_this_machine(tmp_path: Path) -> None:
    """Matmuls of each family, attention, norms, activation, loss, optimizer: all are found in a step of ours."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from vibechat.gpt import GPT
    from vibechat.scaling import model_config
    from vibechat.train_step import TrainStep

    torch.manual_seed(0)
    model = GPT(model_config(1, 16, 1000))
    model.init_weights()
    train_step = TrainStep(model, model.setup_optimizers(), clock=TraceClock(torch.device("cpu")))
    tokens = torch.randint(1000, (2, 17))
    with (
        profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as profiler,
        record_function(STEP),
    ):
        train_step.clock.start()
        train_step.clock.mark("data")
        train_step([(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())])
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    parts = waterfall(timeline(read_trace(tmp_path / "trace.json"), Shapes.of(model.config, 2)))
    assert set(train_step.clock.seconds) == {"data", "forward+backward", "optimizer"}
    missing = [name for name, seconds in parts.items() if seconds <= 0 and name != OTHER]
    assert not missing
    assert parts[OTHER] < 0.2 * sum(parts.values())
    text = "\n".join(waterfall_lines(parts, timed=0.125))
    assert "matmul lm_head" in text
    assert f"{1e3 * sum(parts.values()):.2f} ms" in text
    assert text.splitlines()[-1].split() == ["a", "step,", "as", "timed", "125.00", "ms"]


# ---------------------------------------------------------------------------------------------------------------------
# on a GPU, as Kineto writes it


def recorded_on_a_gpu(path: Path) -> Path:
    """A step of four kernels: launched by a matmul, by Inductor, by our op inside the loss, and by the optimizer."""

    def row(cat: str, name: str, ts: float, dur: float, tid: int, **args: Any) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}

    mm = {"External id": 1, "Input Dims": [[96, 128], [128, 512]]}
    rows = [
        row("user_annotation", STEP, 0, 100, 1),
        row("user_annotation", PHASE + "data", 10, 0, 1),
        row("user_annotation", PHASE + "forward+backward", 40, 0, 1),
        row("user_annotation", PHASE + "optimizer", 50, 0, 1),
        row("cpu_op", "aten::mm", 12, 4, 1, **mm),
        row("cuda_runtime", "cudaLaunchKernel", 13, 1, 1, **{"External id": 1, "correlation": 5}),
        row("cpu_op", "triton_red_fused_mean_rsqrt_1", 17, 2, 1, **{"External id": 2}),
        row("cpu_op", "vibechat::linear_cross_entropy", 20, 9, 2, **{"External id": 3}),
        row("cpu_op", "aten::mul", 22, 2, 2, **{"External id": 4, "Input Dims": [[7]]}),
        row("cpu_op", "aten::_foreach_add_", 45, 2, 1, **{"External id": 6}),
        row("kernel", "nvjet_tst_128x256", 20, 20, 0, **{"External id": 1, "correlation": 5, "stream": 7}),
        row("kernel", "triton_red_fused_mean_rsqrt_1", 42, 6, 0, **{"External id": 2}),
        row("kernel", "sweep_kernel", 48, 10, 0, **{"External id": 4}),
        row("kernel", "_matmul_kernel", 58, 12, 0, **{"External id": 3}),
        row("kernel", "multi_tensor_apply_kernel", 75, 15, 0, **{"External id": 6}),
        row("gpu_user_annotation", STEP, 20, 70, 0),
        {"ph": "i", "name": "an instant", "ts": 1},
    ]
    path.write_text(json.dumps({"traceEvents": rows}))
    return path


def test_a_trace_of_a_gpu(tmp_path: Path) -> None:
    line = timeline(read_trace(recorded_on_a_gpu(tmp_path / "trace.json")), SHAPES)
    micro = {name: round(seconds * 1e6) for name, seconds in waterfall(line).items() if seconds > 1e-9}
    assert micro == {
        "matmul mlp": 20,
        "norms and rope": 6,
        "loss": 10,
        "matmul lm_head": 12,
        "optimizer": 15,
        WAIT: 10,  # the device is idle for 20, and the loader had the host for the first ten of them
        GAPS: 27,
    }
    rows = kernels_by_name(line, 3)
    assert [(row["name"], row["category"], round(row["seconds"] * 1e6)) for row in rows] == [
        ("nvjet_tst_128x256", "matmul mlp", 20),
        ("multi_tensor_apply_kernel", "optimizer", 15),
        ("_matmul_kernel", "matmul lm_head", 12),
    ]


def test_kernels_of_one_name_are_one_row_in_each_category() -> None:
    """And what no kernel has, the waits and the gaps, is none of them."""
    line = [
        Part("gemm", "matmul mlp", 2e-3),
        Part("", WAIT, 9.0),
        Part("gemm", "matmul qkv+o", 4e-3),
        Part("gemm", "matmul mlp", 3e-3),
        Part("autograd::engine", GAPS, 8.0),
        Part("", GAPS, 9.0),
        Part("sum", "loss", 1e-3),
    ]
    rows = kernels_by_name(line, 2)
    assert [tuple(row.values()) for row in rows] == [("gemm", "matmul mlp", 2, 5e-3), ("gemm", "matmul qkv+o", 1, 4e-3)]
    assert kernel_lines(rows)[0].split() == ["5.000", "ms", "2x", "matmul", "mlp", "gemm"]
    assert kernels_by_name(line, 0) == []
