"""What the two streams make of a prompt: where their tokens attend, and how far their keys and values lie apart."""

from __future__ import annotations

import torch

from ..backends.reference import attention_weights
from ..masks import visible_to_prompt
from .labels import check_tokens
from .model import BituneModel, check_streams_on
from .one_pass import Observer
from .passes import evaluating
from .self_test import in_one_pass


def stream_attention(model: BituneModel, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Attention probabilities of each stream of a prompt, computed in float32 from the queries and keys of one prefill.

    Args:
        model: with any schedule and backend; this pass runs as one, without dropout.
        input_ids: int64 [1, P], one prompt of at least two tokens.

    Returns:
        "bidir" and "causal" (variants that mix nothing: "bidir" alone), each float32 [layers, P - 1, P - 1] on the CPU,
        the mean over heads: row i is how token i spreads its attention. Rows sum to 1, less what attention sinks take.
        The last prompt token is missing, since it opens the answer. In the last layer Bitune uses the prompt's keys and
        values alone, so these rows are what its attention would be: no result depends on them, and the adapter "bidir"
        of the last layer's queries is untrained.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    matrices: dict[str, list[torch.Tensor]] = {"bidir": [], "causal": []}

    def observe(plan, q, k, v, options):
        n = plan.num_prompt
        common = {name: options[name] for name in ("softmax_scale", "softcap", "sinks")}
        masks = {"bidir": options["stream_mask"], "causal": "causal"}
        blocks = {"bidir": slice(0, n)}
        if plan.num_streams == 2 or options.get("shared_qkv"):
            blocks["causal"] = slice(plan.answer_start - n, plan.answer_start)
        for name, rows in blocks.items():
            see = visible_to_prompt(masks[name], n, window=options["window"], device=q.device)
            matrices[name].append(attention_weights(q[rows], k[rows], see, **common).mean(0).float().cpu())

    _prefill(model, input_ids, observe)
    return {name: torch.stack(layers) for name, layers in matrices.items() if layers}


def stream_distance(model: BituneModel, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far the keys, and the values, of the two streams lie apart: |bidir - causal| / |causal| in each layer.

    The norm runs over the tokens, heads and features of a layer. Rotary embeddings don't change it.

    Args:
        model, input_ids: as in ``stream_attention``.

    Returns:
        "k" and "v", each float32 [layers] on the CPU.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; a variant that mixes none.
    """
    if isinstance(model, BituneModel) and "k" not in model.bitune_config.mixed:
        raise ValueError(f"model: expected a variant that mixes keys and values, got {model.bitune_config.variant!r}")
    distances: dict[str, list[torch.Tensor]] = {"k": [], "v": []}

    def observe(plan, q, k, v, options):
        n = plan.num_prompt
        for name, x in (("k", k), ("v", v)):
            bidir, causal = x[:n].float(), x[n : 2 * n].float()
            distances[name].append(((bidir - causal).norm() / causal.norm()).cpu())

    _prefill(model, input_ids, observe)
    return {name: torch.stack(layers) for name, layers in distances.items()}


def _prefill(model: BituneModel, input_ids: torch.Tensor, observer: Observer) -> None:
    check_streams_on(model)
    check_tokens("input_ids", input_ids)
    if input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids: expected [1, seq] with at least two tokens, got {list(input_ids.shape)}")
    with evaluating(model), in_one_pass(model), model._hooks.observing(observer):
        model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
