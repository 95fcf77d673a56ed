"""Inference: the key-value cache."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer for the positions seen so far.

    The storage, (layers, 2, B, H, capacity, D), is made by the first insertion, which says dtype and device, and
    doubles when it is full, so that a cache may be given a generous `seq_len` and costs only what is used.
    """

    def __init__(self, batch_size: int, num_heads: int, seq_len: int, head_dim: int, num_layers: int) -> None:
        """
        Args:
            batch_size: B, sequences side by side.
            num_heads: H, key/value heads.
            seq_len: the most positions that it may hold.
            head_dim: D.
            num_layers: layers.
        """
        self.batch_size, self.num_heads, self.seq_len = batch_size, num_heads, seq_len
        self.head_dim, self.num_layers = head_dim, num_layers
        self._storage: Tensor | None = None
        self._pos = 0

    def reset(self) -> None:
        """Forget every position; the storage stays."""
        self._pos = 0

    def get_pos(self) -> int:
        """How many positions are filled."""
        return self._pos

    def insert_kv(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k and v, (B, H, T, D), of one layer after the filled positions; the last layer's insertion advances them.

        Returns:
            The layer's keys and values so far, both (B, H, pos + T, D), views of the storage.

        Raises:
            ValueError: if the shape is not the cache's, or T more positions do not fit.
        """
        T = k.size(2)
        if k.shape != (self.batch_size, self.num_heads, T, self.head_dim) or v.shape != k.shape:
            raise ValueError(
                f"KVCache: k {tuple(k.shape)} and v {tuple(v.shape)} must be "
                f"({self.batch_size}, {self.num_heads}, T, {self.head_dim})"
            )
        stop = self._pos + T
        if stop > self.seq_len:
            raise ValueError(f"KVCache: {stop} positions do not fit seq_len={self.seq_len}")
        storage = self._grown(stop, k.dtype, k.device)
        storage[layer_idx, 0, :, :, self._pos : stop] = k
        storage[layer_idx, 1, :, :, self._pos : stop] = v
        if layer_idx == self.num_layers - 1:
            self._pos = stop
        return storage[layer_idx, 0, :, :, :stop], storage[layer_idx, 1, :, :, :stop]

    def prefill(self, other: "KVCache") -> None:
        """Take over what `other` holds; its one sequence is repeated where this cache has several.

        Raises:
            ValueError: if this cache is not empty, or the two do not fit.
        """
        if self._pos:
            raise ValueError("KVCache: only an empty cache can be prefilled")
        if other._storage is None or other._pos == 0:
            raise ValueError("KVCache: the cache to prefill from is empty")
        same = ("num_heads", "head_dim", "num_layers")
        if any(getattr(self, name) != getattr(other, name) for name in same):
            raise ValueError("KVCache: the two caches differ in heads, head_dim or layers")
        if other.batch_size not in (1, self.batch_size) or other._pos > self.seq_len:
            raise ValueError(
                f"KVCache: {other.batch_size} sequences of {other._pos} do not fit {self.batch_size} of {self.seq_len}"
            )
        storage = self._grown(other._pos, other._storage.dtype, other._storage.device)
        storage[:, :, :, :, : other._pos] = other._storage[:, :, :, :, : other._pos]
        self._pos = other._pos

    def _grown(self, positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The storage, with room for so many positions."""
        capacity = 0 if self._storage is None else self._storage.size(4)
        if self._storage is None or capacity < positions:
            capacity = min(max(positions, 2 * capacity, 64), self.seq_len)
            shape = (self.num_layers, 2, self.batch_size, self.num_heads, capacity, self.head_dim)
            grown = torch.empty(shape, dtype=dtype, device=device)
            if self._storage is not None:
                grown[:, :, :, :, : self._storage.size(4)] = self._storage
            self._storage = grown
        return self._storage
