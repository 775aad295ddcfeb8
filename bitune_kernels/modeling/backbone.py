"""Hooks on a causal LM's backbone that turn one call over tokens into Bitune's passes.

The backbone rather than the causal LM is hooked, because trainers with a fused head call the backbone themselves.
Its caller sees an ordinary forward: tokens in, hidden states and a filled cache out.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from ..config import BituneConfig
from ..mixing import MixingCoefficients
from ..plan import SegmentPlan
from .adapters import BIDIR
from .one_pass import OnePass, TrimHooks
from .passes import current
from .structure import Structure, refuse_partitioned
from .three_pass import ThreePass

# Tensors of a backbone call that are understood; any other one per token could not be packed in silence.
_UNDERSTOOD = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position"}

# What collators say about packed samples beside position_ids, in transformers' names.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass(eq=False)
class Request:
    """A call of the backbone by a plan that is known.

    Attributes:
        plan: the rows of each sample.
        holds: keep the answer rows here and hand on the first one alone, because their head runs later.
        output: what the backbone returned, where it holds: its ``last_hidden_state`` is [1, A, hidden].
    """

    plan: SegmentPlan
    holds: bool = False
    output: object = None


class _Call:
    """One call of the backbone on its way through the hooks."""

    def __init__(self):
        self.scope = ExitStack()
        self.request: Request | None = None
        self.plan = self.one_pass = self.three_pass = self.answer_pass = self.cache = None


class BackboneHooks:
    """Attached to one backbone for the life of a Bitune model."""

    def __init__(self, structure: Structure, config: BituneConfig, mixing: MixingCoefficients | None):
        self.structure, self.config, self.mixing = structure, config, mixing
        self.stream_masks = config.stream_masks(structure.num_layers)
        self.enabled = True
        self.trims = True
        self.padding_mask = None  # generate() records the 2-D mask here, since static caches get a 4-D one
        self._request: Request | None = None
        self._calls: list[_Call] = []
        backbone = structure.backbone
        self._names = list(inspect.signature(backbone.forward).parameters)  # of positional arguments
        self._handles = [
            backbone.register_forward_pre_hook(self._before, with_kwargs=True),
            backbone.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        self._trim_hooks = TrimHooks(structure)

    def remove(self) -> None:
        """Leave the backbone as it was found."""
        for handle in [*self._handles, *self._trim_hooks.handles]:
            handle.remove()

    @contextmanager
    def request(self, plan: SegmentPlan, *, holds: bool = False):
        """Inside, the next call of the backbone uses this plan and gives its answer rows packed, [1, A, hidden].

        Yields the ``Request``, which keeps those rows if it ``holds``.
        """
        self._request = request = Request(plan, holds)
        try:
            yield request
        finally:
            self._request = None

    @contextmanager
    def disabled(self):
        """Inside, the backbone is a plain causal decoder."""
        enabled, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = enabled

    def _before(self, backbone, args, kwargs):
        call = _Call()
        self._calls.append(call)
        if not self.enabled or current() is not None:
            return None
        refuse_partitioned([("a weight", next(backbone.parameters()))])  # DeepSpeed partitions after the attach
        kwargs = kwargs | dict(zip(self._names, args, strict=False))
        name = "inputs_embeds" if kwargs.get("inputs_embeds") is not None else "input_ids"
        tokens, past = kwargs.get(name), kwargs.get("past_key_values")
        request, self._request = self._request, None
        if request is None and past is not None and int(past.get_seq_length()) > 0:
            return None  # decoding: an ordinary step with the causal adapter
        if tokens is None:
            raise ValueError("input_ids: expected token ids [batch, seq] (or inputs_embeds), got None")
        call.request = request
        call.plan = self._prompt_plan(backbone, tokens, kwargs) if request is None else request.plan
        self._refuse(tokens, kwargs, call.plan)
        kwargs.pop("logits_to_keep", None)  # the caller keeps its rows itself, once they are back in their places
        shared = self.structure.kv_layers != list(range(self.structure.num_layers))
        if shared and self.structure.checkpoints_reentrantly:
            raise ValueError(
                "gradient checkpointing: layers that share keys and values hand them on outside of what is recomputed "
                "and need gradient_checkpointing_kwargs={'use_reentrant': False}, got use_reentrant=True"
            )
        call.cache = self._cache(backbone, kwargs, request is not None)
        if self.config.use_fused:
            kwargs |= self._fused(call, tokens, name)
        else:
            kwargs |= self._three(call, tokens, name, kwargs)
        kwargs |= {"past_key_values": None, "use_cache": False}
        kwargs.pop("cache_position", None)
        return (), kwargs

    def _prompt_plan(self, backbone, tokens, kwargs) -> SegmentPlan:
        if backbone.training and torch.is_grad_enabled():
            raise ValueError(
                "labels: expected labels (or prompt_lengths) in training, to know where the prompt ends; got neither"
            )
        mask = kwargs.get("attention_mask")
        if not (mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2)):
            mask = self.padding_mask
            if mask is not None and mask.shape[0] < tokens.shape[0]:  # beams and returned sequences repeat the rows
                mask = mask.repeat_interleave(tokens.shape[0] // mask.shape[0], dim=0)
        shape = tuple(tokens.shape[:2])
        return SegmentPlan.from_batch(shape, mask, num_streams=self.config.num_streams, device=tokens.device)

    def _refuse(self, tokens, kwargs, plan: SegmentPlan) -> None:
        if self.config.separate_adapters and any(getattr(m, "merged", False) for m in self.structure.adapted):
            raise ValueError(
                "adapters: expected unmerged ones to run both streams (call unmerge_adapter()), got merged weights"
            )
        for flag in ("output_attentions", "output_hidden_states"):
            if kwargs.get(flag):
                raise ValueError(f"{flag}: expected False, since the rows of a Bitune pass are not the input's tokens")
        given = [name for name in PACKED if kwargs.get(name) is not None]
        if given:
            raise ValueError(f"{given[0]}: expected packed samples in training alone, with labels; got neither")
        if plan.batch_size > len(tokens) and (kwargs.get("use_cache") or kwargs.get("past_key_values") is not None):
            raise ValueError("use_cache: expected False with packed samples, whose cache nothing can go on from")
        for name, x in kwargs.items():
            per_token = isinstance(x, torch.Tensor) and x.shape[:2] == tokens.shape[:2]
            if per_token and name not in _UNDERSTOOD:
                raise ValueError(f"{name}: expected no further input per token with Bitune, got {list(x.shape)}")
        positions = kwargs.get("position_ids")
        if positions is not None:
            found = positions.expand(tokens.shape[:2]).flatten()[plan.token_index]
            expected = plan.positions[-plan.num_prompt - plan.num_answer :]
            if not torch.equal(found.cpu(), expected.cpu()):
                raise ValueError(
                    "position_ids: expected 0, 1, 2, ... from the first real token of each row (several samples in one "
                    "row need labels or prompt_lengths), got others"
                )

    def _cache(self, backbone, kwargs, packed: bool):
        past, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if packed:  # training: a cache only on demand
            use_cache = bool(use_cache) and not torch.is_grad_enabled()
        elif use_cache is None:
            use_cache = getattr(backbone.config, "use_cache", True)
        if not (use_cache or past is not None):
            return None
        if torch.is_grad_enabled() and any(p.requires_grad for p in backbone.parameters()):
            if past is not None:
                raise ValueError("past_key_values: expected a cache only under torch.no_grad(), got one in training")
            return None
        if past is None:
            from transformers import DynamicCache

            past = DynamicCache(config=backbone.config)
        return past

    def _fused(self, call: _Call, tokens, name: str) -> dict:
        plan = call.plan
        p = call.one_pass = OnePass(
            self.structure,
            plan,
            self.mixing,
            self.stream_masks,
            separate_adapters=self.config.separate_adapters,
            backend=self.config.backend,
            keep_cache=call.cache is not None,
            trims=self.trims,
        )
        call.scope.enter_context(p.active())
        call.scope.enter_context(p.checkpointing())
        return {name: plan.pack(tokens)[None], "position_ids": plan.positions[None], "attention_mask": p.mask}

    def _three(self, call: _Call, tokens, name: str, kwargs: dict) -> dict:
        schedule = call.three_pass = ThreePass(self.structure, call.plan, self.mixing, self.stream_masks)
        inner = {k: v for k, v in kwargs.items() if k not in (*_UNDERSTOOD, "past_key_values")} | {"use_cache": False}
        adapter = BIDIR if self.config.separate_adapters else None
        p = call.answer_pass = schedule.prompts(tokens, name, inner, adapter)
        call.scope.enter_context(p.active())
        call.scope.enter_context(p.checkpointing())
        return schedule.answers(tokens, name, p)

    def _after(self, backbone, args, kwargs, output):
        call = self._calls.pop()
        call.scope.close()
        if call.plan is None or output is None:  # not a pass of ours, or an exception is on its way
            return None
        rows, plan = output.last_hidden_state, call.plan
        if call.one_pass is not None:
            rows, caches = rows[0, rows.shape[1] - plan.num_answer :], call.one_pass.caches
        else:
            rows = call.three_pass.answer_rows(rows)
            caches = None if call.cache is None else call.three_pass.caches(call.answer_pass)
        output.last_hidden_state = rows[None] if call.request is not None else plan.unpack_answers(rows)
        if call.cache is not None:
            for layer, (k, v) in sorted(caches.items()):
                if self.structure.kv_layers[layer] != layer:
                    continue
                call.cache.update(k, v, getattr(self.structure.attentions[layer], "layer_idx", layer))
            output.past_key_values = call.cache
        if call.request is not None and call.request.holds:
            call.request.output = output
            output = type(output)(**{**output, "last_hidden_state": rows[None, :1]})
        return output
