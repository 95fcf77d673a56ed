"""What tests do to models before they compute with them."""

import torch

from vibechat.gpt import GPT


def fill_projections(model: GPT, std: float) -> None:
    """Normal weights where blocks begin with zeros, which hide what is behind them and half of the gradients."""
    for block in model.blocks():
        for linear in (block.attn.c_proj, block.mlp.c_proj):
            torch.nn.init.normal_(linear.weight, std=std)
