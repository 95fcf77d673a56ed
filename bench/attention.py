"""`python -m bench.attention`: what each implementation of attention reaches at the models' shapes, in TFLOP/s.

Rows are implementation x (d12, d20, d26) at a micro-batch, forward + backward and forward alone, causal, on views of
one packed projection as the model makes them; `flex-window` sees 768 keys, as in nanochat's SSSL. FLOPs are those that
causal attention needs: forward 4 B H D T (T + 1) / 2 (fewer with a window), backward 2.5 times that, because the scores
are computed again. An implementation that this machine does not have gives a row that says so. On a CPU the shapes are
small and the numbers mean little. Rows go to attention.json as they are measured.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measure import ResultFile, measure_ceilings, results_directory, time_calls
from bench.shapes import HEAD_DIM, LENGTH, MODELS, Model
from vibechat.attention import attend, attention_backend, set_attention
from vibechat.common import UserError

WINDOW = 768
WAYS = ("auto", "cudnn", "flash", "efficient", "sdpa", "flex", "flex-window")


class Shape(NamedTuple):
    """A causal attention on one micro-batch."""

    model: Model
    batch: int
    length: int
    head_dim: int

    def flops(self, window: int | None, *, backward: bool) -> float:
        """That must be done: two matmuls over the scores that are seen, and five more in the backward."""
        T, seen = self.length, min(window or self.length, self.length)
        pairs = seen * (seen + 1) / 2 + (T - seen) * seen
        return (14 if backward else 4) * self.batch * self.model.heads * self.head_dim * pairs


def calls_of(shape: Shape, way: str, device: torch.device, dtype: torch.dtype, *, backward: bool) -> list[Any]:
    """Two calls of `attend` on different inputs. What FlexAttention was compiled for before is forgotten: after eight
    shapes torch.compile would run it eagerly, with every score in memory."""
    torch._dynamo.reset()
    window = WINDOW if way == "flex-window" else None
    return [_call(shape, window, device, dtype, backward=backward, seed=seed) for seed in range(2)]


def _call(
    shape: Shape, window: int | None, device: torch.device, dtype: torch.dtype, *, backward: bool, seed: int
) -> Callable[[], Any]:
    B, T, H, D = shape.batch, shape.length, shape.model.heads, shape.head_dim
    rng = torch.Generator(device).manual_seed(seed)
    packed = torch.randn(B, T, 3 * H, D, device=device, generator=rng).to(dtype)
    q, k, v = (x.detach().requires_grad_(backward) for x in packed.split((H, H, H), dim=2))

    def forward() -> Tensor:
        return attend(q, k, v, window=window)

    dy = torch.randn(B, T, H, D, device=device, generator=rng).to(dtype)
    return (lambda: torch.autograd.grad(forward(), (q, k, v), dy)) if backward else forward


def rows(device: torch.device, models: tuple[Model, ...], batch: int, length: int, head_dim: int) -> Iterator[dict]:
    """One dictionary a row, as it is measured."""
    dtype = torch.bfloat16
    for model in reversed(models):
        shape = Shape(model, batch, length, head_dim)
        for backward in (True, False):
            for way in WAYS:
                name = {"model": f"d{model.depth}", "batch": batch, "way": way, "pass": "both" if backward else "fwd"}
                try:
                    set_attention(way.removesuffix("-window"))
                    ran = attention_backend(device, dtype, head_dim)
                    timing = time_calls(calls_of(shape, way, device, dtype, backward=backward), device)
                except (UserError, RuntimeError) as error:  # not here, out of memory, or it failed to compile
                    yield {**name, "error": (str(error).splitlines() or [type(error).__name__])[0]}
                    continue
                flops = shape.flops(WINDOW if way == "flex-window" else None, backward=backward)
                yield {**name, "ran": ran, **timing._asdict(), "flops": flops, "tflops": flops / timing.median / 1e12}


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write every row."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="attention, implementation by implementation")
    parser.add_argument("--batch", type=int, default=16 if gpu else 1)
    parser.add_argument("--length", type=int, default=LENGTH if gpu else 128)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if gpu else "cpu")
    models, head_dim = (MODELS, HEAD_DIM) if gpu else ((Model(4, 64, 2),), 32)
    file = ResultFile(results_directory(device) / "attention.json", device, measure_ceilings(device))
    ceiling = file.content["ceilings"]["matmul_flops_per_second"]
    for row in rows(device, models, args.batch, args.length, head_dim):
        file.add(row)
        said = row.get("error") or f"{row['tflops']:7.1f} TFLOP/s ({1e12 * row['tflops'] / ceiling:.0%})  {row['ran']}"
        print(f"{row['model']} B={row['batch']} {row['pass']:<4} {row['way']:<11} {said}", flush=True)
    set_attention("auto")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
