"""Which kernels torch.compile would make on a GPU that is not there: Inductor's own lowering and fusion, up to the
point where it writes code.

    graphs = kernels_of(lambda: train_one_step(...))

What is compiled on the way runs nowhere: its graphs are turned into graphs of CUDA tensors that have shapes and no
numbers, the scheduler says what it joins, and the call goes on with memory that nobody filled. Inductor asks for a
device, which this answers; what it asks differs from version to version.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, scheduler
from torch._inductor import config as inductor
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from vibechat.kernels.language import triton

TORCH = (2, 11)  # whose Inductor this drives
NEEDS_THIS_INDUCTOR = [  # what a module that asks it is marked with
    pytest.mark.skipif(triton is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) != TORCH, reason="asks the Inductor of another version"
    ),
]
CUDA = torch.device("cuda", 0)
H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=141_000_000_000,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    L2_cache_size=50 << 20,
)


class Node(NamedTuple):
    """A loop nest before fusion, or a call of somebody else's kernel."""

    name: str
    """of the buffer that it makes"""
    reads: frozenset[str]
    origins: frozenset[str]
    """the operators that it computes, among them those of its inputs that are computed again"""
    reduces: bool
    size: tuple[int, ...]
    dtype: torch.dtype | None


Kernel = tuple[Node, ...]  # what is joined


class _Scheduled(Exception):
    """What the scheduler decided is known."""


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention on (B, T, H, D), as a GPU would call it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)[0].transpose(1, 2)


def kernels_of(call: Callable[[], object]) -> list[list[Kernel]]:
    """The kernels of each graph that is compiled while `call` runs: forward, backward, and so on."""
    graphs: list[list[Kernel]] = []

    def stop(nodes: list[Any]) -> None:
        graphs.append([tuple(_node(part) for part in node.get_nodes()) for node in nodes])
        raise _Scheduled

    def inner(graph: GraphModule, inputs: list[Tensor], **options: Any) -> Callable[..., Any]:
        _schedule(graph, inputs, options)
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]

        def run(arguments: list[Any]) -> list[Any]:
            return [None if node is None else _like(node.meta["val"], torch.device("cpu")) for node in outputs]

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(graph: GraphModule, inputs: list[Tensor]) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=inner)

    real = torch.compile
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        compiler = mock.Mock(wraps=lambda f, **_: real(f, backend=backend, fullgraph=True, dynamic=False))
        stack.enter_context(mock.patch.object(torch, "compile", compiler))
        stack.enter_context(inductor.patch(_post_fusion_custom_pass=stop, fx_graph_cache=False, compile_threads=1))
        call()
    torch._dynamo.reset()
    return graphs


def _like(value: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def _schedule(graph: GraphModule, inputs: list[Tensor], options: dict[str, Any]) -> None:
    """Have Inductor plan `graph` as one of CUDA tensors."""
    graph, mode = copy.deepcopy(graph), FakeTensorMode()
    for node in graph.graph.nodes:
        node.args = tuple(CUDA if isinstance(value, torch.device) else value for value in node.args)
        node.kwargs = {k: CUDA if isinstance(value, torch.device) else value for k, value in node.kwargs.items()}
    graph.recompile()
    with mode:
        fakes = [_like(value, CUDA) for value in inputs]
    context = torch._guards.TracingContext(mode)
    with a_gpu(), torch._guards.tracing(context), V.set_fake_mode(mode):
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*fakes)
        try:
            compile_fx.compile_fx_inner(graph, fakes, **options)
        except torch._inductor.exc.InductorError as error:
            if not isinstance(error.inner_exception, _Scheduled):
                raise


def _node(node: Any) -> Node:
    made = node.node
    layout = getattr(made, "layout", None)
    shaped = hasattr(layout, "size") and hasattr(layout, "dtype")
    return Node(
        node.get_name().replace("op", "buf", 1),
        frozenset(dependency.name for dependency in node.read_writes.reads),
        frozenset(str(origin.target).split(".")[1 if "." in str(origin.target) else 0] for origin in made.origins),
        bool(getattr(node, "is_reduction", lambda: False)()),
        tuple(int(n) for n in layout.size) if shaped else (),
        layout.dtype if shaped else None,
    )


@contextlib.contextmanager
def a_gpu() -> Iterator[None]:
    """Inductor's questions are answered as an H200 would."""
    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, "get_device_properties", lambda device=None: H200),
        (torch.cuda, "get_device_capability", lambda device=None: (H200.major, H200.minor)),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_rng_state", lambda *_: torch.zeros(1)),
        (torch.cuda, "set_rng_state", lambda *_: None),
        (CudaInterface, "get_device_properties", staticmethod(lambda device=None: H200)),
        (CudaInterface, "current_device", staticmethod(lambda: 0)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda device=None: 90)),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda device=None: H200)),
        (CudaInterface.Worker, "current_device", staticmethod(lambda: 0)),
        (scheduler, "has_triton", lambda *_: True),
        (compile_fx, "_check_triton_bf16_support", lambda graph: None),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, answer in answers:
            stack.enter_context(mock.patch.object(owner, name, answer))
        yield
