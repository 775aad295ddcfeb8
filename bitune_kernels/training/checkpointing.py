"""Selective checkpointing of a pass: products and attention are kept, what lies between is computed again."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from .. import custom_ops  # noqa: F401 (registers bitune::attention)
from ..lora import segment  # noqa: F401 (registers bitune::segment_lora)


def _policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
    aten, bitune = torch.ops.aten, torch.ops.bitune
    kept = (bitune.segment_lora.default, bitune.attention.default, aten.mm.default, aten.addmm.default)
    saved = operator in kept or "scaled_dot_product" in operator.name()
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def selective_checkpointing() -> dict[str, Any]:
    """The arguments of ``gradient_checkpointing_enable`` between keeping every activation and only the layers' inputs.

    Norms, rotations, activation functions and their wider copies are dropped and computed again in the backward pass,
    which costs no product of a linear layer. Attention isn't computed again either with the backend sdpa or in compiled
    layers; Triton's and CUDA's launches are not operators that could be kept elsewhere. For the one-pass schedule::

        model.gradient_checkpointing_enable(selective_checkpointing())
        TrainingArguments(gradient_checkpointing=True, gradient_checkpointing_kwargs=selective_checkpointing(), ...)
    """
    return {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, _policy)}
