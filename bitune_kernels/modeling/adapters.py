"""Which adapter serves which rows of a pass.

LoRA, IA3 and DoRA without dropout on linear layers run the base layer once over all rows (``lora/segment.py``; LoRA a
quantized one too). Every other tuner layer (VeRA, LoRA on embeddings, trained copies of whole modules, ...) runs its
own forward once per block of rows with that block's adapter: exact for any tuner.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners import ia3, lora
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..lora.segment import Adapter, adapted_row_norms, segment_lora_add, segment_lora_linear, segment_scale
from .passes import current, new_strides

logger = logging.getLogger(__name__)

CAUSAL, BIDIR = "causal", "bidir"


@contextmanager
def _using(module, adapter: str):
    active = module._active_adapter
    module._active_adapter = [adapter]
    try:
        yield
    finally:
        module._active_adapter = active


class SegmentLayer:
    """Before a layer of PEFT: in a pass it serves the rows of both streams with their own adapters, one by one."""

    def __reduce_ex__(self, protocol):
        # for pickle and copy: the class is made here and has no name, PEFT's has
        _, (segment,), *state = super().__reduce_ex__(protocol)
        return _new_segment, (segment.__bases__[1],), *state

    def forward(self, *args, **kwargs):
        p = current()
        block = p.split(args[0]) if p is not None and args else None
        plain = super().forward
        return plain(*args, **kwargs) if block is None else by_blocks(self, plain, *block, *args, **kwargs)


class SegmentLinear(SegmentLayer):
    """Before a tuner layer over a linear one, which runs once for both streams."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        p = current()
        if p is None or not p.packed or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        block = p.split(x)
        y = self._rows(x.reshape(-1, x.shape[-1]), 0 if block is None else block[1])
        return y.view(*x.shape[:-1], y.shape[-1])

    def _rows(self, x: torch.Tensor, n: int) -> torch.Tensor:
        """[T, in_features] -> [T, out_features], where rows [0, n) are the bidirectional stream's."""
        raise NotImplementedError


class SegmentLora(SegmentLinear):
    """Before a LoRA layer of PEFT over a linear one, plain or quantized."""

    def _rows(self, x, n):
        names = (BIDIR, CAUSAL) if n or _idles(self.lora_A) else (CAUSAL,)
        variants = self.lora_variant and [self.lora_variant[name] for name in names if name in self.lora_variant]
        foreign = variants and any(type(v) is not DoraLinearVariant for v in variants)
        adapters = None if foreign else self._adapters(names)
        if adapters is None:
            return by_blocks(self, super(SegmentLayer, self).forward, 0, n, x)
        both = (None, *adapters)[-2:]
        base = self._modules["base_layer"]
        weights = _plain_weights(base, x)
        if variants:
            if weights is None or any(a.dropout for a in adapters):
                return by_blocks(self, super(SegmentLayer, self).forward, 0, n, x)
            weight, bias = weights
            y = segment_lora_linear(x, weight, None, n, *both)
            norms = adapted_row_norms(weight, adapters)
            factors = [self.lora_magnitude_vector[name].weight / x for name, x in zip(names, norms, strict=True)]
            return segment_scale(y, n, *[None, *factors][-2:], bias)
        if weights is None:
            return segment_lora_add(base(x), x, n, *both)  # the library that owns the weights multiplies by them
        twice = n > 0 and current().repeats(base)
        return segment_lora_linear(x[n:] if twice else x, *weights, n, *both, twice=twice)

    def _adapters(self, names: Sequence[str]) -> list[Adapter] | None:
        """Those of these names, or None where a call of their modules does more than their tensors say."""
        parts = self._modules
        down, up, dropouts = (parts[part]._modules for part in ("lora_A", "lora_B", "lora_dropout"))
        adapters = []
        for name in names:
            a, b, dropout = down[name], up[name], dropouts[name]
            if _is_hooked(a) or _is_hooked(b) or _is_hooked(dropout):
                return None
            p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
            weights = _parameter(a, "weight"), _parameter(b, "weight")
            adapters.append(Adapter(*weights, self.scaling[name], _parameter(b, "bias"), p))
        return adapters


class SegmentIA3(SegmentLinear):
    """Before an IA3 layer of PEFT over a linear one."""

    def _rows(self, x, n):
        bidir = self.ia3_l[BIDIR].flatten() if n or _idles(self.ia3_l) else None
        causal = self.ia3_l[CAUSAL].flatten()
        if self.is_feedforward:
            return self.base_layer(segment_scale(x, n, bidir, causal))
        return segment_scale(self.base_layer(x), n, bidir, causal)


def _idles(adapters: nn.Module) -> bool:
    """Whether a layer's adapter "bidir" serves none of the pass's rows, but takes part in it (``Pass.idle``)."""
    return current().idle and BIDIR in adapters


def _parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    """``module.name``, mostly without nn.Module's search for it, which would be a tenth of the host time of a pass."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _is_hooked(module: nn.Module) -> bool:
    """Whether a call of a leaf does more than its class: hooks, a forward of its own, a wrapper (FSDP1's)."""
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own or bool(own["_modules"])


def _plain_weights(base: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight and bias of ``base``, if it is a frozen linear layer of numbers which x can be multiplied by, or None."""
    if type(base) is not nn.Linear or _is_hooked(base):
        return None
    weight, bias = _parameter(base, "weight"), _parameter(base, "bias")
    if type(weight) not in (nn.Parameter, torch.Tensor) or weight.requires_grad:
        return None
    if bias is not None and bias.requires_grad:
        return None
    same = weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
    return (weight, bias) if same else None


@cache
def _segment_class(layer: type) -> type:
    """The class of a layer of PEFT that serves both streams."""
    # bitsandbytes' layers have no linear base class, and exist only where it is installed
    bitsandbytes = issubclass(layer, lora.LoraLayer) and layer.__name__ in ("Linear8bitLt", "Linear4bit")
    kind = SegmentLayer
    if issubclass(layer, lora.Linear) or bitsandbytes:
        kind = SegmentLora
    elif issubclass(layer, ia3.Linear):
        kind = SegmentIA3
    return type(f"Segment{layer.__name__}", (kind, layer), {})


def _new_segment(layer: type) -> nn.Module:
    segment = _segment_class(layer)
    return segment.__new__(segment)


def by_blocks(module, forward, dim: int, n: int, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """``forward``, of a tuner layer, on rows [0, n) along ``dim`` with "bidir" and on the others with "causal"."""
    blocks = []
    for name, first, length in ((BIDIR, 0, n), (CAUSAL, n, x.shape[dim] - n)):
        if length or current().idle:
            rows = x.narrow(dim, first, length)
            with _using(module, name):
                blocks.append(forward(new_strides(rows) if dim else rows, *args, **kwargs))
    return torch.cat(blocks, dim) if len(blocks) > 1 else blocks[0]


def restrict(config: PeftConfig, model: nn.Module, modules: set[nn.Module]) -> PeftConfig:
    """``config``, whose adapter ``model`` has already, for those of the adapted modules that are among ``modules``.

    Raises:
        ValueError: none of them is adapted.
    """
    kept: dict[type, list[str]] = {BaseTunerLayer: [], AuxiliaryTrainingWrapper: []}
    for name, module in model.named_modules():
        for kind, names in kept.items():
            if isinstance(module, kind) and base_module(module) in modules:
                names.append(name)
    if not any(kept.values()):
        raise ValueError(
            "peft: expected adapters on modules that make queries, keys or values, for the second adapter of "
            f"'single_stream_dual', got target_modules={config.target_modules!r}"
        )
    changes = {"target_modules": kept[BaseTunerLayer] or "dummy-target-modules"}
    if isinstance(config, ia3.IA3Config):  # named anew, as PEFT found them: which of them scale their input
        inputs = {name for name, m in model.named_modules() if getattr(m, "is_feedforward", False)}
        changes["feedforward_modules"] = [name for name in kept[BaseTunerLayer] if name in inputs]
    if getattr(config, "modules_to_save", None):
        changes["modules_to_save"] = kept[AuxiliaryTrainingWrapper] or None
    return replace(config, **changes)


# Kinds of PEFT whose result for a token depends on more than that token's features: on the whole batch, on what stands
# around it, on a task, or on a second network beside the model.
_BEYOND_TOKENS = ("ADAPTION_PROMPT", "LILY", "POLY", "SHADOW", "XLORA")

# Ways to begin LoRA that take from the base weights what they put into the adapter.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_unsupported(config: PeftConfig, variant: str, separate: bool) -> None:
    """Raise ValueError for adapters that packed rows, or two streams with one each (``separate``), can't have."""
    kind, given = type(config).__name__, lambda name: getattr(config, name, None)
    if config.is_prompt_learning:
        raise ValueError(
            f"peft: expected adapters inside the model, got {kind}, whose virtual tokens would not be part of the "
            "prompt"
        )
    if config.peft_type in _BEYOND_TOKENS:
        raise ValueError(
            f"peft: expected adapters that work on each token by itself, got {kind}; a pass has the rows of several "
            "samples and of both streams"
        )
    for name, reason in (
        ("alora_invocation_tokens", "aLoRA is off up to these tokens of a sample, and would be off everywhere"),
        ("layer_replication", "it changes the layers that the streams run through; replicate them in the base model"),
    ):
        if given(name):
            raise ValueError(f"peft: expected no {name}, since {reason}, got {given(name)}")
    if separate and given("trainable_token_indices"):
        raise ValueError(
            f"peft: expected no trainable_token_indices with the two adapters of {variant!r}, since PEFT keeps "
            "them in layers within layers; modules_to_save=['embed_tokens', 'lm_head'] trains all tokens"
        )
    start = given("init_lora_weights")
    if separate and isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise ValueError(
            "peft: expected init_lora_weights that leave the base weights alone, which the two adapters of "
            f"{variant!r} share, got {start!r}"
        )


def _full_finetuning(base_model: nn.Module) -> PeftConfig:
    """A PEFT config that gives each adapter a trained copy of every module with parameters."""
    kinds = (nn.Linear, nn.Embedding)
    names = []
    for name, module in base_model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        norm = "norm" in type(module).__name__.lower()
        if not (isinstance(module, kinds) or norm or type(module).__name__ == "Conv1D"):
            raise ValueError(
                f"peft: full finetuning (None) supports linear, embedding and norm modules, got {name} "
                f"({type(module).__name__}); use adapters instead"
            )
        names.append(name)
    tied = base_model.get_output_embeddings().weight is base_model.get_input_embeddings().weight
    if tied:  # one trained table per adapter would serve both ends: keep the shared one frozen instead
        ends = {id(base_model.get_output_embeddings()), id(base_model.get_input_embeddings())}
        names = [n for n, m in base_model.named_modules() if n in set(names) and id(m) not in ends]
        logger.warning("full finetuning: the embedding is tied to the output matrix and stays frozen")
    # PEFT's own way of saying that no module gets a low-rank adapter
    return LoraConfig(target_modules="dummy-target-modules", modules_to_save=names, task_type="CAUSAL_LM")


def adapter_configs(config: PeftConfig | None, base_model: nn.Module) -> tuple[PeftConfig, PeftConfig]:
    """Two copies of the user's PEFT config, for "causal" and "bidir"; None: full finetuning."""
    config = _full_finetuning(base_model) if config is None else config
    copies = copy.deepcopy(config), copy.deepcopy(config)
    for c in copies:
        c.inference_mode = False
    return copies


def base_module(module: nn.Module) -> nn.Module:
    """What an adapted module was before it got adapters."""
    return module.base_layer if isinstance(module, BaseTunerLayer) else module.original_module


def outermost(module: nn.Module | None, adapted: Sequence[nn.Module]) -> nn.Module | None:
    """The one of the adapted modules that stands in front of ``module``, or the module itself."""
    return next((m for m in adapted if base_module(m) is module), module)


def route_rows(model: nn.Module, attentions: Sequence[nn.Module]) -> list[nn.Module]:
    """Make every adapted module serve each block of rows with its own adapter; returns these modules.

    Args:
        attentions: modules that must stay what a pass knows them as, without an adapter around them.
    """
    adapted = []
    for name, module in model.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        if type(module).__name__ == "ParamWrapper":
            raise ValueError(
                f"peft: adapters on the expert parameters of {name} can't serve two streams, since experts see a "
                "selection of the tokens; expected target_modules without experts (attention only, for example)"
            )
        if not set(base_module(module).modules()).isdisjoint(attentions):
            raise ValueError(
                "peft: expected adapters on the projections of attention modules, or beside them, got one around "
                f"{name}"
            )
        adapted.append(module)
    for module in adapted:
        module.__class__ = _segment_class(type(module))  # as FSDP does: PEFT chose it, and its state and names stay
    return adapted


class CausalMerge:
    """The adapter "causal" added to the base weights, and taken out again to the bit.

    Subtracting what was added would leave the rounding of both steps in the base weights. They are kept beside the
    merged ones instead, which costs the memory of every adapted weight once more.

    Raises:
        ValueError: base weights that can't be merged and restored: quantized, sharded, used elsewhere unadapted, or
            without the bias that an adapter has.
    """

    def __init__(self, model: nn.Module):
        self._layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self._kept: list[tuple[nn.Parameter, torch.Tensor]] = []
        names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        for module in self._layers:
            if module.merged:
                raise ValueError(f"merged_decoding: expected unmerged adapters, got {module.merged_adapters} merged")
            biased = getattr(module, "lora_bias", {}).get(CAUSAL)
            if biased and getattr(module.get_base_layer(), "bias", None) is None:
                raise ValueError("merged_decoding: expected base layers with a bias for lora_bias, got one without")
            for name, p in module.get_base_layer().named_parameters():
                kind = type(module.get_base_layer()).__name__
                if type(p) is not nn.Parameter or not p.is_floating_point():
                    raise ValueError(
                        f"merged_decoding: expected whole floating-point base weights, got the {name} of a {kind} as "
                        f"{type(p).__name__} of {p.dtype}"
                    )
                if names[id(p)] > 1:
                    raise ValueError(
                        f"merged_decoding: expected base weights of one module each, got the {name} of a {kind}, which "
                        "is tied to a module without this adapter"
                    )

    def apply(self) -> None:
        """Merge, unless they are merged; what fails on the way leaves the base weights as they were."""
        if self._kept:
            return
        try:
            with self._changing():
                for module in self._layers:
                    own = list(module.get_base_layer().parameters())
                    self._kept += [(p, p.detach().clone()) for p in own]
                    module.merge(adapter_names=[CAUSAL])
                    # PEFT changes them unseen by autograd, and a gradient would go through the merged ones
                    torch.autograd.graph.increment_version(own)
        except Exception:
            self.undo()
            raise

    def undo(self) -> None:
        """Put the base weights back, if they are merged."""
        if not self._kept:
            return
        with self._changing():
            for module in self._layers:
                if module.merged:
                    module.unmerge()
            for p, kept in self._kept:
                p.copy_(kept)
            self._kept.clear()

    @contextmanager
    def _changing(self):
        # PEFT gives some weights new storage, which made in inference mode would be that of an inference tensor. What
        # autocast keeps of a weight that can be trained is its value when it was first used.
        inference = any(p.is_inference() for module in self._layers for p in module.get_base_layer().parameters())
        try:
            with torch.inference_mode(inference), torch.no_grad():
                yield
        finally:
            torch.clear_autocast_cache()
