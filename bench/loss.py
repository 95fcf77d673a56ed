"""linear_cross_entropy on a CPU against F.cross_entropy on the whole matrix: seconds and peak memory, in one run.

`python -m bench.loss` times forward + backward of a head in bfloat16, eager and compiled, in alternation after a
warm-up; freed memory is kept by the process, as training keeps it. Peak memory is the most that living tensors took at
once, eagerly, beyond the inputs and the gradients.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.measure import provenance
from bench.ops.loss import plain
from vibechat import kernels
from vibechat.common import keep_freed_memory

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class PeakBytes(TorchDispatchMode):
    """The most bytes that were held at once by tensors born under it; what the allocator rounds up is not in it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.born: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage._cdata not in given:
                self.born[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.born = {key: (ref, size) for key, (ref, size) in self.born.items() if not ref.expired()}
        self.peak = max(self.peak, self.held())
        return result

    def held(self) -> int:
        """Bytes of the tensors that still live."""
        return sum(size for ref, size in self.born.values() if not ref.expired())


def _pass(loss: Loss, arguments: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, weight, _ = arguments
    x.grad = weight.grad = None
    value = loss(*arguments)
    value.backward()
    return value.detach()


def peak_bytes(loss: Loss, arguments: tuple[Tensor, Tensor, Tensor]) -> int:
    """Beyond the inputs and the gradients that are left."""
    with PeakBytes() as memory:
        _pass(loss, arguments)
    x, weight, _ = arguments
    return memory.peak - x.nbytes - weight.nbytes


def main(argv: list[str] | None = None) -> int:
    """Time and print."""
    parser = argparse.ArgumentParser(description="the loss of a head on a CPU against F.cross_entropy on every logit")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="eager alone")
    args = parser.parse_args(argv)
    keep_freed_memory()
    torch.manual_seed(0)
    x = torch.randn(args.rows, args.channels).bfloat16().requires_grad_()
    weight = (torch.randn(args.vocab, args.channels) * args.channels**-0.5).requires_grad_()
    arguments = x, weight, torch.randint(args.vocab, (args.rows,))

    def whole(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return plain(x, weight.to(x.dtype), targets)

    losses: dict[str, Loss] = {"plain, eager": whole, "ours, eager": kernels.linear_cross_entropy}
    peaks = {name: peak_bytes(loss, arguments) for name, loss in losses.items()}
    if not args.no_compile:
        losses |= {"plain, compiled": torch.compile(whole), "ours, compiled": torch.compile(losses["ours, eager"])}
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for turn in range(args.rounds + 1):
        for name, loss in losses.items():
            start = time.perf_counter()
            _pass(loss, arguments)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    said = provenance(torch.device("cpu"))
    print(f"{said['device']}, {torch.get_num_threads()} threads, torch {said['torch']}, commit {said['commit']}")
    print(f"{args.rows} rows x {args.channels} channels x {args.vocab} words, bfloat16, forward + backward")
    for name in losses:
        median = statistics.median(seconds[name])
        faster = statistics.median(seconds[name.replace("ours", "plain")]) / median
        peak = f"{peaks[name] / 2**20:8.0f} MiB" if name in peaks else " " * 12
        print(f"{name:<16}{1e3 * median:9.1f} ms{faster:7.2f}x plain{peak}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
