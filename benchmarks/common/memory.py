"""How much memory one call needs beside the weights."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Memory(NamedTuple):
    """MiB at the peak of one call.

    Attributes:
        peak: all that the allocator had given out, weights included; None on a CPU, whose allocator doesn't count.
        step: what the call added to what was there before it: activations, gradients, temporary tensors, results.
    """

    peak: float | None
    step: float


def memory_of(device: torch.device, function: Callable[[], object]) -> Memory:
    """Measured in one call: from the allocator on a GPU, from the tensors that operators return on a CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return Memory(peak / 2**20, (peak - before) / 2**20)
    with LiveBytes() as live:
        function()
    return Memory(None, live.peak / 2**20)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators make inside, on any device.

    What an operator allocates and frees before it returns is not seen.

    Attributes:
        now: bytes of those that are still alive.
        peak: the most that were alive at once.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        given = {s._cdata for s in _storages((args, kwargs))}
        out = operator(*args, **(kwargs or {}))
        for storage in _storages(out):
            key = storage._cdata
            if key not in given and key not in self._sizes:  # neither a view nor written in place
                self._sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, key)
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _storages(tree) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
