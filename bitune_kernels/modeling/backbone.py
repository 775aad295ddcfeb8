"""Hooks on a causal LM's backbone that turn one call over tokens into Bitune's passes.

The backbone rather than the causal LM is hooked, because trainers with a fused head call the backbone themselves.
Its caller sees an ordinary forward: tokens in, hidden states and a filled cache out.
"""

from __future__ import annotations

import inspect
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain

import torch

from ..config import BituneConfig
from ..mixing import MixingCoefficients
from ..plan import SegmentPlan
from .adapters import CAUSAL, CausalMerge
from .doubling import DoublingHooks
from .generate import Generation, check_cache
from .labels import PACKED, check_inputs
from .one_pass import Observer, OnePass, TrimHooks
from .passes import Pass, Past, current, leave_passes, new_strides, one_at_a_time, state
from .row_chunks import run_in_chunks
from .structure import Structure
from .three_pass import ThreePass
from .weights import refuse_partitioned

# Tensors of a backbone call that are understood; any other one per token could not be packed in silence.
_UNDERSTOOD = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position"}


@dataclass(eq=False)
class Request:
    """A call of the backbone by a plan that is known.

    Attributes:
        plan: the rows of each sample. Without answer rows it has those of the prompts once: the bidirectional stream
            runs alone, and its rows take the answers' place.
        holds: keep the answer rows here and hand on the first one alone, because their head runs later.
        output: what the backbone returned, where it holds: its ``last_hidden_state`` is [1, A, hidden].
    """

    plan: SegmentPlan
    holds: bool = False
    output: object = None


class _Call:
    """One call of the backbone on its way through the hooks.

    Attributes:
        prepares: whether other calls of the backbone run now, before this one's own.
        copies: int64 [batch], which of the distinct prompts in the plan each row is; None: every row its own.
    """

    def __init__(self):
        self.scope = ExitStack()
        self.prepares = False
        self.request: Request | None = None
        self.plan = self.one_pass = self.three_pass = self.answer_pass = self.cache = self.copies = self.past = None


class BackboneHooks:
    """Attached to one backbone for the life of a Bitune model."""

    def __init__(
        self, structure: Structure, config: BituneConfig, mixing: MixingCoefficients | None, head: torch.nn.Module
    ):
        self.structure, self.config, self.mixing = structure, config, mixing
        self.enabled = True
        self.trims = True
        self.tested = False  # whether one pass was compared with three
        self.generation: Generation | None = None
        self.turn = None  # a cache over which the next call reads a prompt
        self.merge: CausalMerge | None = None
        self.observer: Observer | None = None
        self._request: Request | None = None
        backbone = structure.backbone
        self._names = list(inspect.signature(backbone.forward).parameters)  # of positional arguments
        self._handles = [
            backbone.register_forward_pre_hook(self._before, with_kwargs=True),
            backbone.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            head.register_forward_pre_hook(_before_head),
        ]
        self._handles += run_in_chunks(structure.mlps)
        self._handles += TrimHooks(structure).handles
        if config.doubles_rows:
            self._handles += DoublingHooks(structure).handles

    def remove(self) -> None:
        """Leave the backbone as it was found."""
        _end_interrupted()
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def request(self, plan: SegmentPlan, *, holds: bool = False):
        """Inside, the next call of the backbone uses this plan and gives its answer rows packed, [1, A, hidden].

        Yields the ``Request``, which keeps those rows if it ``holds``.
        """
        with one_at_a_time, self._setting("_request", Request(plan, holds)):
            yield self._request

    @contextmanager
    def _setting(self, name: str, value):
        """Inside, an attribute has another value."""
        outer, within = getattr(self, name), state.call
        setattr(self, name, value)
        try:
            yield
        except BaseException:
            if within is None:  # else a hook may handle it, and the call goes on
                _end_interrupted()  # here, since the next call may be another thread's
            raise
        finally:
            setattr(self, name, outer)

    def generating(self, generation: Generation):
        """Inside, prompts are those of this run of generate()."""
        return self._setting("generation", generation)

    def turn_over(self, cache):
        """Inside, the first call with this cache, which may hold earlier turns of one conversation, reads a prompt."""
        return self._setting("turn", cache)

    @contextmanager
    def merged(self, merge: CausalMerge):
        """Inside, the adapter "causal" is merged into the base weights, except during passes over a prompt."""
        try:
            merge.apply()
            self.merge = merge
            yield
        finally:
            self.merge = None
            try:
                merge.undo()
            except BaseException:  # a KeyboardInterrupt: nobody else would put back the rest
                merge.undo()
                raise

    @contextmanager
    def unmerged(self):
        """Inside, the base weights are their own."""
        merge, self.merge = self.merge, None
        if merge is None:
            yield
            return
        merge.undo()
        try:
            yield
        finally:
            merge.apply()
            self.merge = merge

    def disabled(self):
        """Inside, the backbone is a plain causal decoder."""
        return self._setting("enabled", False)

    def observing(self, observer: Observer):
        """Inside, the one-pass schedule shows ``observer`` each layer's queries, keys and values."""
        return self._setting("observer", observer)

    def _decodes(self, past) -> bool:
        """Whether a call with this cache continues an answer: an ordinary step with the causal adapter."""
        if past is None:
            return False
        if not hasattr(past, "get_seq_length"):
            raise TypeError(f"past_key_values: expected a Cache of transformers, got {type(past).__name__}")
        # A static cache keeps its length on the device: reading it there would wait once per token.
        if self.generation is not None and past is self.generation.filled:
            return True
        if past is self.turn:
            self.turn = None
            return False
        return int(past.get_seq_length()) > 0

    def _before(self, backbone, args, kwargs):
        _end_interrupted()
        state.prefilled = False  # of a call whose rows no head has read
        if not self.enabled or current() is not None:
            return None
        if getattr(backbone, "_is_replica", False):
            raise ValueError(
                "base_model: expected one process per GPU (DistributedDataParallel, as torchrun and accelerate launch "
                "start it), got a replica of nn.DataParallel"
            )
        kwargs = kwargs | dict(zip(self._names, args, strict=False))
        if self._request is None and self._decodes(kwargs.get("past_key_values")):
            return None
        call, tokens, name, kwargs = self._begin(backbone, kwargs)
        if call.three_pass is not None:  # here, so that a model compiled as a whole reads its prompts compiled too
            kwargs |= self._three(call, tokens, name, kwargs)
        return (), kwargs

    @torch.compiler.disable  # what is entered here is left in another hook, where a graph would forget it
    def _begin(self, backbone, kwargs) -> tuple[_Call, torch.Tensor, str, dict]:
        past, request = kwargs.get("past_key_values"), self._request
        call, self._request = _Call(), None
        state.call = call
        refuse_partitioned("a weight", next(backbone.parameters()))  # DeepSpeed partitions after the attach
        name = "inputs_embeds" if kwargs.get("inputs_embeds") is not None else "input_ids"
        tokens = kwargs.get(name)
        check_inputs(kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        if self.merge is not None:
            self.merge.undo()
        self._refuse(tokens, kwargs)
        batch, call.request = tokens.shape[0], request
        if request is None:
            tokens, positions = self._take_prompts(backbone, call, tokens, kwargs)
            _refuse_positions(positions, call.plan)
        else:  # whose plan was made with these positions
            call.plan = request.plan
        self._refuse_length(call.plan)
        if call.plan.batch_size > batch and (kwargs.get("use_cache") or past is not None):
            raise ValueError("use_cache: expected False with packed samples, whose cache nothing can go on from")
        kwargs.pop("logits_to_keep", None)  # the caller keeps its rows itself, once they are back in their places
        shared = self.structure.kv_layers != list(range(self.structure.num_layers))
        if shared and self.structure.checkpoints_reentrantly:
            raise ValueError(
                "gradient checkpointing: layers that share keys and values hand them on outside of what is recomputed "
                "and need gradient_checkpointing_kwargs={'use_reentrant': False}, got use_reentrant=True"
            )
        call.cache = self._cache(backbone, kwargs, tokens, request is not None)
        if past is not None:
            check_cache(past, self.structure, batch, tokens.shape[1], empty=call.past is None)
        if self.config.use_fused:
            kwargs |= self._fused(call, tokens, name)
        else:
            call.three_pass = ThreePass(self.structure, call.plan, self.mixing, self.config, call.past)
        kwargs |= {"past_key_values": None, "use_cache": False}
        kwargs.pop("cache_position", None)
        return call, tokens, name, kwargs

    def _take_prompts(self, backbone, call: _Call, tokens, kwargs):
        """Plan a call whose tokens are prompts; returns the tokens and positions of the distinct ones."""
        mask, positions, past = (kwargs.get(x) for x in ("attention_mask", "position_ids", "past_key_values"))
        if positions is not None:
            if tuple(positions.shape) not in ((1, tokens.shape[1]), tuple(tokens.shape[:2])):
                raise ValueError(
                    f"position_ids: expected shape {list(tokens.shape[:2])} as the tokens, got {list(positions.shape)}"
                )
            positions = positions.expand(tokens.shape[:2])
        if backbone.training and torch.is_grad_enabled():
            raise ValueError(
                "labels: expected labels (or prompt_lengths) in training, to know where the prompt ends; got neither "
                "(Trainer keeps labels with label_smoothing_factor or compute_loss_func: give prompt_lengths, a column "
                "that it hands on with remove_unused_columns=False)"
            )
        if not (mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2)):
            mask = _padding(positions)
        held = 0 if past is None else int(past.get_seq_length())
        shape = [tokens.shape[0], held + tokens.shape[1]]
        if mask is not None and list(mask.shape) != shape:
            raise ValueError(f"attention_mask: expected shape {shape} as the tokens, got {list(mask.shape)}")
        if held:  # a turn of one conversation over those before
            call.plan = SegmentPlan.from_samples(
                tuple(tokens.shape[:2]),
                [(0, tokens.shape[1])],
                [tokens.shape[1]],
                prefix_lengths=[held],
                num_streams=self.config.num_streams,
                device=tokens.device,
            )
            call.past = Past(past, self.structure)
            return tokens, positions
        if self.generation is not None and mask is not None and not bool(mask[:, -1].all()):
            rows = (mask[:, -1] == 0).nonzero().flatten().tolist()
            raise ValueError(
                "attention_mask: expected padding on the left in generate(), since answers are appended to the last "
                f"column, got padding there in rows {rows}"
            )
        # beams and returned sequences repeat each prompt, and some trainers do
        first, call.copies = _repeats(tokens, mask, positions)
        tokens, mask, positions = (x if x is None or first is None else x[first] for x in (tokens, mask, positions))
        lengths, width = None, None if self.generation is None else self.generation.prompt_width
        if width is not None and width < tokens.shape[1]:  # candidates for the answer came with the prompt
            lengths = [width] * tokens.shape[0] if mask is None else mask[:, :width].ne(0).sum(1)
        call.plan = SegmentPlan.from_batch(
            tuple(tokens.shape[:2]), mask, lengths, num_streams=self.config.num_streams, device=tokens.device
        )
        return tokens, positions

    def _refuse(self, tokens, kwargs) -> None:
        if self.config.separate_adapters and any(getattr(m, "merged", False) for m in self.structure.adapted):
            raise ValueError(
                "adapters: expected unmerged ones to run both streams (call unmerge_adapter()), got merged weights"
            )
        one = self.structure.adapted[0]  # PEFT switches all of them
        if one.disable_adapters or one.active_adapters != [CAUSAL]:
            raise ValueError(
                f"adapters: expected {CAUSAL!r} to be active (set_adapter({CAUSAL!r}), enable_adapter_layers(); "
                "disable_adapter() makes the model the base model), got "
                f"{'disabled ones' if one.disable_adapters else one.active_adapters}"
            )
        embedding = self.structure.backbone.get_input_embeddings()
        # where attention alone has the rows twice, no other module has both adapters
        separate = self.config.separate_adapters and not self.config.doubles_rows
        adapted = separate and any(embedding is m for m in self.structure.adapted)
        if adapted and kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "inputs_embeds: expected input_ids where the token embeddings have an adapter for each stream, got "
                "vectors, which both would read"
            )
        noise = getattr(embedding, "neftune_noise_alpha", None)
        if noise and embedding.training:
            raise ValueError(
                "neftune_noise_alpha: expected None, since all samples are one row, whose length would size the noise, "
                f"and each stream would get its own, got {noise}"
            )
        for flag in ("output_attentions", "output_hidden_states"):
            if kwargs.get(flag):
                raise ValueError(f"{flag}: expected False, since the rows of a Bitune pass are not the input's tokens")
        routed = kwargs.get("output_router_logits")
        if getattr(self.structure.backbone.config, "output_router_logits", False) if routed is None else routed:
            raise ValueError(
                "output_router_logits: expected False (in the model's config too), since experts see the rows of a "
                "Bitune pass and not the input's tokens, got True"
            )
        given = [name for name in PACKED if kwargs.get(name) is not None]
        if given:
            raise ValueError(f"{given[0]}: expected packed samples in training alone, with labels; got neither")
        for name, x in kwargs.items():
            per_token = isinstance(x, torch.Tensor) and x.shape[:2] == tokens.shape[:2]
            if per_token and name not in _UNDERSTOOD:
                raise ValueError(f"{name}: expected no further input per token with Bitune, got {list(x.shape)}")

    def _refuse_length(self, plan: SegmentPlan) -> None:
        limit = self.structure.max_positions
        longest = max(map(sum, zip(plan.past_lengths, plan.prompt_lengths, plan.answer_lengths, strict=True)))
        if limit is not None and longest > limit:
            raise ValueError(
                f"input_ids: expected at most {limit} tokens per row, for which the model has learned positions, got "
                f"{longest}"
            )

    def _cache(self, backbone, kwargs, tokens, packed: bool):
        past, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if packed:  # training: a cache only on demand
            use_cache = bool(use_cache) and not torch.is_grad_enabled()
        elif use_cache is None:
            use_cache = getattr(backbone.config, "use_cache", True)
        if not (use_cache or past is not None):
            return None
        leaves = chain([tokens], backbone.parameters(), () if self.mixing is None else self.mixing.parameters())
        if torch.is_grad_enabled() and any(x.requires_grad for x in leaves):
            if past is not None:
                raise ValueError("past_key_values: expected a cache only under torch.no_grad(), got one in training")
            if kwargs.get("use_cache"):
                raise ValueError("use_cache: expected a cache to be asked for only under torch.no_grad(), got True")
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
            self.config,
            keep_cache=call.cache is not None,
            trims=self.trims,
            past=call.past,
            observer=self.observer,
        )
        _enter(call, p)
        return {name: plan.pack(tokens)[None], "position_ids": plan.positions[None], "attention_mask": p.mask}

    def _three(self, call: _Call, tokens, name: str, kwargs: dict) -> dict:
        schedule = call.three_pass
        if call.plan.num_answer:
            known = (*_UNDERSTOOD, "past_key_values")
            inner = {k: v for k, v in kwargs.items() if k not in known} | {"use_cache": False}
            call.prepares = True
            try:
                p = call.answer_pass = schedule.prompts(tokens, name, inner)
            finally:
                call.prepares = False
            inputs = schedule.answers(tokens, name, p)
        else:
            p = schedule.streams()[0]
            inputs = schedule.alone(tokens, name, p)
        _enter(call, p)
        return inputs

    def _after(self, backbone, args, kwargs, output):
        call = state.call
        return None if call is None or call.prepares else self._end(call, output)

    @torch.compiler.disable
    def _end(self, call: _Call, output):
        state.call = None
        call.scope.close()
        if call.plan is None or output is None:  # an exception is on its way
            return None
        rows, plan = output.last_hidden_state, call.plan
        if call.one_pass is not None:
            rows = rows[0, rows.shape[1] - (plan.num_answer or plan.num_prompt) :]
            caches = call.one_pass.take_caches()
        else:
            rows = call.three_pass.rows(rows)
            caches = None if call.cache is None else call.three_pass.caches(call.answer_pass)
        output.last_hidden_state = rows[None] if call.request is not None else _each(plan.unpack_answers(rows), call)
        state.prefilled = call.request is None and self.generation is None
        if call.cache is not None:
            for layer in sorted(caches):
                k, v = caches.pop(layer)  # the cache copies them, so one layer's are there twice and not all
                if self.structure.kv_layers[layer] == layer:
                    call.cache.update(_each(k, call), _each(v, call), self.structure.cache_index(layer))
            output.past_key_values = call.cache
            if call.request is None:
                self._begin_answer(call.cache)
        if call.request is not None and call.request.holds:
            call.request.output = output
            output = type(output)(**{**output, "last_hidden_state": rows[None, :1]})
        return output

    def _begin_answer(self, cache) -> None:
        if self.generation is not None and self.generation.filled is None:
            self.generation.filled = cache
        if self.merge is not None:
            self.merge.apply()


@torch.compiler.disable  # as _begin
def _enter(call: _Call, p: Pass) -> None:
    call.scope.enter_context(p.active())
    call.scope.enter_context(p.checkpointing())


def _end_interrupted() -> None:
    """End a call that a KeyboardInterrupt left open: torch runs the hooks behind a module for an Exception alone."""
    call = state.call
    if call is None or not call.prepares:
        state.call = None
        if call is not None:
            call.scope.close()
        leave_passes()


def _before_head(head, args):  # no method, since a copy of the head alone would copy the model with it
    rows = args[0]
    if state.prefilled and rows.shape[1] > 1:
        warnings.warn(
            "logits: without labels and prompt_lengths all tokens are prompt, and the logits of all but the last "
            "are zeros that say nothing; for a prefill give logits_to_keep=1",
            stacklevel=1,
        )
    state.prefilled = False
    return new_strides(rows), *args[1:]  # generate() has it read the last row of each prompt


def _each(x: torch.Tensor, call: _Call) -> torch.Tensor:
    """[distinct prompts, ...] -> [batch, ...]"""
    return x if call.copies is None else x.index_select(0, call.copies)


def _repeats(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Rows that equal the row before them in every tensor [batch, ...].

    Returns bool [batch], the first row of each run of equal ones, and int64 [batch], the run that each row belongs to;
    None and None if all rows differ.
    """
    tensors = [x for x in tensors if x is not None]
    if tensors[0].shape[0] == 1:
        return None, None
    same = torch.stack([(x[1:] == x[:-1]).flatten(1).all(1) for x in tensors]).all(0)
    if not bool(same.any()):
        return None, None
    first = torch.nn.functional.pad(~same, (1, 0), value=True)
    return first, first.cumsum(0) - 1


def _refuse_positions(positions: torch.Tensor | None, plan: SegmentPlan) -> None:
    if positions is None:
        return
    if not torch.equal(positions.flatten()[plan.token_index], plan.positions[-plan.num_prompt - plan.num_answer :]):
        raise ValueError(
            "position_ids: expected 0, 1, 2, ... from the first real token of each row (several samples in one row "
            "need labels or prompt_lengths), got others"
        )


def _padding(positions: torch.Tensor | None) -> torch.Tensor:
    """The 2-D mask bool [batch, seq] of left padding, where transformers has turned it into another form.

    It does so for static caches. Positions are 0 at padding and count from 0 at the first real token.
    """
    if positions is None:
        raise ValueError("attention_mask: expected one of shape [batch, seq], got another one and no position_ids")
    column = torch.arange(positions.shape[1], device=positions.device)
    start = torch.where(positions == 0, column, -1).amax(1, keepdim=True)
    mask = column >= start
    if bool((positions * ~mask).any()):
        raise ValueError("attention_mask: expected padding on the left and positions that are 0 there, got others")
    return mask
