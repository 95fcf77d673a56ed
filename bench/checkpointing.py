"""What activation checkpointing costs and what it saves: `python -m bench.checkpointing`.

Two training steps of the same model on the same tokens, with `--activation-checkpointing` and without, take turns. The
ratio is the median over rounds of (with / without). What a step keeps is counted, not timed: the bytes of the distinct
tensors, parameters and copies of weights apart, that autograd has when the forward pass of a micro-batch ends.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bench import turns
from vibechat.train_step import MicroBatch, TrainStep


def saved_bytes(forward: Callable[[], Tensor], apart: Iterable[Tensor]) -> int:
    """Bytes of the distinct tensors that `forward` keeps for its backward, those of `apart` not counted."""
    known = {tensor.untyped_storage()._cdata for tensor in apart}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def kept_bytes(step: TrainStep, batch: MicroBatch) -> int:
    """Bytes that the forward pass of a micro-batch keeps for its backward. Leaves no gradient behind."""
    weights = step._cast_weights(2)
    apart = (*step.model.parameters(), *step.model.buffers(), *weights.values(), *batch)
    return saved_bytes(lambda: step._loss_sum(*batch, weights), apart)


def main(argv: list[str] | None = None) -> int:
    """Let both take turns, print each round, the ratio, and what each keeps."""
    args = turns.parser("bench.checkpointing", "activations kept, or computed again", micro_batches=1).parse_args(argv)
    steps = {"without": turns.make_step(args), "with": turns.make_step(args, checkpointing=True)}
    rows = turns.random_rows(args)
    turns.compare(steps, rows, args.rounds)
    kept = {name: kept_bytes(step, rows[0]) / 2**20 for name, step in steps.items()}
    said = ", ".join(f"{name} {one:.1f} MiB" for name, one in kept.items())
    print(f"kept for the backward of a micro-batch: {said}, ratio {kept['with'] / kept['without']:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
