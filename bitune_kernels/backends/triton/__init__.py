"""Triton kernels: the whole of ``bitune_attention`` in one launch, its backward in three, and the mix alone.

``../schedule.py`` says which tile each program computes, ``attention_forward.py`` and ``attention_backward.py`` are the
kernels, ``tiles.py`` the sizes. This file is what the operators call; it imports triton only when it does.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch


def unsupported(*, device=None, dtype=None, head_dim=None, head_dim_v=None, **call) -> str | None:
    """Why this backend can't run a call, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    from . import tiles

    return tiles.unsupported(device, dtype, max(head_dim or 0, head_dim_v or 0))


def forward(*call, **options) -> tuple[torch.Tensor | None, ...]:
    """``out, k_mixed, v_mixed, streams, lse``: see ``attention_forward.forward``."""
    from .attention_forward import forward

    return forward(*call, **options)


def backward(*tensors, **options) -> list[torch.Tensor]:
    """The gradients: see ``attention_backward.backward``."""
    from .attention_backward import backward

    return backward(*tensors, **options)


def mix(causal: torch.Tensor, bidir: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """``(1 - alpha) causal + alpha bidir``: [rows, heads, dim], alpha [] or [heads]."""
    from .mixing import mix

    return mix(causal, bidir, alpha)


def mix_backward(d_mixed, causal, bidir, alpha) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``d_causal, d_bidir, d_alpha``."""
    from .mixing import mix_backward

    return mix_backward(d_mixed, causal, bidir, alpha)
