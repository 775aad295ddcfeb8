"""Tile sizes per architecture, head dim and element size, and what fits on which part."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton

from ..._version import __version__
from ...env import cache_folder

# The most rows that a tile has.
MAX_BLOCK = 128


@dataclass(frozen=True)
class Tile:
    """block_m packed query rows x block_n keys per step, and how the compiler spreads them."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def arguments(self) -> dict[str, int | bool]:
        """Of a kernel's launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    def block_n_mixed(self, mixes: bool) -> int:
        """Keys per step of the mixed prompt: two streams' tiles in the place of one."""
        return max(16, self.block_n // 2) if mixes else self.block_n


# Head dims of the table: a call takes the first that both of its own, padded, fit in.
HEAD_DIMS = (64, 128, 256)
# Two parts: a tile that stands in both streams, of the forward (shared_qkv, beta) or of dq (shared_qkv).
KERNELS = ("forward", "forward_two_parts", "dq", "dq_two_parts", "dkv")

# Bytes that one block may have, by compute capability times 10.
SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
SHARED_MEMORY = {arch: kilobytes * 1024 for arch, kilobytes in SHARED_MEMORY.items()}

# One tile per head dim. They were found by compiling, nothing here has been timed: large tiles that keep everything in
# registers (``python -m bitune_kernels.testing.compiled`` shows it). 86 stands for all parts with its shared memory.
# fmt: off
HALF = {  # float16, bfloat16
    80: {
        "forward":           (Tile(128,  64, 4, 3), Tile(128,  64, 8, 2), Tile( 64,  64, 8, 1)),
        "forward_two_parts": (Tile(128,  64, 8, 3), Tile( 64,  64, 8, 2), Tile( 32,  64, 8, 1)),
        "dq":                (Tile(128,  64, 8, 2), Tile( 64,  64, 8, 2), Tile( 32,  64, 8, 1)),
        "dq_two_parts":      (Tile(128,  64, 8, 2), Tile( 64,  64, 8, 2), Tile( 32,  64, 8, 1)),
        "dkv":               (Tile( 64, 128, 8, 2), Tile( 64,  64, 8, 2), Tile( 64,  32, 8, 2)),
    },
    86: {
        "forward":           (Tile(128,  64, 4, 3), Tile(128,  64, 8, 2), Tile( 64,  64, 8, 1)),
        "forward_two_parts": (Tile(128,  64, 8, 3), Tile( 64,  64, 8, 2), Tile( 32,  64, 8, 1)),
        "dq":                (Tile(128,  64, 8, 2), Tile( 64,  64, 8, 1), Tile( 32,  64, 8, 1)),
        "dq_two_parts":      (Tile(128,  64, 8, 2), Tile( 64,  64, 8, 1), Tile( 32,  64, 8, 1)),
        "dkv":               (Tile( 64, 128, 8, 2), Tile( 64,  64, 8, 2), Tile( 32,  32, 4, 1)),
    },
    90: {  # from 64 rows on (of keys, in dkv) a tile gets Hopper's own matrix instructions
        "forward":           (Tile(128, 128, 8, 3), Tile(128,  64, 8, 3), Tile(128,  32, 8, 3)),
        "forward_two_parts": (Tile(128,  64, 8, 3), Tile(128,  64, 8, 3), Tile( 64,  16, 8, 3)),
        "dq":                (Tile(128,  64, 8, 3), Tile(128,  64, 8, 2), Tile(128,  16, 8, 3)),
        "dq_two_parts":      (Tile(128,  64, 8, 3), Tile(128,  64, 8, 2), Tile( 64,  16, 8, 3)),
        "dkv":               (Tile( 64, 128, 8, 3), Tile( 32, 128, 8, 3), Tile( 16,  64, 8, 2)),
    },
    100: {  # likewise, but at head dim 256 most of its backward spills there, and takes the older instructions
        "forward":           (Tile(128, 128, 8, 3), Tile(128,  64, 8, 3), Tile( 64,  64, 8, 2)),
        "forward_two_parts": (Tile(128,  64, 8, 3), Tile(128,  64, 8, 3), Tile( 64,  32, 8, 2)),
        "dq":                (Tile(128,  64, 8, 3), Tile(128,  64, 8, 2), Tile( 64,  32, 8, 2)),
        "dq_two_parts":      (Tile(128,  64, 8, 3), Tile( 64,  64, 8, 2), Tile( 32,  64, 8, 1)),
        "dkv":               (Tile( 64, 128, 8, 3), Tile( 64,  64, 8, 2), Tile( 64,  32, 8, 2)),
    },
}
# Exact products are no work of matrix units: the same on every part, and small enough for each.
FLOAT32 = {
    "forward":               (Tile( 32,  32, 4, 2), Tile( 32,  16, 4, 1), Tile( 16,  16, 4, 1)),
    "forward_two_parts":     (Tile( 32,  32, 4, 2), Tile( 16,  16, 8, 1), Tile( 16,  16, 8, 2)),
    "dq":                    (Tile( 32,  16, 4, 1), Tile( 16,  16, 8, 1), Tile( 16,  16, 8, 1)),
    "dq_two_parts":          (Tile( 32,  16, 4, 1), Tile( 16,  16, 8, 1), Tile( 16,  16, 8, 2)),
    "dkv":                   (Tile( 16,  32, 8, 1), Tile( 16,  32, 8, 1), Tile( 16,  16, 4, 1)),
}
# fmt: on

# What runs without a compiler: any size will do, and small ones meet more edges.
INTERPRETED = Tile(64, 64, 4, 1)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this package's kernels were imported)."""
    return triton.knobs.runtime.interpret


@triton.constexpr_function
def block_dim(dim: int) -> int:
    """Head dims are padded to a power of two, which Triton's tiles must be; at least what a matrix unit takes."""
    return max(16, triton.next_power_of_2(dim))


def near(x: torch.Tensor, heads: int = 1) -> torch.Tensor:
    """x, or a contiguous copy where a tile is too far apart for the kernels' 32-bit offsets within one of ``heads``."""
    stride_row, stride_head, stride_dim = x.stride()
    if MAX_BLOCK * stride_row + (heads - 1) * stride_head + x.shape[2] * stride_dim < 2**31:
        return x
    return x.contiguous()


def in_a_row(*vectors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Weights, sinks and slots, one element after the other: kernels take no strides of these."""
    return [None if x is None else x.contiguous() for x in vectors]


def unsupported(device, dtype, head_dim: int) -> str | None:
    """Why the kernels can't run a call, or None."""
    device = torch.device("cuda" if device is None else device)
    if device.type != "cuda" and not interpreted():
        return f"Triton needs a CUDA device (or TRITON_INTERPRET=1), got {device.type}"
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels compute float16, bfloat16 and float32, got {dtype}"
    if dtype == torch.bfloat16 and interpreted():
        return "bfloat16 products are wrong in Triton's interpreter"
    if head_dim > HEAD_DIMS[-1]:
        return f"the kernels hold head dims up to {HEAD_DIMS[-1]}, got {head_dim}"
    if device.type == "cuda":
        ask = _capability.__wrapped__ if device.index is None else _capability  # which one "cuda" means can change
        major, minor = ask(device) or (8, 0)
        if major < 8:
            return f"needs compute capability 8.0 or newer, got {major}.{minor}"
    return None


@cache  # every layer asks, and PyTorch takes longer to answer than to check the rest
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def bucket(head_dim: int) -> int:
    """The head dim of the table that stands for this one."""
    return next(dim for dim in HEAD_DIMS if block_dim(head_dim) <= dim)


def entry(kernel: str, head_dim: int, element_size: int, arch: int, shared_memory: int) -> Tile:
    """The table's tile for a ``bucket``; ``arch`` is the compute capability times 10, shared_memory bytes per block.

    A part that the table doesn't name takes what was made for the most shared memory that it has, and of those the
    newest: of 80, 86, 90, 100 a 10.3 takes 100, and a 12.0 with its 99 KB takes 86.
    """
    if element_size == 4:
        tiles = FLOAT32
    else:
        tiles = HALF[max((SHARED_MEMORY[a], a) for a in HALF if a <= arch and SHARED_MEMORY[a] <= shared_memory)[1]]
    return tiles[kernel][HEAD_DIMS.index(head_dim)]


def choose(kernel: str, q: torch.Tensor, v: torch.Tensor) -> Tile:
    """The tile of a launch: what ``bitune_kernels.tune`` found on this machine, else the table's."""
    if interpreted():
        return INTERPRETED
    return _of_device(kernel, max(q.shape[2], v.shape[2]), q.element_size(), q.device)


@cache
def _of_device(kernel: str, head_dim: int, element_size: int, device: torch.device) -> Tile:
    head_dim = bucket(head_dim)  # inside what is cached: Triton's constexpr functions are slow on the host
    key = tuned_key(torch.cuda.get_device_name(device), kernel, head_dim, element_size)
    return tuned().get(key) or of_device(kernel, head_dim, element_size, device)


def of_device(kernel: str, head_dim: int, element_size: int, device: torch.device) -> Tile:
    """The table's tile for the GPU that is here."""
    major, minor = torch.cuda.get_device_capability(device)
    shared_memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return entry(kernel, head_dim, element_size, 10 * major + minor, shared_memory)


def tuned_path() -> Path:
    """Where ``bitune_kernels.tune`` keeps what it found."""
    return cache_folder() / "tiles.json"


def tuned_key(gpu: str, kernel: str, head_dim: int, element_size: int) -> str:
    """What a tuned tile depends on."""
    return f"{tuned_for(gpu)}{kernel}, head dim {head_dim}, {element_size} bytes"


def tuned_for(gpu: str) -> str:
    """What each ``tuned_key`` of a GPU and these versions begins with."""
    return f"{gpu}, bitune_kernels {__version__}, triton {triton.__version__}, "


@cache
def tuned() -> dict[str, Tile]:
    """What ``bitune_kernels.tune`` found here, by ``tuned_key``; read once per process, {} if it can't be."""
    path, found = tuned_path(), {}
    try:
        text = path.read_text()
    except OSError:
        return found
    try:
        for key, numbers in json.loads(text).items():
            found[key] = tile = Tile(*numbers)
            if not all(type(x) is int and x > 0 for x in numbers) or max(tile.block_m, tile.block_n) > MAX_BLOCK:
                raise ValueError(f"{key}: not a tile: {numbers}")
    except (ValueError, TypeError, AttributeError) as e:
        warnings.warn(f"{path}: ignored, the tiles of the table are used: {e}", stacklevel=2)
        return {}
    return found
