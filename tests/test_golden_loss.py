"""Fifty steps in float32 give the recorded losses: a change that claims no effect on numerics shows none here.

`python -m tests.test_golden_loss` records them anew, for a change that claims one.
"""

import json
from pathlib import Path

import pytest
import torch

from vibechat.gpt import GPT, GPTConfig
from vibechat.scaling import plan
from vibechat.train_step import TrainStep

RECORD = Path(__file__).with_name("golden_loss.json")
STEPS, ROWS, LENGTH, VOCAB = 50, 8, 32, 67


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that can be learned: each token is a fixed function of the one before it, but for one in eight."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=generator)
    follows = torch.rand(tokens.shape, generator=generator) < 7 / 8
    for t in range(1, LENGTH + 1):
        tokens[:, t] = torch.where(follows[:, t], (5 * tokens[:, t - 1] + 3) % VOCAB, tokens[:, t])
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def losses() -> list[float]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=LENGTH, vocab_size=VOCAB, n_layer=2, n_head=2, n_kv_head=1, n_embd=32))
    model.init_weights()
    model.set_compute_dtype(torch.float32)
    run = plan(2, sequence_len=LENGTH, vocab_size=VOCAB, total_batch_size=ROWS * LENGTH, num_iterations=STEPS)
    step = TrainStep(model, model.setup_optimizers())
    return [step([batch(i)], run.lr_multiplier(i), run.muon_momentum(i))[0].item() for i in range(STEPS)]


def test_the_losses_are_those_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIBECHAT_DTYPE", "float32")
    recorded = json.loads(RECORD.read_text())
    assert recorded[0] > 4 > 2 > recorded[-1]  # it is a curve of something being learned
    assert losses() == pytest.approx(recorded, abs=1e-3)


if __name__ == "__main__":
    import os

    os.environ["VIBECHAT_DTYPE"] = "float32"
    RECORD.write_text(json.dumps([round(loss, 5) for loss in losses()], indent=0) + "\n")
