"""Causal attention for training and for decoding with a cache: one function, `attend`, over several implementations.

A query at row i of T stands at position S - T + i of the S keys, and sees the keys up to itself. So T = S is training
or prefill, T = 1 is a decoding step, and anything between is a chunk of a prompt that follows what a cache holds.

What runs, unless `set_attention` or $VIBECHAT_ATTENTION says otherwise:

    CUDA, 9.0 and later    cuDNN, else flash-attention (3, 4 or 2 if installed, else PyTorch's own 2), else the rest
    CUDA, older            PyTorch's own order, flash-attention 2 first, and the package of it if it is installed
    CUDA, sliding window   FlexAttention, with a cached block mask, which skips the blocks that nobody sees; for
      or documents         decoding and chunks a masked F.scaled_dot_product_attention on the keys within the window
    CPU, compiled training attention_blocked
    everything else        F.scaled_dot_product_attention

PyTorch's own order on Hopper takes flash-attention 2, where cuDNN is 1.7 to 2.3 times faster at training shapes
(huggingface/transformers PR 48163). The order is set once for the process, not around each call: entering
torch.nn.attention.sdpa_kernel takes 45 us of Python, and what torch.compile traces sees it all the same.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
import weakref
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from vibechat.attention_blocked import LONGEST, blocked_attention, blocks
from vibechat.common import UserError

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
NAMES = {CUDNN: "cuDNN", FLASH: "flash-attention", EFFICIENT: "memory-efficient", MATH: "unfused"}
# What may be asked for, and the order of F.scaled_dot_product_attention's backends then; None is PyTorch's own.
ORDERS: dict[str, tuple[SDPBackend, ...] | None] = {
    "auto": (CUDNN, FLASH, EFFICIENT, MATH),
    "cudnn": (CUDNN, FLASH, EFFICIENT, MATH),
    "flash": (FLASH, EFFICIENT, MATH),
    "efficient": (EFFICIENT, MATH),
    "math": (MATH,),
    "flex": (CUDNN, FLASH, EFFICIENT, MATH),
    "sdpa": None,
}
# Packages that replace PyTorch's own flash-attention 2, by the compute capability's major number. 3 and 4 PyTorch calls
# in its place; the package of 2 is called here, and needs FlexAttention for documents alone.
_FA2, _FA3, _FA4 = ("FA2", "flash_attn"), ("FA3", "flash_attn_interface"), ("FA4", "flash_attn.cute")
FLASH_PACKAGES = {8: (_FA2,), 9: (_FA3, _FA4, _FA2), 10: (_FA4, _FA2), 12: (_FA2,)}
OLDEST_FA2 = (2, 7)  # which torch.compile can trace
WIDEST_FA2 = 256  # channels of a head
STEADY = 128  # cuDNN builds a plan for each new shape, Flex a kernel; lengths that grow token by token would need many

_requested: str | None = None  # what set_attention asked for
_prepared: dict[tuple[str, str], str] = {}  # (request, kind of device) -> the flash-attention in use there
_flash_attn: Any = None  # the package of flash-attention 2, where it was found and can be used
_packaged: dict[tuple[str, torch.device, torch.dtype, int], bool] = {}  # what _takes_package found out
_order = contextlib.ExitStack()  # holds the order that is in force


# ---------------------------------------------------------------------------------------------------------------------
# attending


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    documents: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D), causal) v. Views of one packed projection are read in place.

    Args:
        q: (B, T, H, D).
        k: (B, S, H_kv, D), S >= T, H a multiple of H_kv (grouped-query attention shares each key head).
        v: like k.
        window: how many keys a query sees at most, itself among them; None is all before it.
        documents: (B, S) integers; a query sees only keys of its own document.
        lengths: (B,) integers of at least T: row b holds keys up to lengths[b], and its queries are the last T of
            them. For decoding sequences of unequal lengths from one cache.

    Returns:
        (B, T, H, D).

    Raises:
        ValueError: for a window below 1, or documents and lengths at once.
    """
    if window is not None and window < 1:
        raise ValueError(f"attend: window={window} must be at least 1")
    if documents is not None and lengths is not None:
        raise ValueError("attend: documents and lengths cannot be given at once")
    T, S = q.size(1), k.size(1)
    if window is not None and window >= S:
        window = None
    if documents is None and _takes_package(q) and not (lengths is not None and q.requires_grad):
        return _package(q, k, v, window, lengths)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    grouped = q.size(1) != k.size(1)
    masked = window is not None or documents is not None or lengths is not None
    if T == S and lengths is None and not grouped and _blocked_is_faster(q):
        y = blocked_attention(q, k, v, window, documents)
    elif T == S and lengths is None and _takes_flex(q, masked):
        y = _flex(q, k, v, window, documents)
    elif masked:
        y = _masked(q, k, v, window, documents, lengths)
    else:
        y = _causal(q, k, v)
    return y.transpose(1, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain causal attention on (B, H, T, D)."""
    T, S, grouped = q.size(2), k.size(2), q.size(1) != k.size(1)
    if T == S and (T % STEADY == 0 or not q.is_cuda or torch.compiler.is_compiling()):
        _prepare(_requested, q.device)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    with _without_cudnn(q):
        if T == S:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        if T == 1:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        seen = seen_keys(T, S, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, documents: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """Attention under an explicit mask; a window's keys are cut out before, a block of queries at a time."""
    T, S, grouped = q.size(2), k.size(2), q.size(1) != k.size(1)
    parts = [(0, T, 0, S)]  # queries start to stop, keys first to last
    if window is not None and lengths is None:
        before = S - T  # keys of the cache
        cuts = blocks(S, window) if T == S else [(before, S, max(0, before - window + 1))]
        parts = [(start - before, stop - before, first, stop) for start, stop, first in cuts]
    outputs = []
    with _without_cudnn(q):
        for start, stop, first, last in parts:
            own = None if documents is None else documents[:, first:last]
            seen = seen_keys(stop - start, last - first, q.device, window=window, documents=own, lengths=lengths)
            some_k, some_v = k[:, :, first:last], v[:, :, first:last]
            some_q = q[:, :, start:stop]
            outputs.append(F.scaled_dot_product_attention(some_q, some_k, some_v, attn_mask=seen, enable_gqa=grouped))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def seen_keys(
    T: int,
    S: int,
    device: torch.device,
    *,
    window: int | None = None,
    documents: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Which of S keys each of the last T queries sees, bool, (1 or B, 1, T, S); arguments as `attend` takes them."""
    keys = torch.arange(S, device=device)
    queries = keys[S - T :, None] if lengths is None else (lengths[:, None] + keys[None, :T] - T)[..., None]
    seen = keys <= queries  # (T, S), or (B, T, S) with lengths
    if window is not None:
        seen = seen & (keys > queries - window)
    if documents is not None:
        seen = seen & (documents[:, S - T :, None] == documents[:, None, :])
    return seen.view(-1, 1, T, S)


def _blocked_is_faster(q: Tensor) -> bool:
    if not (q.device.type == "cpu" and torch.compiler.is_compiling() and q.size(2) <= LONGEST):
        return False
    return torch.is_grad_enabled() and q.requires_grad and requested_attention(_requested) == "auto"


# ---------------------------------------------------------------------------------------------------------------------
# the package of flash-attention 2 (Dao 2023, arXiv 2307.08691), which has windows and ragged lengths of its own


def _takes_package(q: Tensor) -> bool:
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or q.size(-1) > WIDEST_FA2:
        return False
    return _package_is_preferred(_requested, q.device, q.dtype, q.size(-1))


@torch.compiler.assume_constant_result
def _package_is_preferred(requested: str | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether it is installed, and PyTorch would take its own flash-attention 2 there."""
    key = (requested_attention(requested), device, dtype, head_dim)
    if key not in _packaged:
        asked_for = key[0] in ("auto", "flash") and _prepare(requested, device) not in ("2", "3", "4")
        _packaged[key] = asked_for and _chosen(device, dtype, head_dim) == FLASH
    return _packaged[key]


def _package(q: Tensor, k: Tensor, v: Tensor, window: int | None, lengths: Tensor | None) -> Tensor:
    """On (B, T, H, D), as `attend` takes them; causal masks are aligned at the last query and the last key."""
    reach = (-1, -1) if window is None else (window - 1, 0)  # keys before and after a query's own
    if lengths is not None:
        filled = lengths.to(torch.int32)
        return _flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=filled, causal=True, window_size=reach)
    exactly = torch.are_deterministic_algorithms_enabled()
    return _flash_attn.flash_attn_func(q, k, v, causal=True, window_size=reach, deterministic=exactly)


# ---------------------------------------------------------------------------------------------------------------------
# FlexAttention (Dong et al. 2024, arXiv 2412.05496)


def _takes_flex(q: Tensor, masked: bool) -> bool:
    if not q.is_cuda or q.dtype == torch.float64 or not (masked or requested_attention(_requested) == "flex"):
        return False
    return q.size(2) % STEADY == 0 or (torch.is_grad_enabled() and q.requires_grad)


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int | None, documents: Tensor | None) -> Tensor:
    """FlexAttention on (B, H, T, D), compiled; inside a compiled model it becomes part of that graph."""
    grouped = q.size(1) != k.size(1)
    mask = block_mask(q.size(2), window, documents, q.device)
    compiling = torch.compiler.is_compiling()
    flex = flex_attention if compiling else _compiled_flex()
    return cast(Tensor, flex(q, k, v, block_mask=mask, enable_gqa=grouped))


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return cast(Callable[..., Tensor], torch.compile(flex_attention, dynamic=False))


def _block_mask(T: int, window: int | None, documents: Tensor | None, device: torch.device) -> BlockMask:
    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = query >= key
        if window is not None:
            visible = visible & (query - key < window)
        if documents is not None:
            visible = visible & (documents[b, query] == documents[b, key])
        return visible

    return create_block_mask(seen, None if documents is None else documents.size(0), None, T, T, device=str(device))


class _Kept(NamedTuple):
    """The mask of the documents that were asked for last."""

    documents: "weakref.ref[Tensor]"
    version: int
    window: int | None
    mask: BlockMask


class _Windows:
    """Its attributes are the block masks of windows: what torch.compile finds there is an input of its graph."""


_windows = _Windows()
_kept: list[_Kept] = []


@torch.compiler.assume_constant_result
def _window_mask(T: int, window: int | None, device: torch.device) -> str:
    """The name of the attribute of `_windows` that is this mask; made if it is not there yet."""
    name = f"of_{T}_{window}_{device}"
    if not hasattr(_windows, name):
        setattr(_windows, name, _block_mask(T, window, None, device))
    return name


def block_mask(T: int, window: int | None, documents: Tensor | None, device: torch.device) -> BlockMask:
    """The block mask of T queries and keys, made once for each (T, window) and once for each tensor of documents.

    In a graph that torch.compile makes, that of documents is made there, and equal ones of several layers are merged.
    """
    if documents is None:
        return cast(BlockMask, getattr(_windows, _window_mask(T, window, device)))
    if torch.compiler.is_compiling():
        return _block_mask(T, window, documents, device)
    if _kept:
        kept = _kept[0]
        if kept.documents() is documents and (kept.version, kept.window) == (documents._version, window):
            return kept.mask
    mask = _block_mask(T, window, documents, device)
    _kept[:] = [_Kept(weakref.ref(documents), documents._version, window, mask)]
    return mask


# ---------------------------------------------------------------------------------------------------------------------
# choosing


def set_attention(way: str) -> None:
    """Ask for an implementation: auto, cudnn, flash, efficient, flex, math, or sdpa (PyTorch's own order).

    Raises UserError for another word. Whether the device has it, `attention_backend` says.
    """
    global _requested
    if way not in ORDERS:
        raise UserError(f"--attention {way}: unknown; one of {', '.join(ORDERS)}")
    _requested = way


@torch.compiler.assume_constant_result
def requested_attention(said: str | None = None) -> str:
    """What was asked for: `said`, else $VIBECHAT_ATTENTION, else auto."""
    way = said or _requested or os.environ.get("VIBECHAT_ATTENTION") or "auto"
    if way not in ORDERS:
        raise UserError(f"VIBECHAT_ATTENTION={way}: unknown; one of {', '.join(ORDERS)}")
    return way


def attention_backend(device: torch.device, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128) -> str:
    """What `attend` runs in training on this device, in the words of the table that a run begins with.

    Raises UserError, in one line, where what was asked for cannot be had there.
    """
    way = requested_attention()
    if device.type != "cuda" and way in ("cudnn", "flash", "efficient", "flex"):
        raise UserError(f"--attention {way}: it needs a CUDA GPU, and this is {device.type}; use auto, sdpa or math")
    flash = _prepare(_requested, device)
    if device.type == "cpu" and way == "auto":
        return f"blocked matmuls up to {LONGEST} tokens where compiled, else scaled_dot_product_attention"
    if device.type != "cuda":
        return "scaled_dot_product_attention" + (" (unfused)" if way == "math" else "")
    if way == "flex":
        return "FlexAttention, asked for"
    chosen = _chosen(device, dtype, head_dim)
    wanted = (ORDERS[way] or (chosen,))[0]
    if way not in ("auto", "sdpa") and chosen != wanted:
        why = " with --deterministic" if torch.are_deterministic_algorithms_enabled() else ""
        raise UserError(f"--attention {way}: PyTorch cannot use it here{why} (it takes {NAMES[chosen]}); use auto")
    name = f"flash-attention {flash}" if chosen == FLASH else NAMES[chosen]
    said = "" if way == "auto" else ", asked for" if way != "sdpa" else ", PyTorch's own choice"
    packaged = _package_is_preferred(_requested, device, dtype, head_dim)
    return f"{name}{said}; FlexAttention for {'' if packaged else 'windows and '}documents"


def _chosen(device: torch.device, dtype: torch.dtype, head_dim: int) -> SDPBackend:
    """What F.scaled_dot_product_attention takes for a row of training, asked of itself."""
    q = torch.empty(1, 1, STEADY, head_dim, device=device, dtype=dtype, requires_grad=True)
    return SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True))


@torch.compiler.assume_constant_result
def _prepare(requested: str | None, device: torch.device) -> str:
    """Put the order in force that was asked for; returns which flash-attention there is. Once for each request."""
    way = requested_attention(requested)
    if (way, device.type) not in _prepared and (device.type == "cuda" or way == "math"):
        _order.close()
        _prepared.clear()
        _packaged.clear()
        order = ORDERS[way]
        old = way == "auto" and torch.cuda.get_device_capability(device) < (9, 0)
        if order is not None and not old:
            _order.enter_context(sdpa_kernel(list(order), set_priority=True))
        newest = device.type == "cuda" and FLASH in (order or ())
        _prepared[way, device.type] = _newest_flash(device) if newest else "2"
    return _prepared.get((way, device.type), "2")


def _newest_flash(device: torch.device) -> str:
    """Have PyTorch's flash backend run a newer package if one is installed, or find that of 2; returns its number."""
    global _flash_attn
    for name, module in FLASH_PACKAGES.get(torch.cuda.get_device_capability(device)[0], ()):
        try:
            if importlib.util.find_spec(module) is None:
                continue
            if name != "FA2":
                activate_flash_attention_impl(name)
                return name.removeprefix("FA")
            package = importlib.import_module(module)
            if hasattr(package, "flash_attn_func"):  # without it the directory is a part of 4
                version = str(package.__version__)
                if tuple(map(int, version.split(".")[:2])) < OLDEST_FA2:
                    raise ImportError(f"it is {version}, and {OLDEST_FA2[0]}.{OLDEST_FA2[1]} is needed")
                _flash_attn = package
                return f"{version} (flash_attn)"
        except ModuleNotFoundError:
            continue
        except Exception as error:  # a package that was built for something else fails in its own ways
            warnings.warn(f"attention: {module} is installed but cannot be used: {error}", stacklevel=2)
    return "2"


@contextlib.contextmanager
def _cudnn_off() -> Generator[None]:
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def _without_cudnn(q: Tensor) -> contextlib.AbstractContextManager[None]:
    """Keeps cuDNN out of shapes that change with every call, where it would build a plan for each."""
    if not q.is_cuda or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    _prepare(_requested, q.device)
    return _cudnn_off() if torch.backends.cuda.cudnn_sdp_enabled() else contextlib.nullcontext()
