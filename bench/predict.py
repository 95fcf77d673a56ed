"""`python -m bench.predict`: where a micro-step of d12, d20 and d26 should go on a GPU that nobody has measured yet.

A model, so that the first measurement can contradict it: matmuls run at the measured rate of a large one, everything
else at the measured rate of a copy, nothing overlaps and the host never waits. Passes count how often a tensor of
tokens x channels in bfloat16 is read or written, forward and backward, in each layer:

                      eager   compiled   kernels
    norm, residual     2 x 11   2 x 8      2 x 8     eager adds and norms apart; fused, 4 forward and 4 backward
    QK-norm + rotary   120      16         16        eager counted operator by operator on the reference (fp32 halves);
                                                     else 4 + 6 and the gradient of the packed projection (6)
    relu^2             4 x 10   4 x 5      4 x 5     of the hidden layer: 2 + 2 + 2 + 4 eager; 2 + 3 compiled (the
                                                     square, its derivative) and for the kernel in place; 1 with
                                                     --fused-mlp, which reads the square once more
    loss, bytes        97       16         9         of each logit beside the products: counted on the reference; two
                                                     sweeps; one, and dw added up over the chunks in fp32

Attention runs at published rates, cuDNN's for all three, since all three call `attend`; --attention flash2 is PyTorch's
own choice on Hopper. The optimizer is a step's, shared by its micro-batches: the FLOPs of Newton-Schulz in 16 bits, its
symmetric products halved with the kernels alone, and 36 bytes a number of a matrix (gradient norm 4, momentum 12 + 10,
update 10), 32 of the embedding and the head (norm 4, AdamW 28). Eager's further passes over them are not counted.
The ceilings are those of an H200, 4.3 TB/s and 788 TFLOP/s; --ceilings takes what bench.ceilings measured.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from bench.ops.newton_schulz import matrices as matrices_of
from bench.shapes import Model
from vibechat import memory_plan
from vibechat.common import UserError
from vibechat.gpt import GPTConfig
from vibechat.kernels.cost import newton_schulz_flops
from vibechat.scaling import model_config

FORMS = tuple(form for form in memory_plan.FORMS if form != "fp8")  # whose matmuls have no predicted rate
PEAK = 989.4e12
# FLOP/s of causal attention at T = 2048 and heads of 128, (forward, backward), H100-class
ATTENTION_RATES = {"flash2": (298e12, 205e12), "cudnn": (484e12, 352e12)}
NORM_PASSES = {"eager": 22, "compiled": 16, "vibechat": 16}
ROTARY_PASSES = {"eager": 120, "compiled": 16, "vibechat": 16}
HIDDEN_PASSES = {"eager": 10, "compiled": 5, "vibechat": 5}
HIDDEN_PASSES_FUSED = 1
LOGIT_BYTES = {"eager": 97, "compiled": 16, "vibechat": 9}


class Ceilings(NamedTuple):
    """What the device reaches on the simplest work."""

    copy_bytes_per_second: float = 4.3e12
    matmul_flops_per_second: float = 788e12


class Prediction(NamedTuple):
    """A micro-step, optimizer's share included."""

    parts: dict[str, float]
    """seconds by category; they add up to the micro-step"""
    tokens: int
    flops: float
    """causal attention counted once"""
    flops_full: float

    @property
    def seconds(self) -> float:
        """Of the whole micro-step."""
        return sum(self.parts.values())

    def mfu(self, peak: float = PEAK, *, full: bool = False) -> float:
        """Share of the peak."""
        return (self.flops_full if full else self.flops) / self.seconds / peak


def predict(
    config: GPTConfig,
    rows: int,
    form: str,
    *,
    ceilings: Ceilings | None = None,
    attention: str = "cudnn",
    micro_batches: int = 16,
    matmul_share: float = 1.0,
    fused_mlp: bool = False,
) -> Prediction:
    """Predict a micro-step.

    Args:
        config: the model's shape.
        rows: of the micro-batch.
        form: "eager", "compiled" or "vibechat".
        ceilings: of the device; an H200's if None.
        attention: "cudnn" or "flash2".
        micro_batches: that share one optimizer step.
        matmul_share: of the large matmul's rate that the model's own matmuls reach.
        fused_mlp: whether vibechat's MLP is the fused matmul, which a measurement has to ask for, at that same rate.
    """
    limits = ceilings or Ceilings()
    C, V, L, T = config.n_embd, config.vocab_size, config.n_layer, config.sequence_len
    N = rows * T
    rate, bandwidth = limits.matmul_flops_per_second * matmul_share, limits.copy_bytes_per_second
    one_pass = 2 * N * C / bandwidth
    forward, backward = ATTENTION_RATES[attention]
    attention_flops = 4 * N * T * C * L / 2  # causal, forward
    hidden_passes = HIDDEN_PASSES_FUSED if fused_mlp and form == "vibechat" else HIDDEN_PASSES[form]
    matrices = 12 * C * C * L
    casts = (6 + (24 if form == "eager" else 10) * micro_batches) * (matrices + V * C) / micro_batches
    square, wide = (matrices_of(Model(L, C, config.n_head), form) for form in (False, True))
    halved = form == "vibechat"
    newton_schulz = newton_schulz_flops(*square, symmetric=halved)
    newton_schulz += newton_schulz_flops(*wide, symmetric=halved, restarts=1)
    states = (36 * matrices + 32 * 2 * V * C) / bandwidth
    parts = {
        "matmul qkv+o": 6 * N * 4 * C * C * L / rate,
        "matmul mlp": 6 * N * 8 * C * C * L / rate,
        "matmul lm_head": 6 * N * V * C / rate,
        "attention": attention_flops / forward + 2.5 * attention_flops / backward,
        "norms and rope": L * (NORM_PASSES[form] + ROTARY_PASSES[form]) * one_pass,
        "activation": L * 4 * hidden_passes * one_pass,
        "loss": LOGIT_BYTES[form] * N * V / bandwidth,
        "embedding": 8 * one_pass,
        "casts and sums of weights": casts / bandwidth,
        "optimizer": (newton_schulz / rate + states) / micro_batches,
    }
    multiplied = 6 * N * (matrices + V * C)
    return Prediction(parts, N, multiplied + 3 * attention_flops, multiplied + 6 * attention_flops)


def read_ceilings(path: Path) -> Ceilings:
    """Those that bench.ceilings measured. Raises UserError for a file that holds none."""
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))["ceilings"]
        return Ceilings(measured["copy_bytes_per_second"], measured["matmul_flops_per_second"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--ceilings {path}: not what bench.ceilings writes ({error})") from error


def lines_of(depth: int, ceilings: Ceilings, args: argparse.Namespace) -> list[str]:
    """The prediction for a depth, a column for each form."""
    config, rows = model_config(depth, 2048, 65_536), args.rows
    steps = max(1, args.total_batch_size // (rows * config.sequence_len))
    found = {
        form: predict(
            config,
            rows,
            form,
            ceilings=ceilings,
            attention=args.attention,
            micro_batches=steps,
            matmul_share=args.matmul_share,
            fused_mlp=args.fused_mlp,
        )
        for form in FORMS
    }
    lines = [f"d{depth}, {rows} rows of {config.sequence_len}: milliseconds of a micro-step, predicted"]
    lines.append(f"{'':<28}" + "".join(f"{form:>10}" for form in FORMS))
    for part in found["eager"].parts:
        lines.append(f"  {part:<26}" + "".join(f"{1e3 * one.parts[part]:>10.1f}" for one in found.values()))
    lines.append(f"  {'the micro-step':<26}" + "".join(f"{1e3 * one.seconds:>10.1f}" for one in found.values()))
    lines.append(f"  {'tokens/s':<26}" + "".join(f"{one.tokens / one.seconds:>10,.0f}" for one in found.values()))
    lines.append(f"  {'MFU, causal':<26}" + "".join(f"{100 * one.mfu():>9.1f}%" for one in found.values()))
    lines.append(f"  {'MFU, full':<26}" + "".join(f"{100 * one.mfu(full=True):>9.1f}%" for one in found.values()))
    base = found["eager"].seconds
    lines.append(f"  {'times eager':<26}" + "".join(f"{base / one.seconds:>10.2f}" for one in found.values()))
    return lines


def main(argv: list[str] | None = None) -> int:
    """Print the predictions."""
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description="a micro-step by a cost model")
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 20, 26])
    parser.add_argument("--rows", type=int, default=16, help="of a micro-batch")
    parser.add_argument("--total-batch-size", type=int, default=524_288)
    parser.add_argument("--ceilings", type=Path, help="a ceilings.json that bench.ceilings measured")
    parser.add_argument("--attention", choices=sorted(ATTENTION_RATES), default="cudnn")
    parser.add_argument(
        "--matmul-share", type=float, default=0.9, help="of the large matmul's rate, for the model's own"
    )
    parser.add_argument("--fused-mlp", action="store_true", help="vibechat's MLP as the fused matmul")
    args = parser.parse_args(argv)
    if min(*args.depths, args.rows, args.total_batch_size, args.matmul_share) <= 0:
        parser.error("--depths, --rows, --total-batch-size and --matmul-share must be positive")
    try:
        ceilings = read_ceilings(args.ceilings) if args.ceilings else Ceilings()
    except UserError as error:
        parser.error(str(error))
    print(
        f"copy {ceilings.copy_bytes_per_second / 1e12:.2f} TB/s, matmul {ceilings.matmul_flops_per_second / 1e12:.0f} "
        f"TFLOP/s of which the model's reach {100 * args.matmul_share:.0f}%, MFU of {PEAK / 1e12:.1f} TFLOP/s"
    )
    for depth in args.depths:
        print("\n" + "\n".join(lines_of(depth, ceilings, args)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
