"""The paper's schedule in plain PyTorch: one call of the model per stream, then one over the mixed cache.

Single-stream variants need one call over the prompt, whose attention is computed twice per layer.

Batched and padded, with the model's own attention function (SDPA, or eager where it must be), flags instead of mask
tensors where the batch allows it, and neither head nor answer rows in the prompt passes. It is the baseline of the
benchmarks and the independent check of the one-pass schedule.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..config import BituneConfig
from ..masks import visible_to_answer, visible_to_prompt
from ..mixing import MixingCoefficients, mix
from ..plan import SegmentPlan
from .adapters import BIDIR
from .passes import Pass, Past
from .structure import Structure, gathers


class PaddedPass(Pass):
    """A call of the backbone over [batch, width] rows of one segment, padded on the right, that records k and v."""

    def __init__(self, structure: Structure, plan: SegmentPlan, past: Past | None, adapter: str | None = None):
        super().__init__(structure, plan.cu_prompt.device)
        self.plan, self.past, self.adapter = plan, past, adapter
        self.implementation = structure.configs[0]._attn_implementation  # before the pass switches it
        self.recorded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # [batch, num_heads_kv, width, head_dim]
        self._masks: dict = {}

    def seen(self, layer: int, window: int | None, m: int) -> torch.Tensor | str | None:
        """The visibility of one layer: None (everything), "causal", or bool [batch, 1, queries, m + keys]."""
        raise NotImplementedError

    def attend(self, module, query, key, value, scaling, softcap, sinks):
        layer = self.structure.layer_index(module)
        self.recorded[layer] = key, value
        key, value = self.with_prompts(layer, key, value)
        m, key, value = self.with_past(layer, key, value)
        see = self.seen(layer, self.structure.windows[layer], m)
        return self.attention(module, query, key, value, see, scaling, softcap, sinks)

    def with_past(self, layer: int, key: torch.Tensor, value: torch.Tensor):
        """(m, key, value) with the m cached tokens of a layer in front."""
        if self.past is None:
            return 0, key, value
        k_past, v_past = (x.expand(len(key), -1, -1, -1) for x in self.past.rows(layer))
        return k_past.shape[2], torch.cat([k_past, key], dim=2), torch.cat([v_past, value], dim=2)

    def attention(self, module, query, key, value, see: torch.Tensor | str | None, scaling, softcap, sinks):
        """The model's own attention function under a visibility of ``seen``."""
        eager = self._eager(module, softcap, sinks)
        if see is not None and eager is not None:  # it adds a tensor to the scores
            if isinstance(see, str):
                length = query.shape[2]
                see = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()
            bias = torch.zeros(see.shape, dtype=query.dtype, device=see.device)
            see = bias.masked_fill(~see, torch.finfo(query.dtype).min)
        causal = isinstance(see, str)
        options = {k: v for k, v in (("softcap", softcap), ("s_aux", sinks)) if v is not None}
        options |= dict(scaling=scaling, dropout=0.0, is_causal=causal)
        function = eager or ALL_ATTENTION_FUNCTIONS["sdpa"]
        return function(module, query, key, value, None if causal else see, **options)[0]

    def with_prompts(self, layer: int, key: torch.Tensor, value: torch.Tensor):
        return key, value

    def _eager(self, module, softcap, sinks):
        # The family's own function where it has one and SDPA, which has no softcap and no sinks, isn't the model's. For
        # flash and flex kernels, which take no dense mask, SDPA stands in.
        if self.implementation == "eager" or softcap is not None or sinks is not None:
            return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return None

    def _cached_mask(self, key, build):
        if key not in self._masks:
            rows = [build(b) for b in range(self.plan.batch_size)]
            self._masks[key] = torch.stack(rows)[:, None]
        return self._masks[key]


class PromptPass(PaddedPass):
    """One stream over the prompts."""

    def __init__(self, structure, plan, past, stream_masks: tuple[str, ...], adapter: str | None = None):
        super().__init__(structure, plan, past, adapter)
        self.stream_masks = stream_masks

    def seen(self, layer, window, m):
        return self.visible(self.stream_masks[layer], window, m)

    def visible(self, mask: str, window: int | None, m: int) -> torch.Tensor | str | None:
        """The visibility of a stream with this mask, as ``seen``."""
        plan, width = self.plan, self.plan.max_prompt
        if window is not None and window >= m + width:
            window = None
        if window is None and mask == "causal" and not m:
            return "causal"  # padding on the right is never seen by a real token
        if window is None and mask == "full" and min(plan.prompt_lengths) == width:
            return None

        def build(b):
            see = visible_to_prompt(mask, width, m, window, self.mask.device)
            # padding sees itself, so that no row is empty
            column = torch.arange(-m, width, device=self.mask.device)
            itself = column == torch.arange(width, device=self.mask.device)[:, None]
            return (see & (column < plan.prompt_lengths[b])) | itself

        return self._cached_mask((mask, window, m), build)


class SinglePass(PromptPass):
    """The prompts in one stream, whose attention is computed by both masks and mixed.

    With ``doubles`` the batch stands in attention twice, once with each adapter, and keys and values are mixed too.
    """

    def __init__(self, structure, plan, past, stream_masks, mixing: MixingCoefficients, mix_layer):
        super().__init__(structure, plan, past, stream_masks)
        self.mixing, self.mix_layer = mixing, mix_layer
        self.doubles = "k" in mixing.weights

    def attend(self, module, query, key, value, scaling, softcap, sinks):
        layer = self.structure.layer_index(module)
        streams = [x.chunk(2) if self.doubles else (x, x) for x in (query, key, value)]
        outputs = []
        for mask, q, k, v in zip((self.stream_masks[layer], "causal"), *streams, strict=True):
            m, k, v = self.with_past(layer, k, v)
            see = self.visible(mask, self.structure.windows[layer], m)
            outputs.append(self.attention(module, q, k, v, see, scaling, softcap, sinks))
        bidir, causal = zip(*streams[1:], strict=True)
        self.recorded[layer] = self.mix_layer(layer, bidir, causal) if self.doubles else causal
        out = mix(outputs[1], outputs[0], self.mixing.beta(layer))
        return torch.cat([out, out]) if self.doubles else out

    def split(self, x):
        # the bidirectional half of the batch, in samples, or in rows where a family flattens them before a linear
        half = self.plan.batch_size * (self.plan.max_prompt if x.ndim == 2 else 1)
        return (0, half) if self.doubles and x.shape[0] == 2 * half else None

    def double(self, x):
        return torch.cat([x, x]) if x.ndim > 1 and x.shape[0] == self.plan.batch_size else x

    def undouble(self, x):
        return x[x.shape[0] // 2 :]


class AnswerPass(PaddedPass):
    """The answers over the mixed cache of the prompts."""

    def __init__(self, structure, plan, past, mixed):
        super().__init__(structure, plan, past)
        self.mixed = mixed  # per layer k, v [batch, num_heads_kv, max_prompt, head_dim], or None without prompt rows

    def with_prompts(self, layer, key, value):
        if self.mixed is None:
            return key, value
        k_mixed, v_mixed = self.mixed[layer]
        return torch.cat([k_mixed, key], dim=2), torch.cat([v_mixed, value], dim=2)

    def seen(self, layer, window, m):
        plan, n, a = self.plan, self.plan.max_prompt, self.plan.max_answer
        if window is not None and window >= m + n + a:
            window = None
        equal = min(plan.prompt_lengths) == n
        if window is None and equal and a == 1:
            return None
        if window is None and n == 0 and not m:
            return "causal"

        def build(b):  # columns: the past, n prompt places, of which the sample fills some, then a answer places
            before = m + plan.prompt_lengths[b]
            see = visible_to_answer(a, before, window, self.mask.device)
            hidden = torch.zeros(a, m + n - before, dtype=torch.bool, device=self.mask.device)
            return torch.cat([see[:, :before], hidden, see[:, before:]], dim=1)

        return self._cached_mask((window, m), build)


class ThreePass:
    """Runs the prompt passes of a batch and prepares the answer pass."""

    def __init__(
        self,
        structure: Structure,
        plan: SegmentPlan,
        mixing: MixingCoefficients | None,
        config: BituneConfig,
        past: Past | None = None,
    ):
        if plan.prefix_index is not None:
            raise ValueError("use_fused: expected True with turns='alternating', got False")
        self.structure, self.plan, self.mixing, self.config, self.past = structure, plan, mixing, config, past
        # Where a padded place lies in the flattened tokens; padding repeats a real token, whose rows are dropped again.
        index = plan.token_index.cpu()
        self.prompt_index = self._padded(index[: plan.num_prompt], plan.prompt_lengths, plan.max_prompt)
        self.answer_index = self._padded(index[plan.num_prompt :], plan.answer_lengths, plan.max_answer)

    def _padded(self, index, lengths, width) -> torch.Tensor:
        padded = self.plan.token_index[0].cpu().repeat(len(lengths), width)
        for b, rows in enumerate(index.split(list(lengths))):
            padded[b, : len(rows)] = rows
        return padded.to(self.plan.cu_prompt.device)

    @staticmethod
    def _call(tokens: torch.Tensor, name: str, index: torch.Tensor, first: Sequence[int], p: PaddedPass) -> dict:
        positions = torch.tensor(first, device=index.device)[:, None] + torch.arange(
            index.shape[1], device=index.device
        )
        return {name: tokens.flatten(0, 1)[index], "position_ids": positions, "attention_mask": p.mask}

    def prompts(self, tokens: torch.Tensor, name: str, kwargs: dict) -> AnswerPass:
        """Run the stream(s) over the prompts of ``tokens`` [batch, seq, ...] and mix their keys and values."""
        plan, structure = self.plan, self.structure
        if structure.checkpoints_reentrantly:
            raise ValueError(
                "gradient checkpointing: use_fused=False keeps keys and values between calls and needs "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, got use_reentrant=True"
            )
        sharded = (gathers(m) or "_fsdp_wrapped_module" in m._modules for m in structure.backbone.modules())
        if torch.is_grad_enabled() and any(sharded):
            raise ValueError(
                "use_fused: expected True in training with FSDP, which frees a layer's weights until a gradient "
                "reaches its output, and with three passes one reaches keys and values first; got False"
            )
        recorded = []
        for p in self.streams() if plan.num_prompt else []:
            call = self._call(tokens, name, self.prompt_index, plan.past_lengths, p)
            with p.active(), p.checkpointing():
                structure.backbone(**kwargs | call)
            recorded.append(p.recorded)
        if len(recorded) == 2:
            bidir, causal = recorded
            recorded = [{layer: self._mix(layer, bidir[layer], causal[layer]) for layer in bidir}]
        return AnswerPass(structure, plan, self.past, recorded[0] if recorded else None)

    def streams(self) -> list[PromptPass]:
        """The passes over the prompts; the first one is the bidirectional stream's."""
        masks = self.config.stream_masks(self.structure.num_layers)
        common = (self.structure, self.plan, self.past)
        if "beta" in self.config.mixed:
            return [SinglePass(*common, masks, self.mixing, self._mix)]
        bidir = PromptPass(*common, masks, BIDIR if self.config.separate_adapters else None)
        causal = PromptPass(*common, ("causal",) * self.structure.num_layers)
        return [bidir, causal][: self.plan.num_streams]

    def _mix(self, layer: int, bidir, causal) -> tuple[torch.Tensor, torch.Tensor]:
        # keys and values of a layer, each [batch, num_heads_kv, width, head_dim]
        layer = self.structure.kv_layers[layer]
        alphas = self.mixing.alpha(layer)
        if self.config.dynamic_mixing:
            lengths = self.plan.cu_prompt.diff()[:, None, None, None]
            real = torch.arange(self.plan.max_prompt, device=lengths.device)[:, None] < lengths
            sums = [(v * real).float().sum(2).flatten(1) for _, v in (bidir, causal)]
            state = torch.cat(sums, dim=1) / lengths[:, 0, 0].clamp(min=1)
            alphas = (a[:, None] for a in self.mixing.gated(layer, None, state))
        triples = zip(causal, bidir, alphas, strict=True)
        return tuple(mix(c.transpose(1, 2), b.transpose(1, 2), a).transpose(1, 2) for c, b, a in triples)

    def answers(self, tokens: torch.Tensor, name: str, p: AnswerPass) -> dict:
        """The keyword arguments of the last call."""
        first = [m + n for m, n in zip(self.plan.past_lengths, self.plan.prompt_lengths, strict=True)]
        return self._call(tokens, name, self.answer_index, first, p)

    def alone(self, tokens: torch.Tensor, name: str, p: PromptPass) -> dict:
        """The keyword arguments of the only call, where one stream reads prompts that have no answers."""
        return self._call(tokens, name, self.prompt_index, [0] * self.plan.batch_size, p)

    def rows(self, padded: torch.Tensor) -> torch.Tensor:
        """What the last call returned, [batch, width, ...] -> [A, ...], or [N, ...] of prompts without answers."""
        lengths = self.plan.answer_lengths if self.plan.num_answer else self.plan.prompt_lengths
        return torch.cat([row[:n] for row, n in zip(padded, lengths, strict=True)])

    def caches(self, p: AnswerPass) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Per layer k, v [batch, num_heads_kv, seq, head_dim] in the places of the tokens, zeros at padding."""
        plan, caches = self.plan, {}
        batch, seq = plan.padded_shape
        for layer, own in p.recorded.items():
            both = []
            for i in (0, 1):
                rows = [x[:, :a].transpose(0, 1) for x, a in zip(own[i], plan.answer_lengths, strict=True)]
                if p.mixed is not None:
                    past = zip(p.mixed[layer][i], plan.prompt_lengths, strict=True)
                    rows = [x[:, :n].transpose(0, 1) for x, n in past] + rows
                cache = own[i].new_zeros(batch * seq, own[i].shape[1], own[i].shape[3])
                cache[plan.token_index] = torch.cat(rows)
                both.append(cache.unflatten(0, (batch, seq)).transpose(1, 2))
            caches[layer] = tuple(both)
        return caches
