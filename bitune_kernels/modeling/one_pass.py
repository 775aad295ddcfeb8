"""The fused schedule: [bidir prompts | causal prompts | answers] run through the backbone once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.functional import pad

from ..config import BituneConfig
from ..mixing import MixingCoefficients, mix_prompts
from ..ops import bitune_attention, bitune_prefill
from ..plan import SegmentPlan
from .adapters import outermost
from .passes import Pass, Past, current, new_strides
from .structure import Structure

# Called in each layer, in order, with the plan, q, k, v [T, heads, head_dim] of all rows (positions applied) and
# attention's options: softmax_scale, window, softcap, sinks, stream_mask; beta and shared_qkv where outputs are mixed.
Observer = Callable[[SegmentPlan, torch.Tensor, torch.Tensor, torch.Tensor, dict], None]


class OnePass(Pass):
    """One run over all rows of a plan. With ``caches`` attention also writes the keys and values to keep.

    A plan without answers that has the prompt rows once is that of the bidirectional stream alone: nothing is mixed for
    an answer, and the last layer computes its rows too.
    """

    packed = True

    def __init__(
        self,
        structure: Structure,
        plan: SegmentPlan,
        mixing: MixingCoefficients | None,
        config: BituneConfig,
        keep_cache: bool,
        trims: bool,
        past: Past | None = None,
        observer: Observer | None = None,
    ):
        super().__init__(structure, plan.cu_prompt.device)
        if plan.num_streams < config.num_streams:
            mixing, config = None, replace(config, dynamic_mixing=False)
        own = config.separate_adapters and plan.num_streams == config.num_streams
        self.idle = torch.is_grad_enabled() and own and not plan.num_prompt
        self.past, self.config = past, config
        self.plan, self.mixing, self.stream_masks = plan, mixing, config.stream_masks(structure.num_layers)
        self.shared = () if mixing is None else mixing.alphas()
        self.doubles = config.doubles_rows and plan.num_prompt > 0
        self.attended = replace(plan, num_streams=2) if config.doubles_rows else plan  # the rows that attention gets
        # One plan for all layers, or for those with as long a past: what a backend derives from a plan is kept with it.
        self.plans = [self.attended] * structure.num_layers
        if past is not None:
            lengths = [past.rows(layer)[0].shape[2] for layer in range(structure.num_layers)]
            plans = {length: self.attended.with_prefix(length) for length in set(lengths)}
            self.plans = [plans[length] for length in lengths]
        self.trims = trims and structure.trim is not None and plan.answer_start > 0 and plan.num_answer > 0
        self.caches: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = {} if keep_cache else None
        # one row for each slot of a cache: on the size of a tensor a compiled layer doesn't specialize
        self._slots = torch.empty(math.prod(plan.padded_shape), 0, device="cpu") if keep_cache else None
        self.observer = observer
        if config.dynamic_mixing:
            lengths = torch.tensor(plan.prompt_lengths, device="cpu")
            device = plan.cu_prompt.device
            sample = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths)
            self.sample = sample.to(device)  # of each prompt row
            self.counts = lengths.clamp(min=1)[:, None].to(device)
            parts = {plan: plan.split() for plan in set(self.plans)}
            self.parts = [parts[plan] for plan in self.plans]  # of each layer: prompts, answers

    # properties, since a compiled layer specializes on plain numbers
    @property
    def num_rows(self) -> int:
        return self.attended.num_rows

    @property
    def residual_rows(self) -> int:
        return self.plan.num_rows

    @property
    def answer_rows(self) -> int:
        return self.plan.num_answer

    @property
    def bidir_rows(self) -> int:
        return self.plan.num_prompt if self.config.separate_adapters else 0

    def attend(self, module, query, key, value, scaling, softcap, sinks):
        layer = self.structure.layer_index(module)
        plan = self.plans[layer]
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [1, heads, T, dim] -> [T, heads, dim]
        if torch.is_autocast_enabled(q.device.type):  # rotary embeddings leave q and k in float32, v is lower
            q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
        options = dict(
            softmax_scale=scaling,
            window=self.structure.windows[layer],
            softcap=softcap,
            sinks=sinks,
            stream_mask=self.stream_masks[layer],
        )
        last = self.trims and layer == self.structure.num_layers - 1
        alpha_k = alpha_v = beta = None
        if self.mixing is not None:
            alpha_k, alpha_v = self._alphas(self.structure.kv_layers[layer], v)
            beta = self.mixing.beta(layer, self.shared)
        if beta is not None:
            options |= dict(beta=beta, shared_qkv=plan.num_streams == 1)
        if self.observer is not None:
            self.observer(plan, q, k, v, options)
        rows = q.shape[0]
        if last:
            q = q[plan.answer_start :]
        if self.past is not None:
            # what plain steps wrote under autocast may have another dtype
            options["prefix"] = tuple(x[0].transpose(0, 1).to(k.dtype) for x in self.past.rows(layer))
        elif plan.prefix_index is not None:
            options["prefix"] = self._earlier_turns(k, alpha_k), self._earlier_turns(v, alpha_v)
        out = self._run(layer, (q, k, v, alpha_k, alpha_v, plan), options)
        if not self.plan.num_prompt and torch.is_grad_enabled():  # as idle, for what reads prompts beside adapters
            out = out + sum(0 * x.sum() for x in (alpha_k, alpha_v, beta) if x is not None)
        if last or self.doubles:
            # attention must return as many rows as it was given; the module behind it drops these again
            out = pad(out, (0, 0, 0, 0, rows - out.shape[0], 0))
        return out[None]

    def _run(self, layer: int, call: tuple, options: dict) -> torch.Tensor:
        """The operator, and with ``caches`` what it leaves in the layer's."""
        _, k, v, _, _, plan = call
        if self.caches is None:
            if self.config.dynamic_mixing:
                return self._attend_mixed(layer, *call, backend=self.config.backend, **options)[0]
            return bitune_attention(*call, backend=self.config.backend, **options)[0]
        self.caches[layer] = k_cache, v_cache = [x.new_zeros(self._slots.shape[0], *x.shape[1:]) for x in (k, v)]
        if not self.config.dynamic_mixing:
            places = dict(k_cache=k_cache, v_cache=v_cache, cache_positions=plan.token_index)
            return bitune_prefill(*call, backend=self.config.backend, **places, **options)
        out, *mixed = self._attend_mixed(layer, *call, backend=self.config.backend, **options)
        for cache, prompt, own in zip((k_cache, v_cache), mixed, (k, v), strict=True):
            cache.index_copy_(0, plan.token_index, torch.cat([prompt, own[plan.answer_start :]]))
        return out

    def _alphas(self, layer: int, v: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        # scalars or [heads] of a layer, or with dynamic mixing [N, 1 or heads]
        if not self.config.dynamic_mixing:
            return self.mixing.alpha(layer, self.shared)
        n = self.plan.num_prompt
        state = v.new_zeros(self.plan.batch_size, 2 * v[0].numel(), dtype=torch.float32)
        rows = torch.cat([v[:n], v[n : 2 * n]], dim=1).flatten(1).float()
        alphas = self.mixing.gated(layer, self.shared, state.index_add(0, self.sample, rows) / self.counts)
        return tuple(alpha.index_select(0, self.sample) for alpha in alphas)

    def _attend_mixed(self, layer, q, k, v, alpha_k, alpha_v, plan, prefix=None, beta=None, **options):
        # With weights of their own for each sample, keys and values are mixed here. The prompts, and the answers over
        # the mix as their past, are then two calls.
        start = plan.answer_start
        mixed = tuple(mix_prompts(plan.segments(x)[:-1], alpha) for x, alpha in ((k, alpha_k), (v, alpha_v)))
        prompts, answers = self.parts[layer]
        out = []
        if q.shape[0] > plan.num_answer:
            own = [x[:start] for x in (q, k, v)]
            out.append(bitune_attention(*own, 0.0, 0.0, prompts, prefix=prefix, beta=beta, **options)[0])
        past = mixed
        if prefix is not None:  # each sample's past, then its prompt
            past = []
            for earlier, own in zip(prefix, mixed, strict=True):
                pairs = zip(earlier.split(plan.prefix_lengths), own.split(plan.prompt_lengths), strict=True)
                past.append(torch.cat([rows for pair in pairs for rows in pair]))
        own = q[q.shape[0] - plan.num_answer :], k[start:], v[start:]
        out.append(bitune_attention(*own, None, None, answers, prefix=past, **options)[0])
        return torch.cat(out), *mixed

    def _earlier_turns(self, x: torch.Tensor, alpha: torch.Tensor | None) -> torch.Tensor:
        # x [T, heads, dim], the keys or values -> [num_prefix, heads, dim]: mixed prompts and answers, turn by turn
        plan = self.attended
        *prompts, answer = plan.segments(x)
        return torch.cat([mix_prompts(prompts, alpha), answer]).index_select(0, plan.prefix_index)

    def take_caches(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]] | None:
        """Per layer k, v [batch, num_heads_kv, seq, head_dim], which are not kept here any longer."""
        if self.caches is None:
            return None
        caches, self.caches = self.caches, None
        shape = self.plan.padded_shape
        return {layer: tuple(x.unflatten(0, shape).transpose(1, 2) for x in kv) for layer, kv in caches.items()}

    def double(self, x: torch.Tensor) -> torch.Tensor:
        n = self.plan.num_prompt
        has_rows = x.ndim > 1 and x.shape[1] == self.plan.num_rows
        return torch.cat([x[:, :n], x], dim=1) if has_rows else x

    def undouble(self, x: torch.Tensor) -> torch.Tensor:
        rows = 0 if x.ndim == 2 else 1  # some families flatten to [rows, features] before a linear
        return x.narrow(rows, self.plan.num_prompt, x.shape[rows] - self.plan.num_prompt)


class TrimHooks:
    """In the last layer the prompt rows are needed for keys and values only.

    The layer is given the answer rows alone, its attention the norm of all rows, and the module that reads the
    attention's output the answer rows again.
    """

    def __init__(self, structure: Structure):
        self.handles = []
        trim = structure.trim
        if trim is None:
            return
        # The structure was found before there were adapters, which now stand in front of what they adapt.
        self.norm, leave = (outermost(m, structure.adapted) for m in (trim.norm, trim.projections.exit))
        self.handles = [
            trim.layer.register_forward_pre_hook(self.enter_layer, with_kwargs=True),
            trim.projections.attention.register_forward_pre_hook(self.enter_attention, with_kwargs=True),
            leave.register_forward_pre_hook(self.leave_attention),
        ]

    @staticmethod
    def _pass() -> OnePass | None:
        p = current()
        return p if p is not None and p.trims else None

    def enter_layer(self, layer, args, kwargs):
        p = self._pass()
        if p is None:
            return None
        p.all_rows = args[0] if args else kwargs["hidden_states"]

        def answer(x):
            # Beside the hidden states, some layers get further features of every row. Attention's own tensors
            # come as tuples, keywords, or without a dimension of features, and stay whole.
            per_row = isinstance(x, torch.Tensor) and x.ndim == 3 and x.shape[1] == p.residual_rows
            return new_strides(x[:, p.plan.answer_start :]) if per_row else x

        if args:
            return tuple(answer(x) for x in args), kwargs
        return args, kwargs | {"hidden_states": answer(p.all_rows)}

    def enter_attention(self, attention, args, kwargs):
        p = self._pass()
        if p is None:
            return None
        rows = p.all_rows if self.norm is None else self.norm(p.all_rows)
        del p.all_rows
        return ((rows, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": rows})

    def leave_attention(self, module, args):
        p = self._pass()
        return None if p is None else (new_strides(args[0][:, p.plan.answer_start :]), *args[1:])
