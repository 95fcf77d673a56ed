"""The fused ops, and the choice between their implementations. This is the whole public face.

Tensors are (batch B, time T, channels C) or (B, T, heads H, head_dim D). Each op's file says what it computes
and costs.
"""

from vibechat.kernels.backend import BACKENDS, OPS, Choice, backend_table, choose, set_backend, tuning_advice
from vibechat.kernels.linear_cross_entropy import linear_cross_entropy
from vibechat.kernels.newton_schulz import newton_schulz
from vibechat.kernels.qk_norm_rope import qk_norm_rope, rotary_tables
from vibechat.kernels.relu2_mlp import relu2_mlp
from vibechat.kernels.rms_norm import add_rms_norm, rms_norm

__all__ = [
    "BACKENDS",
    "OPS",
    "Choice",
    "add_rms_norm",
    "backend_table",
    "choose",
    "linear_cross_entropy",
    "newton_schulz",
    "qk_norm_rope",
    "relu2_mlp",
    "rms_norm",
    "rotary_tables",
    "set_backend",
    "tuning_advice",
]
