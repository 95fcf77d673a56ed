"""What benchmarks, tuning, compile gates and GPU tests know of an op: one `Op`, and its kernels as `Launch`es.

To add an op, write bench/ops/NAME.py with an `Op` and list it in bench/ops/__init__.py. Everything else follows: rows
of the suite, the printed cost model, what bench.tune times, what bench.compile_report compiles for sm_90 and holds to
vibechat/kernels/budgets.json, and the tests on a GPU.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from bench.shapes import Shape, Source
from vibechat.kernels.cost import Cost


class Inputs(NamedTuple):
    """Arguments of one call, `op(*leaves, *rest)`, and the gradients of its outputs."""

    leaves: list[Tensor]
    """what gradients are asked for"""
    upstream: list[Tensor]
    """one for each output, laid out as the model lays it out; empty for an op without a backward"""
    rest: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Launch:
    """One kernel at one shape, to be launched with a configuration."""

    kernel: str
    key: str
    """what the launcher looks its tuned configuration up by"""
    configs: tuple[Any, ...]
    """the candidates, NamedTuples, at most six"""
    run: Callable[[Any], Any]
    """launch the kernel, once, with a configuration (None: what the launcher would take)"""
    default: Any
    """the configuration where nothing was measured; one of the candidates"""
    specialization: str = ""
    """launches of a kernel with the same one get the same machine code, which is compiled once; the key if empty"""
    needs: tuple[str, ...] = ()
    """fields of bench.compile_only.Statistics that must not be zero on sm_90: "wgmma", "tma_loads", "wide_loads" """
    restore: Callable[[], Any] | None = None
    """put the operands back that a run overwrites; called before each run, outside the timing"""

    def name(self, config: Any) -> str:
        """The key of a specialization in the budgets."""
        said = " ".join(f"{name}={value}" for name, value in config._asdict().items())
        return f"{self.kernel} {self.specialization or self.key} {said}"


@dataclass(frozen=True)
class Op:
    """An op of vibechat.kernels as rows of the benchmark."""

    name: str
    """of the rows; the op's own name, with a suffix if the op has several entries"""
    public: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[Shape, Source], Inputs]
    """of one call at a model's shapes"""
    cost: Callable[[Shape, int, bool], Cost]
    """(shape, bytes an element, backward): what one pass must move and compute"""
    launches: Callable[[Shape, Source], Iterator[Launch]]
    """every kernel of the op at a model's shapes"""
    liger: Callable[[], Callable[..., Any]] | None = None
    """imports Liger's function and returns it with the signature of `public`; raises ImportError where it is not"""
    others: Mapping[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)
    """further implementations under names of their own, imported as Liger's is"""
    ways: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """several implementations of ours, if the op chooses between them by shape, under the names that
    `tuning.tuned_choice` knows; each with the signature of `public`"""
    ways_key: Callable[[Shape], str] = lambda shape: ""
    """what the op looks the choice up by"""
    batches: tuple[int, ...] = (16, 32, 1)
    """micro-batches of the suite, the most valuable first; (1,) for an op that sees no tokens"""
    predictions: Callable[[Shape], list[str]] = lambda shape: []
    """lines that say what the cost model expects of the implementations, before anybody measured them"""
    differentiable: bool = True
    gradients_in_forward: bool = False
    """whether a backward alone says nothing; `cost` of it is then what training takes beyond evaluation"""
    backend: str = ""
    """the name in vibechat.kernels.OPS, if it is not `name`"""

    @property
    def backend_name(self) -> str:
        """As `--kernels` spells it."""
        return self.backend or self.name

    @property
    def passes(self) -> tuple[str, ...]:
        """Directions that exist, the most valuable first."""
        if not self.differentiable:
            return ("forward",)
        return ("both", "forward") if self.gradients_in_forward else ("both", "forward", "backward")

    def total_cost(self, shape: Shape, itemsize: int, direction: str) -> Cost:
        """Of a direction: `forward`, `backward` or `both`."""
        passes = {"forward": (False,), "backward": (True,), "both": (False, True)}[direction]
        costs = [self.cost(shape, itemsize, backward) for backward in passes]
        return Cost(sum(cost.bytes for cost in costs), sum(cost.flops for cost in costs))
