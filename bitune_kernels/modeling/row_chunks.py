"""The MLPs of a long prompt, a few thousand rows at a time: their intermediate tensors would set the peak of memory.

Inference alone: training keeps the activations of all rows anyway. A compiled layer is left whole, since it would be
compiled again for every number of chunks, and fuses what lies between an MLP's products. So is an MLP with somebody's
hooks, which would see the last rows alone.
"""

from __future__ import annotations

import torch
from torch import nn

from .passes import current, new_strides

# A chunk's products are as fast as whole ones, and its intermediate tensors small beside what attention needs.
ROWS = 4096


def run_in_chunks(mlps: list[nn.Module]) -> list:
    """Hooks that let these modules, called with x [1, T, hidden] alone, run on chunks of its rows; their handles."""
    return [h for m in mlps for h in (m.register_forward_pre_hook(_before), m.register_forward_hook(_after))]


def _before(module, args):
    # All chunks but the last run here, and the module's own call then gets that one.
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or module.training:
        return None
    p = current()
    if p is None or not p.packed or args[0].shape[1] <= 2 * ROWS:
        return None
    if len(module._forward_pre_hooks) > 1 or len(module._forward_hooks) > 1:  # others beside these two
        return None
    (x,) = args
    *chunks, last = x.tensor_split(-(-x.shape[1] // ROWS), dim=1)
    out, first = None, 0
    before = p.num_rows - x.shape[1]  # rows that the last layer has dropped
    for chunk in chunks:
        end = first + chunk.shape[1]
        p.chunk = before + first, before + end
        y = module.forward(new_strides(chunk))
        out = y.new_empty(1, x.shape[1], y.shape[2]) if out is None else out
        out[:, first:end] = y
        first = end
    p.chunk = before + first, p.num_rows
    p.pending = out
    return new_strides(last)


def _after(module, args, output):
    p = current()
    if p is None or p.chunk is None:
        return None
    out, p.pending, p.chunk = p.pending, None, None
    out[:, out.shape[1] - output.shape[1] :] = output
    return out
