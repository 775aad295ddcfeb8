"""Texts as vectors, read by one stream alone, and the loss that teaches a decoder to read in both directions.

Published methods are settings of the same pass over packed rows: LLM2Vec (arXiv 2404.05961) averages the bidirectional
stream, Echo embeddings (arXiv 2402.15449) the second copy of a text that the causal stream reads twice.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..plan import SegmentPlan, find_samples
from .adapters import BIDIR, CAUSAL
from .labels import check_tokens
from .loss import chunked_loss
from .model import BituneModel, check_streams_on


def encode(
    model: BituneModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    embed_mask: torch.Tensor | None = None,
    stream: str = "bidir",
    repeat: bool = False,
) -> torch.Tensor:
    """The mean of each text's hidden states behind the model's final norm. Differentiable, in the model's own mode.

    Args:
        model: with any variant, schedule and backend.
        input_ids: integers [batch, seq], a text per row, padded left or right.
        attention_mask: [batch, seq], nonzero at real tokens. None: no padding.
        embed_mask: [batch, seq], nonzero at the tokens whose hidden states are averaged; all are read. None: all real
            ones. LLM2Vec leaves out the instruction and what the tokenizer adds in front.
        stream: "bidir", as the variant's bidirectional stream reads a prompt: with its adapter (that of "causal" where
            the variant has one for both), its mask and ``skip_bidir``; in single-stream variants as their one stream
            does, which mixes both attentions. "causal": as an answer is read, with the adapter "causal".
        repeat: the tokens of ``embed_mask`` are read once more behind the whole text and averaged there, as in Echo
            embeddings.

    Returns:
        float32 (float64 of such a model) [batch, hidden], not normalized.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came, before anything is computed.
    """
    check_streams_on(model)
    check_tokens("input_ids", input_ids)
    if stream not in (BIDIR, CAUSAL):
        raise ValueError(f"stream: expected {BIDIR!r} or {CAUSAL!r}, got {stream!r}")
    if not isinstance(repeat, bool):
        raise TypeError(f"repeat: expected a bool, got {type(repeat).__name__}")
    texts = _texts(input_ids.shape, attention_mask)
    chosen = [torch.ones(len(tokens), dtype=torch.bool, device="cpu") for tokens in texts]
    if embed_mask is not None:
        chosen = _chosen(embed_mask, input_ids.shape, texts)
    if repeat:
        texts = [torch.cat([tokens, tokens[own]]) for tokens, own in zip(texts, chosen, strict=True)]
        chosen = [torch.cat([torch.zeros_like(own), own[own]]) for own in chosen]
    rows = _read(model, input_ids, texts, stream).last_hidden_state[0]
    counts = torch.tensor([int(own.sum()) for own in chosen], device="cpu")
    text = torch.arange(len(counts), device="cpu").repeat_interleave(counts)  # of each row that is averaged
    rows = rows[torch.cat(chosen).nonzero()[:, 0].to(rows.device)]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    sums = rows.new_zeros(len(counts), rows.shape[1]).index_add(0, text.to(rows.device), rows)
    return sums / counts.to(rows)[:, None]


def masked_next_token_loss(
    model: BituneModel, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Masked next-token prediction, as in LLM2Vec: the bidirectional stream reads texts with some tokens masked, and
    the hidden state in front of each masked one predicts it.

    Head and loss are the causal LM's own, for these rows alone; logits are computed again in the backward pass, and for
    ``BituneConfig.loss_chunk_rows`` tokens at a time if it is set.

    Args:
        model: with any variant, schedule and backend.
        input_ids: integers [batch, seq], a text per row with tokens masked already, padded left or right.
        labels: integers [batch, seq], the token that was masked, -100 elsewhere, as transformers'
            ``DataCollatorForLanguageModeling`` makes them. Nothing stands in front of a text's first token, whose label
            is ignored.
        attention_mask: [batch, seq], nonzero at real tokens. None: no padding.

    Returns:
        A scalar, the mean over masked tokens.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came, before anything is computed.
    """
    check_streams_on(model)
    check_tokens("input_ids", input_ids)
    check_tokens("labels", labels)
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels: expected shape {list(input_ids.shape)} as the tokens, got {list(labels.shape)}")
    texts = _texts(input_ids.shape, attention_mask)
    targets = labels.flatten()[torch.cat(texts).to(labels.device)].long().clone()
    if int((targets != -100).sum()) < int((labels != -100).sum()):
        raise ValueError("labels: expected -100 wherever attention_mask is 0, got labels on padding")
    first = torch.tensor([0] + [len(tokens) for tokens in texts[:-1]], device="cpu").cumsum(0)
    targets[first.to(targets.device)] = -100
    masked = (targets != -100).nonzero()[:, 0]
    if not len(masked):
        raise ValueError("labels: expected a masked token behind the first one of a text, got none in the batch")
    output = _read(model, input_ids, texts, BIDIR)
    rows = output.last_hidden_state[0]
    masked, targets = masked.to(rows.device), targets.to(rows.device)
    # The causal LM shifts labels: row i predicts the label of row i + 1, and the last row nothing.
    return chunked_loss(
        model.get_base_model(),
        model._hooks.structure.backbone,
        type(output),
        torch.cat([rows[masked - 1], rows[:1]]),
        torch.cat([targets[:1].fill_(-100), targets[masked]]),
        model.bitune_config.loss_chunk_rows or len(masked),
    )


def _read(model: BituneModel, input_ids: torch.Tensor, texts: list[torch.Tensor], stream: str):
    """The backbone's output over texts, each given by its places in the flattened tokens: rows packed, [1, T, hidden].

    The bidirectional stream reads a text as a prompt without an answer, the causal one as an answer without a prompt.
    """
    lengths, nothing, device = [len(tokens) for tokens in texts], [0] * len(texts), input_ids.device
    segments = (lengths, nothing) if stream == BIDIR else (nothing, lengths)
    plan = SegmentPlan.from_lengths(*segments, num_streams=1, device=device)
    plan = replace(plan, token_index=torch.cat(texts).to(device), padded_shape=tuple(input_ids.shape))
    with model._hooks.request(plan):
        return model._hooks.structure.backbone(input_ids=input_ids, use_cache=False)


def _texts(shape: torch.Size, attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
    # the places of each text's tokens among the flattened ones, on the CPU
    return [torch.arange(first, first + n, device="cpu") for first, n in find_samples(shape, attention_mask)]


def _chosen(embed_mask: torch.Tensor, shape: torch.Size, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    # bool, for each text which of its tokens are averaged
    if not isinstance(embed_mask, torch.Tensor):
        raise TypeError(f"embed_mask: expected a tensor [batch, seq], got {type(embed_mask).__name__}")
    if tuple(embed_mask.shape) != tuple(shape):
        raise ValueError(f"embed_mask: expected shape {list(shape)} as the tokens, got {list(embed_mask.shape)}")
    flat = embed_mask.ne(0).flatten().cpu()
    chosen = [flat[tokens] for tokens in texts]
    empty = [i for i, own in enumerate(chosen) if not bool(own.any())]
    if empty:
        raise ValueError(f"embed_mask: expected at least one token of each text, got none in rows {empty}")
    if sum(int(own.sum()) for own in chosen) < int(flat.sum()):
        raise ValueError("embed_mask: expected 0 wherever attention_mask is 0, got tokens of the padding")
    return chosen
