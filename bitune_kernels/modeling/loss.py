"""The loss of a causal LM: the mean over samples, as in the paper, and the loss over a few answer rows at a time.

In chunks the logits of all rows never exist at once. Logits are the family's own affair (softcaps, scales, biases,
adapters), and so is the loss. Both are therefore left to the causal LM's own forward, which runs once per chunk behind
a backbone that hands it rows computed before. Each chunk is checkpointed: the backward pass computes its logits again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..plan import SegmentPlan
from .structure import gathers


class _Rows(nn.Module):
    """Stands for a backbone whose hidden states are known."""

    def __init__(self, output_type: type):
        super().__init__()
        self.output_type = output_type

    def forward(self, *args, inputs_embeds: torch.Tensor, **kwargs):
        return self.output_type(last_hidden_state=inputs_embeds)


def _behind(model: nn.Module, backbone: nn.Module, rows: _Rows) -> nn.Module:
    # A second module object over the same parameters and children, so that nothing of the model is assigned to. Made
    # anew for each step: modules may be replaced, and modes switched, between two of them.
    path = next(name for name, module in model.named_modules() if module is backbone).split(".")

    def shallow(module, names):
        if not names:
            return rows
        twin = _twin(module)
        twin.__dict__["_modules"] = {
            name: shallow(child, names[1:]) if name == names[0] else _twin(child) if gathers(child) else child
            for name, child in module._modules.items()
        }
        return twin

    return shallow(model, path)


def _twin(module: nn.Module) -> nn.Module:
    # not copy.copy, which constructs modules anew where FSDP has changed their class
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    if gathers(module):
        # Gathered once for all chunks, of which each process may have another number, until the backward pass is over.
        module.unshard()
        twin.__dict__ |= {name: OrderedDict() for name in ("_forward_hooks", "_forward_pre_hooks")}
    return twin


def chunked_loss(
    model: nn.Module,
    backbone: nn.Module,
    output_type: type,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    chunk_rows: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    sample_lengths: Sequence[int] | None = None,
    **kwargs,
) -> torch.Tensor:
    """The causal LM's loss, with logits for at most ``chunk_rows + 1`` rows at a time in both directions.

    Args:
        model: the causal LM; ``backbone`` is the module between its tokens and its head.
        output_type: the class of what the backbone returns.
        hidden: [A, hidden], what the backbone returned.
        labels: int64 [A], of the rows themselves (the family shifts them), -100 where there is no target.
        chunk_rows: targets per chunk; one more row is computed, since the shift drops the last one.
        num_items_in_batch: what the summed loss is divided by; None: the number of targets.
        sample_lengths: rows of each sample, for the mean over samples of their means. None: over targets.
        kwargs: further arguments of the causal LM's forward.

    Returns:
        A scalar; differentiable in ``hidden`` and the parameters behind the backbone.
    """
    spans = list(pairwise(accumulate(sample_lengths or [len(labels)], initial=0)))
    divisors = [num_items_in_batch] * len(spans)
    if num_items_in_batch is None:
        counts = torch.stack([(labels[first + 1 : end] != -100).sum() for first, end in spans])
        divisors = counts.clamp(min=1) * counts.count_nonzero().clamp(min=1)
    behind = _behind(model, backbone, _Rows(output_type))
    forward = type(model).forward  # an instance's own one, as accelerate sets it, is bound to the whole model

    def loss(rows, targets, divisor):
        options = dict(num_items_in_batch=divisor, use_cache=False, return_dict=True)
        return forward(behind, inputs_embeds=rows[None], labels=targets[None], **kwargs | options).loss

    total = None
    for (first, end), divisor in zip(spans, divisors, strict=True):
        for start in range(first, max(end - 1, first + 1), chunk_rows):
            chunk = slice(start, min(start + chunk_rows + 1, end))
            part = checkpoint(loss, hidden[chunk], labels[chunk], divisor, use_reentrant=False)
            total = part if total is None else total + part
    return total


@contextmanager
def loss_per_sample(causal_lm: nn.Module, plan: SegmentPlan, enabled: bool):
    """Inside, the loss of packed answers is the mean over samples of their mean over tokens, in float32."""
    if not enabled:
        yield
        return
    before, asked = causal_lm.loss_function, False

    def loss_function(logits, labels, vocab_size, **kwargs):
        nonlocal asked
        asked = True
        # logits [1, A, vocab], labels int64 [1, A]: the first label of a sample is -100, so no row predicts another's
        labels = nn.functional.pad(labels[0, 1:], (0, 1), value=-100).to(logits.device)
        tokens = nn.functional.cross_entropy(logits.float().view(-1, vocab_size), labels, reduction="none")
        lengths = plan.cu_answer.diff().to(logits.device)  # there already: a copy, or a size unknown, would wait for it
        sample = torch.arange(len(lengths), device=logits.device).repeat_interleave(lengths, output_size=len(tokens))
        sums = tokens.new_zeros(len(lengths)).index_add(0, sample, tokens)
        counts = tokens.new_zeros(len(lengths)).index_add(0, sample, (labels != -100).float())
        return (sums / counts.clamp(min=1)).sum() / counts.count_nonzero().clamp(min=1)

    causal_lm.loss_function = loss_function
    try:
        yield
    finally:
        causal_lm.loss_function = before
    if not asked:
        raise ValueError(
            "loss: expected 'token' with a causal LM that doesn't ask its loss_function (Liger-Kernel's fused "
            "cross-entropy), got 'sample'"
        )
