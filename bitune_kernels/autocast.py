"""What chooses its dtypes by itself computes without autocast."""

from __future__ import annotations

from contextlib import nullcontext
from functools import wraps

import torch


def without_autocast(x: torch.Tensor):
    """Inside, what is computed of tensors on x's device has their own dtypes."""
    device = x.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


def in_own_dtypes(function):
    """``function(q, ...)``, without autocast inside."""

    @wraps(function)
    def call(q, *args, **options):
        with without_autocast(q):
            return function(q, *args, **options)

    return call
