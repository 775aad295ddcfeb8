"""Who sees whom, as boolean tensors. Positions count from the first cached prefix token of a sample."""

from __future__ import annotations

import torch

STREAM_MASKS = ("full", "causal", "anti_causal")


def visible_to_prompt(
    mask: str,
    n: int,
    m: int = 0,
    window: int | None = None,
    device=None,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
) -> torch.Tensor:
    """bool [n, m + n]: which of the m prefix and n prompt tokens each prompt token of a stream sees.

    The whole prefix is visible in every stream; ``window`` keeps the keys with |i - j| < window. ``rows`` and
    ``columns``, each (first, end): a part of it.
    """
    first, end = rows or (0, n)
    i = torch.arange(m + first, m + end, device=device)[:, None]
    j = torch.arange(*(columns or (0, m + n)), device=device)[None, :]
    if mask == "full":
        see = (i >= 0) & (j >= 0)
    elif mask == "causal":
        see = j <= i
    elif mask == "anti_causal":
        see = (j >= i) | (j < m)
    else:
        raise ValueError(f"stream_mask: expected one of {', '.join(STREAM_MASKS)}, got {mask!r}")
    return see if window is None else see & ((i - j).abs() < window)


def visible_to_answer(
    a: int,
    before: int,
    window: int | None = None,
    device=None,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
) -> torch.Tensor:
    """bool [a, before + a]: which tokens each of a answer tokens sees, ``before`` of them prefix and prompt.

    ``rows`` and ``columns`` as in ``visible_to_prompt``.
    """
    first, end = rows or (0, a)
    i = torch.arange(before + first, before + end, device=device)[:, None]
    j = torch.arange(*(columns or (0, before + a)), device=device)[None, :]
    see = j <= i
    return see if window is None else see & (i - j < window)
