"""newton_schulz on all matrices of a model, square and 4:1, and Muon's passes around it, as rows of the benchmark."""

from collections.abc import Callable, Iterator

import torch

from bench.ops import muon_passes
from bench.ops.entry import Inputs, Launch, Op
from bench.shapes import Model, Shape, Source
from vibechat import kernels
from vibechat.kernels import symmetric_matmul
from vibechat.kernels.cost import Cost, newton_schulz_cost, newton_schulz_flops
from vibechat.kernels.newton_schulz import reference


def matrices(model: Model, wide: bool) -> tuple[int, int, int]:
    """(count, m, n) of a model: q, k, v and o of each layer, or the two of the MLP, the tall one transposed."""
    return (2 * model.depth, model.channels, 4 * model.channels) if wide else (4 * model.depth, *2 * (model.channels,))


def _inputs(wide: bool) -> Callable[[Shape, Source], Inputs]:
    return lambda shape, source: Inputs([source.randn(*matrices(shape.model, wide))], [])


def _cost(wide: bool) -> Callable[[Shape, int, bool], Cost]:
    return lambda shape, itemsize, backward: newton_schulz_cost(*matrices(shape.model, wide), itemsize)


def _launches(wide: bool) -> Callable[[Shape, Source], Iterator[Launch]]:
    def launches(shape: Shape, source: Source) -> Iterator[Launch]:
        count, m, n = matrices(shape.model, wide)
        x = source.randn(count, m, n, dtype=torch.float16, scale=(m * n) ** -0.5)
        d = source.randn(count, m, m, dtype=torch.float16, scale=1 / m) if wide else None
        yield Launch(
            "symmetric_matmul",
            symmetric_matmul.key(m),
            symmetric_matmul.CONFIGS,
            lambda c: symmetric_matmul.launch(x, d=d, beta=0.0 if d is None else 1.0, config=c),
            symmetric_matmul.DEFAULT,
            specialization="added to" if wide else "alone",
            needs=("wgmma", "tma_loads", "wide_stores"),
        )
        yield from (muon_passes.of_muon if wide else muon_passes.of_a_stack)(x, source)

    return launches


def _predictions(wide: bool) -> Callable[[Shape], list[str]]:
    """FLOPs of every form, of all matrices of a model, and the time they take at 788 TFLOP/s, which cuBLAS reached."""

    def predictions(shape: Shape) -> list[str]:
        count, m, n = matrices(shape.model, wide)

        def form(name: str, restarts: int) -> str:
            whole, halves = (
                newton_schulz_flops(count, m, n, symmetric=symmetric, restarts=restarts) / 1e12
                for symmetric in (False, True)
            )
            return f"{name} {whole:.2f}, with triangles {halves:.2f} ({1e3 * halves / 788:.1f} ms)"

        forms = [form("standard", -1), form("Gram, 1 restart", 1), form("Gram, 2 restarts", 2)]
        return [
            f"newton_schulz d{shape.model.depth}, {count} x {m} x {n}, TFLOPs: " + "; ".join(forms[: 3 if wide else 1])
        ]

    return predictions


def _op(name: str, wide: bool) -> Op:
    return Op(
        name,
        kernels.newton_schulz,
        reference,
        _inputs(wide),
        _cost(wide),
        _launches(wide),
        batches=(1,),
        differentiable=False,
        backend="newton_schulz",
        predictions=_predictions(wide),
    )


NEWTON_SCHULZ_SQUARE = _op("newton_schulz_square", wide=False)
NEWTON_SCHULZ_WIDE = _op("newton_schulz_wide", wide=True)
