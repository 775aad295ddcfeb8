"""The mix alone, and its backward, which also ends the backward of the attention.

mixed = (1 - alpha) causal + alpha bidir
d_causal = (1 - alpha) d_mixed;  d_bidir = alpha d_mixed;  d_alpha = <bidir - causal, d_mixed>
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tiles
from .common import load_rows, store_rows
from .common import mix as mixed_tile
from .tiles import block_dim

_BLOCK = 32  # rows per program: bound by memory, so any size that fills the loads


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["alpha"])
def mix_kernel(
    causal, bidir, alpha, mixed, stride_c, stride_b, rows,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr,
):  # fmt: skip
    """causal, bidir [rows, HEADS, DIM] -> mixed, contiguous. One program: BLOCK rows of one head."""
    head, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * BLOCK
    near = tl.arange(0, BLOCK)
    valid = first + near < rows
    a = tl.load(alpha + (head if ALPHA_PER_HEAD else 0)).to(tl.float32)
    causal += first * stride_c[0] + head * stride_c[1]
    bidir += first * stride_b[0] + head * stride_b[1]
    c = load_rows(causal, near, stride_c, valid, DIM)
    b = load_rows(bidir, near, stride_b, valid, DIM)
    store_rows(mixed + (first * HEADS + head) * DIM, near, (HEADS * DIM, 1), mixed_tile(c, b, a), valid, DIM)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["alpha"])
def mix_backward_kernel(
    d_mixed, d_attended, causal, bidir, alpha, d_causal, d_bidir, d_alpha, stride_d, stride_c, stride_b, rows,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ALPHA_PER_HEAD: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """d_alpha float32 [row tiles, HEADS]: partial sums. ADD: d_causal and d_bidir already hold the streams' own part.

    d_mixed: the gradient of the caller; d_attended float32 [rows, HEADS, DIM]: that of the answer's attention.
    """
    head, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * BLOCK
    near = tl.arange(0, BLOCK)
    valid = first + near < rows
    a = tl.load(alpha + (head if ALPHA_PER_HEAD else 0)).to(tl.float32)
    here = (first * HEADS + head) * DIM  # of a contiguous tensor
    d = tl.zeros([BLOCK, block_dim(DIM)], tl.float32)
    if d_mixed is not None:
        start = d_mixed + first * stride_d[0] + head * stride_d[1]
        d += load_rows(start, near, stride_d, valid, DIM).to(tl.float32)
    if d_attended is not None:
        d += load_rows(d_attended + here, near, (HEADS * DIM, 1), valid, DIM)
    causal += first * stride_c[0] + head * stride_c[1]
    bidir += first * stride_b[0] + head * stride_b[1]
    c = load_rows(causal, near, stride_c, valid, DIM).to(tl.float32)
    b = load_rows(bidir, near, stride_b, valid, DIM).to(tl.float32)
    tl.store(d_alpha + tl.program_id(0) * HEADS + head, tl.sum(tl.sum((b - c) * d, 1), 0))
    d_c, d_b = (1.0 - a) * d, a * d
    if ADD:
        d_c += load_rows(d_causal + here, near, (HEADS * DIM, 1), valid, DIM).to(tl.float32)
        d_b += load_rows(d_bidir + here, near, (HEADS * DIM, 1), valid, DIM).to(tl.float32)
    store_rows(d_causal + here, near, (HEADS * DIM, 1), d_c, valid, DIM)
    store_rows(d_bidir + here, near, (HEADS * DIM, 1), d_b, valid, DIM)


def _tiles(rows: int) -> int:
    return (rows + _BLOCK - 1) // _BLOCK  # triton.cdiv takes 40 times as long on the host


def mix(causal: torch.Tensor, bidir: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """causal, bidir [rows, heads, dim], alpha [] or [heads] -> [rows, heads, dim], contiguous."""
    causal, bidir = tiles.near(causal), tiles.near(bidir)
    (alpha,) = tiles.in_a_row(alpha)
    rows, heads, dim = causal.shape
    mixed = torch.empty_like(causal, memory_format=torch.contiguous_format)
    if not mixed.numel():
        return mixed
    with torch.cuda.device_of(causal):
        mix_kernel[(_tiles(rows), heads)](
            causal,
            bidir,
            alpha,
            mixed,
            causal.stride(),
            bidir.stride(),
            rows,
            HEADS=heads,
            DIM=dim,
            BLOCK=_BLOCK,
            ALPHA_PER_HEAD=alpha.ndim == 1,
            enable_fp_fusion=True,
        )
    return mixed


def mix_backward(
    d_mixed: torch.Tensor | None,
    causal: torch.Tensor,
    bidir: torch.Tensor,
    alpha: torch.Tensor,
    d_attended: torch.Tensor | None = None,
    d_causal: torch.Tensor | None = None,
    d_bidir: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``d_causal, d_bidir, d_alpha``. Given d_causal and d_bidir, contiguous, are added to in place."""
    causal, bidir = tiles.near(causal), tiles.near(bidir)
    d_mixed = None if d_mixed is None else tiles.near(d_mixed)
    (alpha,) = tiles.in_a_row(alpha)
    rows, heads, dim = causal.shape
    add = d_causal is not None
    if not add:
        d_causal, d_bidir = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (causal, bidir))
    partial = causal.new_empty(_tiles(rows), heads, dtype=torch.float32)
    if partial.numel():  # also where a head has no dims: each element is written
        with torch.cuda.device_of(causal):
            mix_backward_kernel[(len(partial), heads)](
                d_mixed,
                d_attended,
                causal,
                bidir,
                alpha,
                d_causal,
                d_bidir,
                partial,
                None if d_mixed is None else d_mixed.stride(),
                causal.stride(),
                bidir.stride(),
                rows,
                HEADS=heads,
                DIM=dim,
                BLOCK=_BLOCK,
                ALPHA_PER_HEAD=alpha.ndim == 1,
                ADD=add,
                enable_fp_fusion=True,
            )
    d_alpha = partial.sum(0) if alpha.ndim else partial.sum()
    return d_causal, d_bidir, d_alpha.to(alpha.dtype)
