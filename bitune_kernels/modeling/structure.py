"""The parts of a backbone that a pass touches, as data."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

ATTENTION_NAME = "bitune"  # under which our attention function is registered with transformers


# The name of the one child of torch's wrappers: CheckpointWrapper, FSDP1, a compiled module.
_WRAPPED = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")


def _unwrap(module: nn.Module) -> list[nn.Module]:
    """The wrappers around a module from the outside in, and the module."""
    found = [module]
    while inner := [found[-1]._modules[name] for name in _WRAPPED if name in found[-1]._modules]:
        found += inner
    return found


def gathers(module: nn.Module | None) -> bool:
    """Whether FSDP2 gathers the module's weights around each of its calls."""
    return hasattr(module, "unshard")


@dataclass(eq=False)
class Projections:
    """The modules inside one layer's attention, around its attention function.

    Attributes:
        before: those that run before it, and make queries, keys and values.
        direct: those of them that read the attention module's own input.
        exit: the first one that reads its output, or None.
    """

    attention: nn.Module
    before: set[nn.Module]
    direct: set[nn.Module]
    exit: nn.Module | None


@dataclass(eq=False)
class Trim:
    """Where the last layer can drop the prompt rows once it has their keys and values."""

    layer: nn.Module
    norm: nn.Module | None  # what stands between the layer's input and its attention
    projections: Projections


@dataclass(eq=False)
class Structure:
    """The parts of a backbone that a pass touches.

    Attributes:
        backbone: what the causal LM calls between its tokens and its head.
        attentions: the attention modules, one per layer, in the order they run.
        layers: every module that transformers may checkpoint.
        configs: the config objects whose attention implementation the attentions follow.
        windows: the sliding window of each layer, or None.
        num_heads_q, num_heads_kv: query and key/value heads of each layer.
        head_dims, value_dims: the size of a key and of a value of each layer.
        kv_layers: the layer whose keys and values each layer attends to: itself, or an earlier one that it shares
            them with. They are mixed once, so both layers use the first one's coefficients and cache.
        projections: of each layer.
        trim: how to trim the last layer, or None where that isn't possible.
        adapted: the PEFT layers, once there are adapters.
        max_positions: how many tokens of a row the backbone has learned positions for, or None if it has learned none.
        mlps: modules of the layers beside attention that map x [1, rows, hidden] alone, row by row, to the same shape.
        direct: the modules that read the input of an attention module.
        unused_bidir: modules behind the keys and values of the last layer, where the bidirectional stream ends.
    """

    backbone: nn.Module
    attentions: list[nn.Module]
    layers: list[nn.Module]
    configs: list
    windows: list[int | None]
    num_heads_q: list[int]
    num_heads_kv: list[int]
    head_dims: list[int]
    value_dims: list[int]
    kv_layers: list[int]
    projections: list[Projections]
    trim: Trim | None
    max_positions: int | None
    mlps: list[nn.Module]
    unused_bidir: set[nn.Module]
    adapted: list[nn.Module] = field(default_factory=list)

    def __post_init__(self):
        # by address, since a compiled layer takes the number of another one from a dictionary of modules, and the
        # weights of one that was replaced from a set
        self.direct = {id(m) for p in self.projections for m in p.direct}
        self._index = {id(m): i for i, m in enumerate(self.attentions)}
        self._layers = {id(m) for m in self.layers}

    def __reduce__(self):
        # pickle and copy make it anew, since addresses change
        return type(self), tuple(getattr(self, name) for name in self.__dataclass_fields__)

    @property
    def num_layers(self) -> int:
        return len(self.attentions)

    @property
    def checkpointed(self) -> list[tuple[nn.Module, str]]:
        """What would be recomputed in a backward pass now: a module, and the name of its function that sees to it.

        Layers by transformers' own flag, and by torch's CheckpointWrapper in their place, as FSDP's activation
        checkpointing puts it.
        """
        found = [
            (m, "_gradient_checkpointing_func")
            for m in self.layers
            if getattr(m, "gradient_checkpointing", False) and m.training
        ]
        for _, _, wrappers, _ in self._wrapped():
            found += [(m, "checkpoint_fn") for m in wrappers if "checkpoint_fn" in vars(m)]
        return found

    @cached_property
    def _holders(self) -> list[nn.Module]:
        # Modules whose children are layers. Not made with the rest: a copy is made before its modules have children.
        return [
            m
            for m in self.backbone.modules()
            if m._modules.keys().isdisjoint(_WRAPPED) and any(id(_unwrap(c)[-1]) in self._layers for c in m.children())
        ]

    def _wrapped(self):
        # Layers in wrappers: (holder, the outermost wrapper's name in it, wrappers from the outside in, layer).
        for holder in self._holders:
            for name, child in holder.named_children():
                *wrappers, m = _unwrap(child)
                if wrappers and id(m) in self._layers:
                    yield holder, name, wrappers, m

    @contextmanager
    def unwrapped(self):
        """Inside, layers stand in their own places and not in wrappers, whose names PEFT doesn't know."""
        wrapped = list(self._wrapped())
        for holder, name, _, layer in wrapped:
            holder._modules[name] = layer
        try:
            yield
        finally:
            for holder, name, wrappers, _ in wrapped:
                holder._modules[name] = wrappers[0]

    @property
    def checkpoints_reentrantly(self) -> bool:
        """Whether those layers run without autograd at first, so that nothing they hand on outside has gradients."""
        keywords = [getattr(getattr(m, name), "keywords", {}) for m, name in self.checkpointed]
        return any(k.get("use_reentrant", True) for k in keywords)

    def layer_index(self, attention: nn.Module) -> int:
        return self._index[id(attention)]

    def cache_index(self, layer: int) -> int:
        """The layer of a transformers cache that belongs to one of the model's."""
        return getattr(self.attentions[layer], "layer_idx", layer)
