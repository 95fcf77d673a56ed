"""The ops with kernels, the one where most is gained first. Each entry stands in a file of its own."""

from bench.ops.entry import Inputs, Launch, Op
from bench.ops.loss import LINEAR_CROSS_ENTROPY
from bench.ops.mlp import RELU2_MLP
from bench.ops.newton_schulz import NEWTON_SCHULZ_SQUARE, NEWTON_SCHULZ_WIDE
from bench.ops.norms import ADD_RMS_NORM, RMS_NORM
from bench.ops.rope import QK_NORM_ROPE

_OPS = (
    *(LINEAR_CROSS_ENTROPY, QK_NORM_ROPE, RELU2_MLP, ADD_RMS_NORM, RMS_NORM),
    *(NEWTON_SCHULZ_SQUARE, NEWTON_SCHULZ_WIDE),
)
OPS = {op.name: op for op in _OPS}

__all__ = ["OPS", "Inputs", "Launch", "Op"]
