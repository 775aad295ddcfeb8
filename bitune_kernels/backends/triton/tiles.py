"""Tile sizes per architecture, head dim and element size, and what fits on which part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

# The most rows that a tile has.
MAX_BLOCK = 128


@dataclass(frozen=True)
class Tile:
    """block_m packed query rows x block_n keys per step, and how the compiler spreads them."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# What runs without a compiler: any size will do, and small ones meet more edges.
INTERPRETED = Tile(64, 32, 4, 1)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this package's kernels were imported)."""
    return triton.knobs.runtime.interpret


def block_dim(dim: int) -> int:
    """Head dims are padded to a power of two, which Triton's tiles must be; at least what a matrix unit takes."""
    return max(16, triton.next_power_of_2(dim))


def near(x: torch.Tensor, heads: int = 1) -> torch.Tensor:
    """x, or a contiguous copy where a tile is too far apart for the kernels' 32-bit offsets within one of ``heads``."""
    stride_row, stride_head, stride_dim = x.stride()
    if MAX_BLOCK * stride_row + (heads - 1) * stride_head + x.shape[2] * stride_dim < 2**31:
        return x
    return x.contiguous()


def unsupported(device, dtype, head_dim: int) -> str | None:
    """Why the kernels can't run a call, or None."""
    device_type = "cuda" if device is None else torch.device(device).type
    if device_type != "cuda" and not interpreted():
        return f"Triton needs a CUDA device (or TRITON_INTERPRET=1), got {device_type}"
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels compute float16, bfloat16 and float32, got {dtype}"
    if dtype == torch.bfloat16 and interpreted():
        return "bfloat16 products are wrong in Triton's interpreter"
    if head_dim > 256:
        return f"the kernels hold head dims up to 256, got {head_dim}"
    return None


def choose(kernel: str, q: torch.Tensor, v: torch.Tensor, plan) -> Tile:
    return INTERPRETED if interpreted() else Tile(64, 64, 4, 2)
