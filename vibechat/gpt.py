"""The GPT: the whole model in one file.

Rotary positions, QK-norm, ReLU^2 MLP, RMSNorm without gain, a norm after the embedding, untied head, no biases,
grouped query heads, softcapped logits. The weights map one to one onto transformers' NanoChat model. Master weights are
float32; each matmul casts its weight to the dtype of its input, which `compute_dtype` chose once for the device (in
training the step has cast them already, so that `to` returns what it was given).

Shapes: B batch, T time, C channels (n_embd), H query heads, K key/value heads, D head_dim, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vibechat.adamw import DistAdamW
from vibechat.attention import attend
from vibechat.common import compute_dtype
from vibechat.fp8 import MULTIPLE, Fp8Linear, bound_of_attention
from vibechat.kernels import add_rms_norm, linear_cross_entropy, qk_norm_rope, relu2_mlp, rms_norm, rotary_tables
from vibechat.muon import Muon

ROPE_BASE = 10_000.0
SOFTCAP = 15.0
MATRIX_OPTIMIZERS = {"muon": "Muon", "adamw": "AdamW"}  # of the blocks; the first is the default


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT."""

    sequence_len: int = 1024
    """longest context, in tokens"""
    vocab_size: int = 50304
    """size of the vocabulary"""
    n_layer: int = 12
    """transformer blocks"""
    n_head: int = 6
    """query heads of a block"""
    n_kv_head: int = 6
    """key and value heads of a block; n_head must be a multiple"""
    n_embd: int = 768
    """channels; head_dim is n_embd / n_head, an even number"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"GPTConfig: {name}={value} must be at least 1")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise ValueError(f"GPTConfig: n_embd={self.n_embd} must give n_head={self.n_head} heads of an even size")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"GPTConfig: n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


class KeyValueStore(Protocol):
    """What the model asks of a cache (engine.KVCache is one)."""

    def get_pos(self) -> int:
        """How many positions are filled."""

    def insert_kv(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k and v (B, K, T, D) after the filled positions and return all, (B, K, pos + T, D)."""


class Attention(nn.Module):
    """Causal self-attention; one matmul for q, k and v from three parameters.

    `w_qkv` is these three packed (H D + 2 K D, C), where a training step did that for all its micro-batches.
    """

    w_qkv: Tensor | None

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        kv_channels = config.n_kv_head * config.head_dim
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, kv_channels, bias=False)
        self.c_v = nn.Linear(config.n_embd, kv_channels, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.register_buffer("w_qkv", None, persistent=False)
        self.fp8_qkv: Fp8Linear | None = None
        self.fp8_proj: Fp8Linear | None = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: KeyValueStore | None) -> Tensor:
        B, T, C = x.shape
        w_qkv = self.w_qkv
        if w_qkv is None:
            w_qkv = torch.cat((self.c_q.weight, self.c_k.weight, self.c_v.weight)).to(x.dtype)
        qkv = (self.fp8_qkv or F.linear)(x, w_qkv).view(B, T, -1, self.head_dim)  # (B, T, H + 2 K, D)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        q, k = qk_norm_rope(q, k, cos, sin)
        if kv_cache is not None:
            k, v = kv_cache.insert_kv(self.layer_idx, k.transpose(1, 2), v.transpose(1, 2))
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        y = attend(q, k, v).reshape(B, T, C)
        w_proj = self.c_proj.weight.to(x.dtype)
        if self.fp8_proj is None or not torch.is_grad_enabled():
            return F.linear(y, w_proj)
        return self.fp8_proj(y, w_proj, bound_of_attention(w_qkv[-v.size(2) * self.head_dim :]))


class MLP(nn.Module):
    """The ReLU^2 MLP, four times as wide as the model."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)
        self.fp8_fc: Fp8Linear | None = None
        self.fp8_proj: Fp8Linear | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8_fc is None or self.fp8_proj is None or not torch.is_grad_enabled():
            return relu2_mlp(x, self.c_fc.weight, self.c_proj.weight)
        return self.fp8_proj(self.fp8_fc(x, self.c_fc.weight).relu().square(), self.c_proj.weight)


class Block(nn.Module):
    """Attention and MLP; each residual addition is fused with the norm that follows it."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer_idx)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, normed: Tensor, cos: Tensor, sin: Tensor, kv_cache: KeyValueStore | None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream (B, T, C) and its norm, after the block."""
        x, normed = add_rms_norm(x, self.attn(normed, cos, sin, kv_cache))
        return add_rms_norm(x, self.mlp(normed))


class Transformer(nn.Module):
    """The embedding and the blocks."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.n_layer))


class GPT(nn.Module):
    """A decoder-only transformer. Construct it, then `init_weights()` (or load a state dict)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = rotary_tables(config.sequence_len, config.head_dim, ROPE_BASE, self.get_device())
        self.register_buffer("cos", cos, persistent=False)  # (sequence_len, D/2), float32
        self.register_buffer("sin", sin, persistent=False)
        self.compute_dtype = torch.float32  # init_weights and set_compute_dtype choose for the device
        self.activation_checkpointing = False  # in training, compute each block's activations again in the backward

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize every parameter in place, where the model is, and choose the compute dtype of that device.

        The embedding is N(0, 1) (a norm follows it) and the head N(0, 1e-3), so that the first loss is ln V; the
        matrices into a block are uniform with standard deviation 1 / sqrt(C), those out of it zero, so that each block
        starts as the identity.
        """
        nn.init.normal_(self.transformer.wte.weight, std=1.0)
        nn.init.normal_(self.lm_head.weight, std=1e-3)
        bound = (3.0 / self.config.n_embd) ** 0.5
        for block in self.blocks():
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                nn.init.uniform_(linear.weight, -bound, bound)
            for linear in (block.attn.c_proj, block.mlp.c_proj):
                nn.init.zeros_(linear.weight)
        cos, sin = rotary_tables(self.config.sequence_len, self.config.head_dim, ROPE_BASE, self.get_device())
        self.cos.copy_(cos)  # a model built on the meta device has none yet
        self.sin.copy_(sin)
        self.set_compute_dtype(compute_dtype(self.get_device()))

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Run matmuls and activations in `dtype`; parameters stay as they are."""
        self.compute_dtype = dtype

    def set_fp8(self, on: bool) -> None:
        """Run the blocks' matmuls in fp8 where gradients are recorded (`vibechat.fp8`).

        Raises ValueError for a width that fp8 matmuls cannot take.
        """
        kv_channels = self.config.n_kv_head * self.config.head_dim
        if on and (self.config.n_embd % MULTIPLE or kv_channels % MULTIPLE):
            raise ValueError(f"fp8: {self.config.n_embd} channels are not a multiple of {MULTIPLE}")
        for block in self.blocks():
            block.attn.fp8_qkv, block.attn.fp8_proj = (Fp8Linear() if on else None for _ in range(2))
            block.mlp.fp8_fc, block.mlp.fp8_proj = (Fp8Linear() if on else None for _ in range(2))

    def blocks(self) -> Iterator[Block]:
        """The transformer blocks, in order."""
        for block in self.transformer.h:
            assert isinstance(block, Block)
            yield block

    def matmul_weights(self) -> dict[str, tuple[Tensor, ...]]:
        """What matmuls read, which a training step makes once and not at every use: {name: parameters, its rows}.

        The names are those that torch.func.functional_call puts tensors in the place of.
        """
        weights: dict[str, tuple[Tensor, ...]] = {"lm_head.weight": (self.lm_head.weight,)}
        for i, block in enumerate(self.blocks()):
            at, attn, mlp = f"transformer.h.{i}", block.attn, block.mlp
            weights[f"{at}.attn.w_qkv"] = (attn.c_q.weight, attn.c_k.weight, attn.c_v.weight)
            weights[f"{at}.attn.c_proj.weight"] = (attn.c_proj.weight,)
            weights[f"{at}.mlp.c_fc.weight"] = (mlp.c_fc.weight,)
            weights[f"{at}.mlp.c_proj.weight"] = (mlp.c_proj.weight,)
        return weights

    def fp8_weights(self) -> dict[str, str]:
        """{name of an `Fp8Linear`: name of its weight, of `matmul_weights`}; none without fp8."""
        pairs = {"attn.fp8_qkv": "attn.w_qkv", "attn.fp8_proj": "attn.c_proj.weight"}
        pairs |= {"mlp.fp8_fc": "mlp.c_fc.weight", "mlp.fp8_proj": "mlp.c_proj.weight"}
        names = [f"transformer.h.{i}." for i, block in enumerate(self.blocks()) if block.mlp.fp8_fc is not None]
        return {at + linear: at + weight for at in names for linear, weight in pairs.items()}

    def get_device(self) -> torch.device:
        """The device the model is on."""
        return self.lm_head.weight.device

    # -----------------------------------------------------------------------------------------------------------------
    # forward

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        kv_cache: KeyValueStore | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """Logits, or the loss where targets are given.

        Args:
            idx: (B, T) token ids.
            targets: (B, T) ids, -1 where a position does not count.
            kv_cache: filled positions before idx; k and v of idx are added.
            loss_reduction: "mean" or "sum" over the positions that count, or "none".

        Returns:
            Without targets: softcapped logits (B, T, V), float32. With: loss () in float32, or (B, T) for "none".

        Raises:
            ValueError: if the positions pass sequence_len.
        """
        start = 0 if kv_cache is None else kv_cache.get_pos()
        stop = start + idx.size(1)
        if stop > self.config.sequence_len:
            raise ValueError(f"{stop} positions do not fit sequence_len={self.config.sequence_len}")
        x = self._hidden(idx, self.cos[start:stop], self.sin[start:stop], kv_cache)  # (B, T, C)
        if targets is not None:
            return linear_cross_entropy(x, self.lm_head.weight, targets, softcap=SOFTCAP, reduction=loss_reduction)
        logits = F.linear(x, self.lm_head.weight.to(x.dtype)).float()
        return SOFTCAP * torch.tanh(logits / SOFTCAP)

    def _hidden(self, idx: Tensor, cos: Tensor, sin: Tensor, kv_cache: KeyValueStore | None) -> Tensor:
        """The normed residual stream after the last block, (B, T, C)."""
        x = rms_norm(F.embedding(idx, self.transformer.wte.weight).to(self.compute_dtype))  # (B, T, C)
        normed = rms_norm(x)
        for block in self.blocks():
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, normed = checkpoint(
                    block, x, normed, cos, sin, kv_cache, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x, normed = block(x, normed, cos, sin, kv_cache)
        return normed

    @torch.inference_mode()
    def generate(
        self, tokens: list[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 42
    ) -> Iterator[int]:
        """Yield max_tokens ids after `tokens`, one at a time, computing the whole context anew for each (no cache).

        Args:
            tokens: the prompt, at least one id; only the last sequence_len positions are seen.
            max_tokens: how many to yield.
            temperature: 0 takes the most likely token.
            top_k: sample among the k most likely only.
            seed: of the sampling; the same seed gives the same tokens.
        """
        device = self.get_device()
        rng = torch.Generator(device=device).manual_seed(seed)
        ids = torch.tensor([tokens], dtype=torch.long, device=device)
        for _ in range(max_tokens):
            logits = self(ids[:, -self.config.sequence_len :])[:, -1]  # (1, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -torch.inf)
            if temperature > 0:
                token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=rng)
            else:
                token = logits.argmax(-1, keepdim=True)
            ids = torch.cat((ids, token), dim=1)
            yield int(token)

    # -----------------------------------------------------------------------------------------------------------------
    # counting and optimizing

    def num_params(self) -> int:
        """All parameters, both embeddings included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def estimate_flops(self, *, causal: bool = False) -> int:
        """FLOPs that training on one token takes, forward and backward: 6 N + 12 L H D T.

        N counts every parameter but the token embedding, which is looked up, not multiplied. The attention term counts
        all T x T scores, as is customary; `causal` counts only those that causal attention needs, (T + 1) / 2 a query.
        """
        config = self.config
        multiplied = self.num_params() - self.transformer.wte.weight.numel()
        keys = (config.sequence_len + 1) / 2 if causal else config.sequence_len
        return int(6 * multiplied + 12 * config.n_layer * config.n_embd * keys)

    def setup_optimizers(
        self,
        unembedding_lr: float = 0.004,
        embedding_lr: float = 0.2,
        matrix_lr: float = 0.02,
        weight_decay: float = 0.0,
        *,
        matrix_optimizer: str = "muon",
        matrix_weight_decay: float = 0.1,
        normuon: bool = True,
    ) -> list[DistAdamW | Muon]:
        """[AdamW for embedding and head, Muon for the matrices of the blocks], or one AdamW for all.

        The rates of embedding and head are for 768 channels and scale with (n_embd / 768)^-0.5.

        Args:
            unembedding_lr: rate of the head.
            embedding_lr: rate of the token embedding.
            matrix_lr: rate of the matrices of the blocks, as it is.
            weight_decay: of AdamW.
            matrix_optimizer: "muon", or "adamw" with the usual betas of (0.9, 0.95), which wants a far smaller rate and
                does without the two below.
            matrix_weight_decay: of Muon, cautious.
            normuon: Muon with rows of one running size.

        Raises:
            ValueError: for another optimizer.
        """
        if matrix_optimizer not in MATRIX_OPTIMIZERS:
            raise ValueError(f"{matrix_optimizer!r} optimizes no matrices; one of {', '.join(MATRIX_OPTIMIZERS)}")
        scale = (self.config.n_embd / 768) ** -0.5
        matrices = list(self.transformer.h.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [self.lm_head.weight], "lr": unembedding_lr * scale},
            {"params": [self.transformer.wte.weight], "lr": embedding_lr * scale},
        ]
        if matrix_optimizer == "adamw":
            groups.append({"params": matrices, "lr": matrix_lr, "betas": (0.9, 0.95)})
        optimizers: list[DistAdamW | Muon] = [
            DistAdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=weight_decay)
        ]
        if matrix_optimizer == "muon":
            optimizers.append(Muon(matrices, lr=matrix_lr, weight_decay=matrix_weight_decay, normuon=normuon))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        return optimizers
