"""The checks that a model family is computed as it should be: one pass against three passes on a few tokens, and the
loss in chunks against the causal LM's own."""

from __future__ import annotations

import logging
from contextlib import contextmanager

import torch

from ..autocast import without_autocast
from ..plan import SegmentPlan
from .passes import evaluating

logger = logging.getLogger(__name__)

# Relative error of the answer's hidden states that rounding explains; a wrong path is off by tens of percent.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_ROUNDED = 0.1

# Larger tensors are no low-rank adapter's, but copies of whole matrices, of which a second copy may not fit.
_SMALL = 1 << 22


def _few_tokens(model) -> tuple[torch.Tensor, torch.Tensor, SegmentPlan]:
    hooks = model._hooks
    ids = torch.arange(1, 15, device=next(hooks.structure.backbone.parameters()).device).view(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    plan = SegmentPlan.from_batch((2, 7), mask, [3, 5], num_streams=hooks.config.num_streams, device=ids.device)
    return ids, mask, plan


@contextmanager
def _as_trained(model):
    """Inside, adapters and thetas are as after some training: fresh ones do nothing, or the same in both streams and
    all layers, and would hide that one is taken for another."""
    changed = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad and p.numel() <= _SMALL]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p, _ in changed:
            scale = p.abs().mean() / 2
            # .data, since a loss from before may still need the weights, which will be the same then
            noise = torch.randn(p.shape, generator=generator, device="cpu")
            p.data.add_(noise.to(p) * (scale if scale > 0 else 0.01))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, before in changed:
                p.data.copy_(before)


def check_one_pass(model) -> None:
    """Compare both schedules on a small ragged batch; switch trimming off where only that disagrees.

    Raises:
        ValueError: the family gives another result in one pass than in three.
    """
    hooks = model._hooks
    backbone = hooks.structure.backbone
    dtype = next(backbone.parameters()).dtype
    ids, mask, plan = _few_tokens(model)

    def run(fused: bool) -> torch.Tensor:
        with model.use_schedule(use_fused=fused), hooks.request(plan):
            return backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.double()

    with _as_trained(model), evaluating(model), without_autocast(ids):
        expected = run(fused=False)
        error = _failure(run, expected, dtype)
        if error and hooks.structure.trim is not None:
            hooks.trims = False
            logger.info("%s: the last layer is not trimmed (%s)", type(backbone).__name__, error)
            error = _failure(run, expected, dtype)
    hooks.tested = not error
    if error:
        name = type(model.get_base_model()).__name__
        raise ValueError(
            f"base_model: {name} can't be used in one pass: {error}. "
            "get_bitune_model(..., BituneConfig(use_fused=False)) runs the three-pass schedule"
        )


@contextmanager
def in_one_pass(model):
    """Inside, passes run as one. Of a model that was made for three passes the two are compared first, once."""
    if not (model.bitune_config.use_fused or model._hooks.tested):
        check_one_pass(model)
    with model.use_schedule(use_fused=True):
        yield


def _failure(run, expected: torch.Tensor, dtype: torch.dtype) -> str | None:
    try:
        found = run(fused=True)
    except Exception as e:
        return f"it raised {type(e).__name__}: {e}"
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if error <= _TOLERANCE.get(dtype, _ROUNDED):
        return None
    return f"its hidden states differ from three passes by {error:.1e} of their norm"


def check_chunked_loss(model) -> None:
    """Compare the loss of a small ragged batch in two chunks with the one that the causal LM computes at once.

    Raises:
        ValueError: they differ, because the family's loss isn't a sum over tokens, for example.
    """
    ids, mask, plan = _few_tokens(model)
    labels = ids.clone()
    labels[:, :5] = -100
    common = dict(attention_mask=mask, inputs_embeds=None)
    with evaluating(model), without_autocast(ids):
        expected = model(input_ids=ids, labels=labels, attention_mask=mask).loss.double()
        try:
            found = model._forward_in_chunks(plan, plan.pack_answers(labels)[None], 3, ids, common).loss.double()
        except Exception as e:
            reason = f"the loss in chunks raised {type(e).__name__}: {e}"
        else:
            error = float((found - expected).abs() / expected.abs().clamp_min(1e-30))
            if error <= _TOLERANCE.get(next(model.get_base_model().parameters()).dtype, _ROUNDED):
                return
            reason = f"the loss in chunks differs by {error:.1e} of it"
    name = type(model.get_base_model()).__name__
    raise ValueError(f"loss_chunk_rows: {name} needs None, since {reason}")
