"""The matrix product that other kernels build on: persistent, fed by TMA, with a hook on its float32 accumulator.

    c = hook(a b^T)  with a (M, K) and b (N, K),    or    c = hook(a b)  with b (K, N)

A program per SM walks the tiles of c in groups of GROUP_M rows, so that the tiles in flight share operands in the L2
cache; the loop over tiles is flattened into the loop over K, so that a tile's first loads are under way while the last
one's result is stored. Operands arrive and the result leaves through tensor descriptors made on the host, which clip
what hangs over the edges of M, N and K. The result is stored in SPLIT pieces of the tile's columns, so that a third
or fourth stage of operands fits beside it in shared memory.

The hook is a Triton function, inlined where the accumulator of a piece is still in registers:

    hook(acc, aux, row, col, M, N, extra) -> piece of c

    acc    (BM, BN / SPLIT) in float32: the piece of the product whose first element is (row, col)
    aux    the same piece of a second (M, N) tensor, as it is stored, or None if the launch has none
    extra  the tuple that the launcher was given: pointers and numbers. Through them the hook loads what belongs to its
           rows or columns, and stores what it makes beside c: a partial sum of each row goes to
           partial[row + r, col // (BN / SPLIT)] of (M, cdiv(N, BN / SPLIT)), to be added up later in a fixed order.

Only c and aux are clipped for the hook. What it touches by pointer it masks itself, per row with `rows_of_piece`, which
also knows the pieces that lie beyond N; out there the accumulator holds zeros. It may branch on nothing but constants:
a loop with an `if` on a value in it cannot be flattened.

FLOPs: 2 M N K. Bytes, each operand read once: b (M K + N K + M N), one more M N for aux.
Sources: Triton's tutorial 09 on persistent matmul; modded-nanogpt's split epilogue.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vibechat.kernels.language import TensorDescriptor, device_of, tl, triton, triton_dtype, wide_dtype

HOPPER_SMS = 132  # of an H100 and an H200: what compiling without a GPU assumes


class MatmulConfig(NamedTuple):
    """How a matmul is launched."""

    block_m: int
    """rows of c a tile"""
    block_n: int
    """columns of c a tile"""
    block_k: int
    """of K a step"""
    group_m: int
    """tiles of M that are walked before the next column of tiles"""
    stages: int
    """steps of operands in flight"""
    warps: int
    """of a program"""
    split: int = 2
    """pieces that a tile's columns are stored in: 1, 2 or 4"""
    per_sm: int = 1
    """programs that share an SM"""

    @property
    def piece(self) -> int:
        """Columns of the pieces that the hook sees."""
        return self.block_n // self.split


DEFAULT = MatmulConfig(128, 256, 64, 8, 3, 8)
CONFIGS = (  # what bench.tune tries: at most six
    DEFAULT,
    MatmulConfig(128, 256, 64, 16, 3, 8),
    MatmulConfig(128, 256, 64, 8, 4, 8),
    MatmulConfig(256, 128, 64, 8, 3, 8),
    MatmulConfig(128, 128, 64, 8, 4, 8),
    MatmulConfig(128, 128, 64, 8, 3, 8, 2, 2),
)

# ---------------------------------------------------------------------------------------------------------------------
# the kernel

if triton is not None:

    @triton.jit
    def identity(acc, aux, row, col, M, N, extra):  # type: ignore[no-untyped-def]
        """The hook of a plain product."""
        return acc

    @triton.jit
    def rows_of_piece(acc, row, col, M, N):  # type: ignore[no-untyped-def]
        """For hooks: the rows of c that a piece covers, and which of them are there to be read or written for it."""
        rows = row + tl.arange(0, acc.shape[0])
        return rows, rows < tl.where(col < N, M, 0)

    @triton.jit
    def tile_origin(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP_M: tl.constexpr):  # type: ignore[no-untyped-def]
        """(first row, first column) of a tile, down a group of GROUP_M tiles of M and then across N."""
        tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
        group = tile // (GROUP_M * tiles_n)
        rows = min(tiles_m - group * GROUP_M, GROUP_M)  # of this group; the last may be short
        within = tile % (GROUP_M * tiles_n)
        return (group * GROUP_M + within % rows) * BM, (within // rows) * BN

    @triton.jit
    def _halves(x):  # type: ignore[no-untyped-def]
        """The left and the right half of x's columns."""
        return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))

    @triton.jit
    def _finish(acc, c_desc, aux_desc, row, col, M, N, extra, HOOK: tl.constexpr):  # type: ignore[no-untyped-def]
        aux = None
        if aux_desc is not None:
            aux = aux_desc.load([row, col])
        c_desc.store([row, col], HOOK(acc, aux, row, col, M, N, extra).to(c_desc.dtype))

    @triton.jit
    def matmul_tma(  # type: ignore[no-untyped-def]
        a_desc, b_desc, c_desc, aux_desc, M, N, K, extra,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, SPLIT: tl.constexpr,
        B_IS_KN: tl.constexpr, HOOK: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        steps = tl.cdiv(K, BK)
        tl.assume(steps > 0)
        tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            row, col = tile_origin(tile, M, N, BM, BN, GROUP_M)
            acc = tl.zeros((BM, BN), WIDE)
            for k in range(steps):
                a = a_desc.load([row, k * BK])
                if B_IS_KN:
                    b = b_desc.load([k * BK, col])
                else:
                    b = b_desc.load([col, k * BK]).T
                acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=WIDE)
            if SPLIT == 1:
                _finish(acc, c_desc, aux_desc, row, col, M, N, extra, HOOK)
            else:
                left, right = _halves(acc)
                for _half in tl.static_range(2):
                    if SPLIT == 2:
                        _finish(left, c_desc, aux_desc, row, col, M, N, extra, HOOK)
                    else:
                        first, second = _halves(left)
                        _finish(first, c_desc, aux_desc, row, col, M, N, extra, HOOK)
                        _finish(second, c_desc, aux_desc, row, col + BN // 4, M, N, extra, HOOK)
                    left, col = right, col + BN // 2


# ---------------------------------------------------------------------------------------------------------------------
# the launcher


def tma_refusal(**operands: Tensor) -> str | None:
    """Why TMA cannot move one of these matrices, by its name, or None: rows of contiguous elements that begin at
    multiples of 16 bytes and do not overlap, and at least one element."""
    for name, x in operands.items():
        sixteen = 16 // x.element_size()
        if x.numel() == 0:
            return f"{name} is empty"
        if x.stride(-1) != 1 and x.size(-1) != 1:
            return f"the rows of {name} are not contiguous"
        if x.data_ptr() % 16 or (x.stride(0) % sixteen or x.stride(0) < x.size(-1)):
            return f"the rows of {name} do not begin at multiples of 16 bytes"
    return None


def _programs(tiles: int, config: MatmulConfig, device: torch.device) -> int:
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else HOPPER_SMS
    return min(tiles, sms * config.per_sm)


def launch(
    a: Tensor,
    b: Tensor,
    *,
    hook: Any = None,
    aux: Tensor | None = None,
    extra: Sequence[Any] | None = None,
    b_is_kn: bool = False,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: MatmulConfig = DEFAULT,
) -> Tensor:
    """hook(a b^T), or hook(a b), computed in float32 (float64 for float64) and rounded once.

    Args:
        a: (M, K), in float16 or bfloat16 on a GPU; any row stride that TMA can step.
        b: (N, K), or (K, N) with `b_is_kn`, in a's dtype.
        hook: the Triton function of the module's docstring; None for the plain product.
        aux: (M, N), of which the hook gets the piece that it makes.
        extra: pointers (tensors) and numbers that the hook gets as a tuple.
        b_is_kn: whether b's rows are K.
        out: (M, N), written and returned, instead of a new tensor.
        out_dtype: of the new tensor; a's dtype if None.
        config: tiles and stages.

    Returns:
        (M, N).

    Raises:
        ValueError: naming the operand that TMA cannot move, or shapes that do not fit.
    """
    (M, K), N = a.shape, b.size(1) if b_is_kn else b.size(0)
    if b.shape != ((K, N) if b_is_kn else (N, K)) or a.dtype != b.dtype:
        raise ValueError(f"matmul: a {tuple(a.shape)} {a.dtype} and b {tuple(b.shape)} {b.dtype} do not fit")
    c = torch.empty((M, N), dtype=out_dtype or a.dtype, device=a.device) if out is None else out
    operands = {"a": a, "b": b, "c": c} | ({} if aux is None else {"aux": aux})
    if any(x.shape != (M, N) for x in (c, *(() if aux is None else (aux,)))):
        raise ValueError(f"matmul: out and aux must be {(M, N)}")
    refusal = tma_refusal(**operands)
    if refusal is not None:
        raise ValueError(f"matmul: {refusal}")
    BM, BN, BK, piece = config.block_m, config.block_n, config.block_k, config.piece
    describe = TensorDescriptor.from_tensor
    tiles = -(-M // BM) * -(-N // BN)
    with device_of(a):
        matmul_tma[(_programs(tiles, config, a.device),)](
            describe(a, [BM, BK]),
            describe(b, [BK, BN] if b_is_kn else [BN, BK]),
            describe(c, [BM, piece]),
            None if aux is None else describe(aux, [BM, piece]),
            M, N, K, None if extra is None else tuple(extra),
            BM=BM, BN=BN, BK=BK, GROUP_M=config.group_m, SPLIT=config.split, B_IS_KN=b_is_kn,
            HOOK=identity if hook is None else hook, WIDE=triton_dtype(wide_dtype(a.dtype)),
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return c
