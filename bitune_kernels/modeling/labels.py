"""What a batch with answers says: where samples, prompts and turns begin."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import BituneConfig
from ..plan import SegmentPlan, find_samples, find_turns

# What collators say about packed samples beside position_ids, in transformers' names.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

_PER_TOKEN = ("inputs", "input_ids", "attention_mask", "position_ids", *PACKED)
_PER_TOKEN += ("negative_prompt_ids", "negative_prompt_attention_mask")  # of generate()


def check_tokens(name: str, x) -> None:
    """Refuse what isn't token ids or labels [batch, seq] (TypeError, ValueError)."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected an integer tensor [batch, seq], got {type(x).__name__}")
    if x.is_floating_point() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got a tensor of {x.dtype}")
    if x.ndim != 2 or not x.numel():
        raise ValueError(f"{name}: expected [batch, seq] with at least one token, got {list(x.shape)}")


def refuse_further_inputs(given: dict, shape: torch.Size) -> None:
    """Refuse tensors per token, [batch, seq] as ``shape``, that a causal LM may make a mask of (ValueError)."""
    for name, x in given.items():
        per_token = isinstance(x, torch.Tensor) and x.shape == shape
        if per_token and name not in _PER_TOKEN and bool(x.any()):
            raise ValueError(f"{name}: expected no further input per token with Bitune, got {list(x.shape)}")


def check_inputs(input_ids, inputs_embeds) -> None:
    """Refuse what isn't a batch of token ids or of their embeddings (TypeError, ValueError)."""
    if input_ids is None and inputs_embeds is None:
        raise ValueError("input_ids: expected token ids [batch, seq] (or inputs_embeds), got None")
    if inputs_embeds is None:
        check_tokens("input_ids", input_ids)
    elif not isinstance(inputs_embeds, torch.Tensor) or inputs_embeds.ndim != 3 or not inputs_embeds.numel():
        got = list(inputs_embeds.shape) if isinstance(inputs_embeds, torch.Tensor) else type(inputs_embeds).__name__
        raise ValueError(f"inputs_embeds: expected [batch, seq, hidden] with at least one token, got {got}")


def plan_batch(
    tokens: torch.Tensor,
    labels: torch.Tensor | None,
    prompt_lengths: torch.Tensor | Sequence[int] | None,
    *,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    packed: dict,
    config: BituneConfig,
) -> SegmentPlan:
    """The rows of a batch, all arguments as in ``BituneModel.forward``.

    Args:
        tokens: ids or embeddings, [batch, seq, ...].
        labels, prompt_lengths: at least one of them.
        packed: what a collator says about packed samples beside ``position_ids``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    shape = tuple(tokens.shape[:2])
    if labels is not None:
        check_tokens("labels", labels)
        if tuple(labels.shape) != shape:
            raise ValueError(f"labels: expected shape {list(shape)} as the tokens, got {list(labels.shape)}")
    samples = find_samples(shape, attention_mask, position_ids)
    _check_packed(packed, samples, position_ids)
    if prompt_lengths is None:
        prompt_lengths = _prompt_lengths(labels, samples, position_ids is not None)
    options = dict(num_streams=config.num_streams, device=tokens.device)
    if labels is None or config.turns == "one":
        return SegmentPlan.from_samples(shape, samples, prompt_lengths, **options)
    turns, prompts, history = find_turns(labels, samples, prompt_lengths)
    if config.turns == "recompute":
        whole = [(first - m, length + m) for (first, length), m in zip(turns, history, strict=True)]
        prompts = [n + m for n, m in zip(prompts, history, strict=True)]
        return SegmentPlan.from_samples(shape, whole, prompts, **options)
    earlier = [(first - m, m) for (first, _), m in zip(turns, history, strict=True)]
    return SegmentPlan.from_turns(shape, turns, prompts, earlier, **options)


def pack_labels(
    labels: torch.Tensor,
    prompt_lengths: torch.Tensor | Sequence[int] | None,
    plan: SegmentPlan,
    config: BituneConfig,
    *,
    num_items_in_batch: torch.Tensor | int | None,
    fused_lm_head: object,
) -> torch.Tensor:
    """The labels of the answer rows, int64 [1, A], -100 where nothing is predicted.

    Arguments as in ``BituneModel.forward``, the last two as trainers give them there: transformers' divides the sum
    over tokens by the first, TRL's computes a loss of its own.

    Raises:
        ValueError: labels without a target, or a loss that isn't the config's.
    """
    targets = plan.pack_answers(labels).long()
    targets[plan.cu_answer[:-1].long()] = -100  # the last prompt token is not predicted
    # where nobody else divides the sum over tokens, a batch without an answer would be 0 / 0
    mean = config.loss == "token" and num_items_in_batch is None and not fused_lm_head
    if mean and not bool((targets != -100).any()):
        raise ValueError(
            "labels: expected an answer token (a label behind the prompt that is not -100), got none in the whole batch"
        )
    if prompt_lengths is not None and num_items_in_batch is not None:
        extra = int((labels != -100).sum() - (targets != -100).sum())
        if extra:  # counted by the trainer, and not in the loss
            raise ValueError(f"labels: expected -100 on the prompt with num_items_in_batch, got {extra} others")
    if config.loss == "sample" and (num_items_in_batch is not None or fused_lm_head):
        raise ValueError(
            "loss: expected 'token' with num_items_in_batch or a trainer's own loss over tokens (TRL), got 'sample', "
            "which transformers' Trainer takes"
        )
    return targets[None]


def _check_packed(given: dict, samples: list[tuple[int, int]], position_ids: torch.Tensor | None) -> None:
    # what a collator says about packed samples must agree with position_ids
    for name, value in given.items():
        if value is None:
            continue
        if position_ids is None:
            raise ValueError(f"position_ids: expected positions that say where samples begin with {name}, got None")
        if name.startswith("cu_seq_lens"):
            tokens = {t for first, length in samples for t in range(first, first + length)}
            found, starts = sorted(tokens.intersection(value.flatten().tolist())), [first for first, _ in samples]
            if found != starts:
                raise ValueError(f"{name}: expected samples at tokens {starts} as position_ids say, got {found}")


def _prompt_lengths(labels: torch.Tensor, samples: list[tuple[int, int]], packed: bool) -> list[int]:
    """Prompt tokens of each sample: those before its first label that is not -100."""
    is_answer = (labels != -100).flatten().cpu()
    answers = [is_answer[first : first + length] for first, length in samples]
    if sum(int(x.sum()) for x in answers) < int(is_answer.sum()):
        raise ValueError("labels: expected -100 wherever attention_mask is 0, got labels on padding")
    empty = [s for s, x in enumerate(answers) if not bool(x.any())]
    # Truncated samples and what packs them (it pads with tokens at position 0) may be all prompt, and train nothing.
    lengths = [int(x.int().argmax()) if bool(x.any()) else len(x) for x in answers]
    short = [s for s, n in enumerate(lengths) if n < 1 + packed and s not in empty]
    if short and packed:
        raise ValueError(
            f"labels: expected -100 on the prompt, got a label on one of the first two tokens of the packed samples "
            f"{short}. Collators that pack write -100 over the first label, so these samples are cut inside their "
            "answer (TRL's packing_strategy 'bfd_split') or were packed without completion-only loss; if their "
            "prompts are one token long, give prompt_lengths"
        )
    if short:
        raise ValueError(
            f"labels: expected -100 on the prompt, got a label on the first token of samples {short}; mask the prompt "
            "(completion-only loss) and cut no sample inside its answer (TRL's packing_strategy 'wrapped'), since "
            "Bitune needs to know where the prompt ends"
        )
    return lengths
