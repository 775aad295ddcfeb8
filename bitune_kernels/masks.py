"""Who sees whom, as boolean tensors. Positions count from the first cached prefix token of a sample."""

from __future__ import annotations

import torch

STREAM_MASKS = ("full", "causal", "anti_causal")


def visible_to_prompt(mask: str, n: int, m: int = 0, window: int | None = None, device=None) -> torch.Tensor:
    """bool [n, m + n]: which of the m prefix and n prompt tokens each prompt token of a stream sees.

    The whole prefix is visible in every stream; ``window`` keeps the keys with |i - j| < window.
    """
    i = torch.arange(m, m + n, device=device)[:, None]
    j = torch.arange(m + n, device=device)[None, :]
    if mask == "full":
        see = torch.ones(n, m + n, dtype=torch.bool, device=device)
    elif mask == "causal":
        see = j <= i
    elif mask == "anti_causal":
        see = (j >= i) | (j < m)
    else:
        raise ValueError(f"stream_mask: expected one of {', '.join(STREAM_MASKS)}, got {mask!r}")
    return see if window is None else see & ((i - j).abs() < window)


def visible_to_answer(a: int, before: int, window: int | None = None, device=None) -> torch.Tensor:
    """bool [a, before + a]: which tokens each of a answer tokens sees, ``before`` of them prefix and prompt."""
    i = torch.arange(before, before + a, device=device)[:, None]
    j = torch.arange(before + a, device=device)[None, :]
    see = j <= i
    return see if window is None else see & (i - j < window)
