"""What it saves to cast the weights once a step and not in every micro-batch: `python -m bench.casts`.

Two training steps of the same model on the same tokens, one as it trains (vibechat/working_weights.py), one that leaves
the casts to the model, take turns. The ratio is the median over rounds of (at every use / once). On a CPU a step of a
single micro-batch casts at every use anyway.
"""

from torch import Tensor

from bench import turns
from vibechat.train_step import TrainStep


class CastAtEveryUse(TrainStep):
    """A step whose model casts, packs and rounds its weights wherever it reads them."""

    def _cast_weights(self, micro_batches: int) -> dict[str, Tensor]:
        return {}


def main(argv: list[str] | None = None) -> int:
    """Let both take turns, print each round and the ratio."""
    args = turns.parser("bench.casts", "weights cast once a step, or always", micro_batches=4).parse_args(argv)
    steps = {"once": turns.make_step(args), "at every use": turns.make_step(args, CastAtEveryUse)}
    turns.compare(steps, turns.random_rows(args), args.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
