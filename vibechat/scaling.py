"""The one dial: from a depth to everything that a training run needs, each number with its formula.

`plan` is a pure function. What it returns prints as the table that a run begins with.
Sources: width, heads, rates and the tokens-to-parameters ratio as nanochat had them (Karpathy 2025), the ratio after
Hoffmann et al. 2022, "Chinchilla", arXiv 2203.15556; the schedule's long linear decay after Hagele et al. 2024, arXiv
2405.18392.
"""

from dataclasses import dataclass

import torch

from vibechat.gpt import GPT, MATRIX_OPTIMIZERS, GPTConfig

HEAD_DIM = 128
WARMUP_STEPS, WARMUP_SHARE = 40, 0.05
WARMDOWN_SHARE = 0.5
FINAL_LR_MULTIPLIER = 0.02
MOMENTUM_FIRST, MOMENTUM_LAST, MOMENTUM_STEPS, MOMENTUM_SHARE = 0.85, 0.95, 300, 0.3


@dataclass(frozen=True)
class Plan:
    """A training run, derived from its depth. `str(plan)` is the table of it, formulas included."""

    depth: int
    model_config: GPTConfig
    num_params: int
    flops_per_token: int
    tokens: int
    total_batch_size: int
    num_iterations: int
    embedding_lr: float
    unembedding_lr: float
    matrix_lr: float
    weight_decay: float
    warmup_steps: int
    warmdown_steps: int
    momentum_steps: int
    formulas: dict[str, str]
    """name of a number -> how it was derived"""

    def lr_multiplier(self, step: int) -> float:
        """What every learning rate is multiplied by in update `step` (0-based): up, level, down in a straight line."""
        up = (step + 1) / (self.warmup_steps + 1)
        left = (self.num_iterations - step) / (self.warmdown_steps + 1)
        return min(1.0, up, FINAL_LR_MULTIPLIER + (1 - FINAL_LR_MULTIPLIER) * left)

    def muon_momentum(self, step: int) -> float:
        """Muon's momentum in update `step`: rises in a straight line from 0.85 to 0.95."""
        share = min(1.0, step / self.momentum_steps) if self.momentum_steps else 1.0
        return MOMENTUM_FIRST + share * (MOMENTUM_LAST - MOMENTUM_FIRST)

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, value, formula) of every number, in the order in which they follow from each other."""
        config = self.model_config
        values: dict[str, int | float] = {
            "depth": self.depth,
            "model dim": config.n_embd,
            "heads": config.n_head,
            "sequence": config.sequence_len,
            "vocabulary": config.vocab_size,
            "parameters": self.num_params,
            "FLOPs per token": self.flops_per_token,
            "tokens": self.tokens,
            "total batch": self.total_batch_size,
            "iterations": self.num_iterations,
            "embedding lr": self.embedding_lr,
            "unembedding lr": self.unembedding_lr,
            "matrix lr": self.matrix_lr,
            "weight decay": self.weight_decay,
            "warmup": self.warmup_steps,
            "warmdown": self.warmdown_steps,
        }
        return [
            (name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}", self.formulas[name])
            for name, value in values.items()
        ]

    def __str__(self) -> str:
        return "\n".join(f"  {name:<16} {value:>20}  {formula}" for name, value, formula in self.rows())


def model_config(depth: int, sequence_len: int, vocab_size: int, *, kv_group: int = 1) -> GPTConfig:
    """The model of a depth: 64 channels a layer, rounded up to whole heads of 128.

    Args:
        depth: layers.
        sequence_len: context in tokens.
        vocab_size: of the tokenizer, special tokens included.
        kv_group: query heads that share one key and value head.
    """
    dim = -(-64 * depth // HEAD_DIM) * HEAD_DIM
    heads = dim // HEAD_DIM
    return GPTConfig(sequence_len, vocab_size, depth, heads, max(1, heads // kv_group), dim)


def plan(
    depth: int,
    *,
    sequence_len: int = 2048,
    vocab_size: int = 65_536,
    total_batch_size: int = 524_288,
    num_iterations: int = -1,
    target_flops: float = -1,
    target_param_data_ratio: float = 20,
    embedding_lr: float = 0.2,
    unembedding_lr: float = 0.004,
    matrix_lr: float = 0.02,
    weight_decay: float = 0.0,
    matrix_optimizer: str = "muon",
) -> Plan:
    """Derive a run. The first of num_iterations, target_flops and the ratio that is positive sets its length.

    Args:
        depth: layers, at least 1.
        sequence_len: tokens of a row.
        vocab_size: of the tokenizer.
        total_batch_size: tokens of one update, over all ranks and micro-batches.
        num_iterations: updates.
        target_flops: training FLOPs of the whole run.
        target_param_data_ratio: training tokens per parameter, all parameters counted.
        embedding_lr: AdamW's rate of the token embedding at 768 channels.
        unembedding_lr: AdamW's rate of the head at 768 channels.
        matrix_lr: the matrices' rate.
        weight_decay: AdamW's.
        matrix_optimizer: muon or adamw.

    Raises:
        ValueError: naming the argument that makes no run.
    """
    for name, value in (("depth", depth), ("sequence_len", sequence_len), ("total_batch_size", total_batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    config = model_config(depth, sequence_len, vocab_size)
    with torch.device("meta"):
        model = GPT(config)
    num_params, flops_per_token = model.num_params(), model.estimate_flops()
    if num_iterations > 0:
        iterations, formula = num_iterations, "as given"
    elif target_flops > 0:
        iterations = round(target_flops / (flops_per_token * total_batch_size))
        formula = f"target FLOPs {target_flops:.3g} / (FLOPs per token x total batch)"
    elif target_param_data_ratio > 0:
        iterations = round(target_param_data_ratio * num_params / total_batch_size)
        formula = f"{target_param_data_ratio:g} tokens per parameter / total batch"
    else:
        raise ValueError("one of num_iterations, target_flops and target_param_data_ratio must be positive")
    iterations = max(1, iterations)
    scale = (config.n_embd / 768) ** -0.5
    return Plan(
        depth=depth,
        model_config=config,
        num_params=num_params,
        flops_per_token=flops_per_token,
        tokens=iterations * total_batch_size,
        total_batch_size=total_batch_size,
        num_iterations=iterations,
        embedding_lr=embedding_lr * scale,
        unembedding_lr=unembedding_lr * scale,
        matrix_lr=matrix_lr,
        weight_decay=weight_decay,
        warmup_steps=min(WARMUP_STEPS, int(WARMUP_SHARE * iterations)),
        warmdown_steps=int(WARMDOWN_SHARE * iterations),
        momentum_steps=min(MOMENTUM_STEPS, int(MOMENTUM_SHARE * iterations)),
        formulas={
            "depth": "the dial",
            "model dim": f"64 x depth, up to a multiple of {HEAD_DIM}",
            "heads": f"model dim / {HEAD_DIM}",
            "sequence": "tokens of a row",
            "vocabulary": "the tokenizer's",
            "parameters": "2 x vocabulary x dim + 12 x depth x dim^2",
            "FLOPs per token": "6 x (parameters - token embedding) + 12 x depth x dim x sequence",
            "tokens": "iterations x total batch",
            "total batch": "tokens of one update",
            "iterations": formula,
            "embedding lr": f"{embedding_lr:g} x (dim / 768)^-0.5",
            "unembedding lr": f"{unembedding_lr:g} x (dim / 768)^-0.5",
            "matrix lr": f"{MATRIX_OPTIMIZERS[matrix_optimizer]}'s, whatever the width",
            "weight decay": "AdamW's",
            "warmup": f"min({WARMUP_STEPS}, {WARMUP_SHARE:g} x iterations) updates, linear",
            "warmdown": f"the last {WARMDOWN_SHARE:g} of the iterations, linear, to {FINAL_LR_MULTIPLIER:g}",
        },
    )
