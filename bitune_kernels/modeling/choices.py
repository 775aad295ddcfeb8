"""Several answers to each of several prompts in one pass: a prompt is read once, and no answer sees another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..plan import SegmentPlan
from .model import BituneModel, check_streams_on
from .passes import evaluating
from .self_test import in_one_pass


def score_choices(
    model: BituneModel, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]]
) -> list[list[tuple[float, bool]]]:
    """The log-likelihood of each choice as the answer to its prompt, all in one pass.

    Each prompt is a turn without an answer, and each choice a turn without a prompt that attends to that one alone.
    The last prompt token predicts the first token of every choice. This pass runs as one, without dropout.

    Args:
        model: with any variant and backend.
        prompts: token ids of each prompt.
        choices: token ids of each prompt's choices.

    Returns:
        For each prompt, for each of its choices: the sum of its tokens' log-probabilities, in float32, and whether
        greedy decoding makes just these tokens.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came, before anything is computed.
    """
    check_streams_on(model)
    if len(prompts) != len(choices):
        raise ValueError(f"choices: expected those of each of the {len(prompts)} prompts, got {len(choices)}")
    for i, (prompt, answers) in enumerate(zip(prompts, choices, strict=True)):
        for name, ids in (("prompts", prompt), *(("choices", ids) for ids in answers)):
            if isinstance(ids, str) or not hasattr(ids, "__len__"):
                raise TypeError(f"{name}: expected token ids, got {ids!r} in {name}[{i}]")
            if not len(ids):
                raise ValueError(f"{name}: expected at least one token in each, got none in {name}[{i}]")
            if min(ids) < 0:
                raise ValueError(f"{name}: expected token ids, got {int(min(ids))} in {name}[{i}]")
    if not len(prompts):
        return []
    tokens, turns, rows = _layout(prompts, choices)
    ids = torch.tensor([tokens], device=model.device)
    streams = model.bitune_config.num_streams
    plan = SegmentPlan.from_turns(ids.shape, *zip(*turns, strict=True), num_streams=streams, device=ids.device)
    with evaluating(model), in_one_pass(model), model._hooks.request(plan):
        logits = model(input_ids=ids, use_cache=False).logits[0].float()  # [A, vocab]
    targets = [token for answers in choices for ids in answers for token in ids]
    rows, targets = (torch.tensor(x, dtype=torch.long, device=logits.device) for x in (rows, targets))
    each = (logits[rows, targets] - logits.logsumexp(-1)[rows]).cpu()
    greedy = (logits.argmax(-1)[rows] == targets).cpu()
    lengths = [len(ids) for answers in choices for ids in answers]
    scores = ((x.sum().item(), bool(g.all())) for x, g in zip(each.split(lengths), greedy.split(lengths), strict=True))
    return [[next(scores) for _ in answers] for answers in choices]


def _layout(prompts, choices):
    """One row of tokens: each prompt, then its choices less their last tokens, which are predicted and not read.

    Returns the tokens; of each turn its (first token, number of tokens), its prompt tokens and what it attends to; and
    of each token of each choice the answer row that predicts it. A choice has a prompt of one token, which is no prompt
    row: its first token opens its answer segment.
    """
    tokens, turns, rows, answer_rows = [], [], [], 0
    for prompt, answers in zip(prompts, choices, strict=True):
        first, last_of_prompt = len(tokens), answer_rows
        turns.append(((first, len(prompt)), len(prompt), (first, 0)))
        tokens.extend(prompt)  # not +=, which an array answers by adding numbers
        answer_rows += 1
        for read in (ids[:-1] for ids in answers):
            if len(read):
                turns.append(((len(tokens), len(read)), 1, (first, len(prompt))))
                tokens.extend(read)
            rows += [last_of_prompt, *range(answer_rows, answer_rows + len(read))]
            answer_rows += len(read)
    return tokens, turns, rows
