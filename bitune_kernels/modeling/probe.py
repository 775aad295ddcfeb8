"""Finding the structure of a model by watching a few tiny forwards, instead of knowing every family by name."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from .passes import attention_forward, evaluating
from .structure import ATTENTION_NAME, Projections, Structure, Trim

_PROBE_TOKENS = 5

# Keyword arguments of attention functions that carry no information which the plan doesn't have.
_IGNORED_KWARGS = {"position_ids", "cache_position", "position_embeddings", "past_key_values", "s_aux"}


class _Probe:
    """Records what happens during one forward of the backbone, in order."""

    def __init__(self):
        self.calls = []  # (attention module, query, key, value [1, heads, tokens, head_dim], window)
        self.problems = []
        self.order = []  # ("module", module) where it is entered, ("attention", module) where it calls the function
        self.inputs = {}  # module -> its hidden states
        self.produced = {}  # id of an output -> the last module that returned it
        self.maps = {}  # module -> x and output, of modules that were called with x alone
        self.local_sizes = {}
        self.keep = []  # tensors whose id is remembered must stay alive
        self.mixes = True  # else attention keeps tokens apart, and its output is 0
        self.given_mask = None  # the attention mask that the backbone was called with

    def attention(self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        for name, x in kwargs.items():
            if isinstance(x, torch.Tensor) and name not in _IGNORED_KWARGS:
                self.problems.append(f"its attention depends on {name!r}, which packed rows can't supply")
        window = kwargs.get("sliding_window")
        if attention_mask is not None:
            window, chunked = self.local_sizes.get(id(attention_mask), (window, False))
            if chunked:
                self.problems.append("its attention is chunked, for which a bidirectional stream is not defined")
        given = self.given_mask
        if given is not None and (attention_mask is None or attention_mask.data_ptr() != given.data_ptr()):
            self.problems.append("it makes an attention mask of its own from the one that it is given")
        if not getattr(module, "is_causal", True):
            self.problems.append("its attention is not causal")
        if key.shape[2] != query.shape[2]:
            self.problems.append("its attention has keys that are not tokens of the input")
        self.calls.append((module, query, key, value, window))
        self.order.append(("attention", module))
        group_size = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group_size, dim=1) for x in (key, value))
        if self.mixes:
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:  # not a number where one of the three isn't
            out = 0 * (value + query.mean(-1, keepdim=True) + key.mean(-1, keepdim=True))
        return out.transpose(1, 2).contiguous(), None

    def mask(self, *args, local_size=None, mask_function=None, device=None, **kwargs):
        mask = torch.zeros(1, 1, _PROBE_TOKENS, _PROBE_TOKENS, device=device)
        chunked = False
        if local_size is not None and mask_function is not None:
            q, kv = torch.tensor(local_size, device=device), torch.tensor(local_size - 1, device=device)
            chunked = local_size > 1 and not bool(mask_function(0, 0, q, kv))
        self.local_sizes[id(mask)] = (local_size, chunked)
        self.keep.append(mask)
        return mask

    def entered(self, module, args, kwargs):
        self.order.append(("module", module))
        self.inputs[module] = kwargs.get("hidden_states", args[0] if args else None)

    def left(self, module, args, kwargs, output):
        if len(args) == 1 and not kwargs and all(isinstance(x, torch.Tensor) for x in (*args, output)):
            self.maps[module] = args[0], output
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, torch.Tensor):
            self.produced[id(output)] = module
            self.keep.append(output)


_probe: _Probe | None = None


def _register() -> None:
    # makes our attention and mask functions known to transformers

    def attention(module, *args, **kwargs):
        return (attention_forward if _probe is None else _probe.attention)(module, *args, **kwargs)

    def mask(*args, **kwargs):
        if _probe is None:
            raise RuntimeError("transformers asked for a mask during a Bitune pass; this family can't be used")
        return _probe.mask(*args, **kwargs)

    AttentionInterface.register(ATTENTION_NAME, attention)
    AttentionMaskInterface.register(ATTENTION_NAME, mask)


_register()  # here, since a model that was pickled is never probed


@contextmanager
def _probing(model: nn.Module, configs: list):
    global _probe
    implementations = [c._attn_implementation for c in configs]
    _probe = probe = _Probe()
    handles = []
    for m in model.modules():
        handles.append(m.register_forward_pre_hook(probe.entered, with_kwargs=True))
        handles.append(m.register_forward_hook(probe.left, with_kwargs=True))
    try:
        for c in configs:
            c._attn_implementation = ATTENTION_NAME
        with evaluating(model):
            yield probe
    finally:
        _probe = None
        for handle in handles:
            handle.remove()
        for c, implementation in zip(configs, implementations, strict=True):
            c._attn_implementation = implementation


def find_structure(model: nn.Module) -> Structure:
    """Watch forwards of a causal LM's backbone over a few tokens.

    Raises:
        ValueError: the family can't be used, with the reason; the model is left as it was.
    """
    name = type(model).__name__
    backbone = model.get_decoder() if hasattr(model, "get_decoder") else None
    if backbone is model or not isinstance(backbone, PreTrainedModel):
        # it is looked for by name, under which some families keep a head or nothing
        backbone = next((m for m in model.children() if isinstance(m, PreTrainedModel)), None)
    if backbone is None or not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(f"base_model: expected a transformers causal LM with a decoder backbone, got {name}")
    configs = list({id(m.config): m.config for m in [model, *backbone.modules()] if hasattr(m, "config")}.values())
    device = next(backbone.parameters()).device
    if device.type == "meta":
        raise ValueError(
            "base_model: expected real weights, got parameters on the meta device (for FSDP on all processes: "
            "cpu_ram_efficient_loading=False)"
        )
    ids = torch.arange(1, _PROBE_TOKENS + 1, device=device)[None]
    with _probing(backbone, configs) as probe:
        try:
            out = backbone(input_ids=ids, use_cache=False)
        except Exception as e:
            raise ValueError(f"base_model: {name} can't be used: a plain forward failed: {e}") from e
    if not probe.calls:
        raise ValueError(
            f"base_model: {name} can't be used: it computes attention itself and never calls the attention function "
            "registered with transformers (AttentionInterface)"
        )
    attentions = [call[0] for call in probe.calls]
    if len(set(attentions)) != len(attentions):
        probe.problems.append("an attention module runs more than once in a forward")
    expected = getattr(backbone.config, "num_hidden_layers", len(attentions))
    if len(attentions) != expected:
        probe.problems.append(f"only {len(attentions)} of {expected} layers use the registered attention function")
    if not hasattr(out, "last_hidden_state"):
        probe.problems.append("its backbone gives no last_hidden_state")
    if probe.problems:
        raise ValueError(f"base_model: {name} can't be used: {probe.problems[0]}")

    _, queries, keys, values, windows = zip(*probe.calls, strict=True)
    places = [key.data_ptr() for key in keys]
    projections = [_find_projections(m, probe) for m in attentions]
    modules = dict(backbone.named_modules())
    names = {m: name for name, m in modules.items()}
    layers = [_layer_of(names[m], modules) for m in attentions]
    layer = layers[-1]
    structure = Structure(
        backbone=backbone,
        attentions=attentions,
        layers=[m for m in backbone.modules() if hasattr(m, "gradient_checkpointing") and m is not backbone],
        configs=configs,
        windows=list(windows),
        num_heads_q=[query.shape[1] for query in queries],
        num_heads_kv=[key.shape[1] for key in keys],
        head_dims=[key.shape[3] for key in keys],
        value_dims=[value.shape[3] for value in values],
        kv_layers=[places.index(place) for place in places],
        projections=projections,
        trim=None if layer is None else _find_trim(layer, projections[-1], probe),
        max_positions=_max_positions(model, backbone),
        mlps=_find_mlps(layers, attentions, probe),
        unused_bidir=_unused(model, backbone, layer, attentions[-1], probe),
    )
    call = dict(input_ids=ids, position_ids=torch.arange(_PROBE_TOKENS, device=device)[None])
    with _probing(backbone, configs) as probe:
        _check_cached(name, structure, call, out.last_hidden_state)
        probe.mixes = False
        probe.given_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
        _check_tokens_apart(name, backbone, call | dict(attention_mask=probe.given_mask))
    if probe.problems:
        raise ValueError(f"base_model: {name} can't be used: {probe.problems[0]}")
    return structure


def _check_cached(name: str, structure: Structure, call: dict, hidden: torch.Tensor) -> None:
    """Refuse a family that caches something else than what its attention is given, or begins at another position.

    Multi-head latent attention keeps the latents that keys and values are made of. Keys and values are mixed with
    weights of their own, which no latent gives. ``hidden`` are the hidden states of a call without position_ids.
    """
    cache = DynamicCache(config=structure.backbone.config)
    out = structure.backbone(**call, past_key_values=cache, use_cache=True)
    if float((out.last_hidden_state - hidden).float().norm()) > 0.01 * float(hidden.float().norm()):
        raise ValueError(
            f"base_model: {name} can't be used: its positions don't count 0, 1, 2, ... from the first token"
        )
    for layer, source in enumerate(structure.kv_layers):
        if layer != source:
            continue
        cached = cache.layers[structure.cache_index(layer)]
        heads = structure.num_heads_kv[layer]
        expected = [(heads, structure.head_dims[layer]), (heads, structure.value_dims[layer])]
        found = [(x.shape[1], x.shape[3]) for x in (cached.keys, cached.values)]
        if found != expected:
            raise ValueError(
                f"base_model: {name} can't be used: a mixed cache has keys and values of {expected} heads and sizes, "
                f"got a cache of {found} in layer {layer}"
            )


def _check_tokens_apart(name: str, backbone: nn.Module, call: dict) -> None:
    """Refuse a family in which something beside attention looks from token to token, as state-space layers do.

    It would look from one sample or stream into the next in one pass, and start anew at the answer in three.
    """
    middle = call["input_ids"].new_tensor([_PROBE_TOKENS // 2])
    embedding = backbone.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, x: x.index_fill(1, middle, torch.nan))
    try:
        rows = backbone(**call, use_cache=False).last_hidden_state[0]
    finally:
        handle.remove()
    if int(rows.isnan().any(-1).sum()) > 1:
        raise ValueError(
            f"base_model: {name} can't be used: something beside its attention looks from one token to others (a "
            "state-space layer or a convolution, for example)"
        )


def _layer_of(name: str, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The element of a ModuleList that holds the module of this name."""
    while name and not isinstance(modules[name.rpartition(".")[0]], nn.ModuleList):
        name = name.rpartition(".")[0]
    return modules[name] if name else None


def _find_mlps(layers: list[nn.Module | None], attentions: list[nn.Module], probe: _Probe) -> list[nn.Module]:
    # Row by row they work in any model that one pass is right for, which the self-test shows.
    found = []
    for m in dict.fromkeys(m for layer in layers if layer is not None for m in layer.children()):
        x, y = probe.maps.get(m, (None, None))
        inner = set(m.modules())
        if x is not None and x.ndim == 3 and x.shape == y.shape and len(inner) > 1 and inner.isdisjoint(attentions):
            found.append(m)
    return found


def _max_positions(model: nn.Module, backbone: nn.Module) -> int | None:
    limit = getattr(backbone.config, "max_position_embeddings", None)
    tables = (m for m in backbone.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings())
    # some tables begin with rows that no position uses
    return limit if any(m.num_embeddings - getattr(m, "offset", 0) == limit for m in tables) else None


def _find_projections(attention: nn.Module, probe: _Probe) -> Projections:
    call = probe.order.index(("attention", attention))
    inside = set(attention.modules()) - {attention}
    hidden = probe.inputs.get(attention)
    before = {m for _, m in probe.order[:call] if m in inside}
    exits = [m for _, m in probe.order[call + 1 :] if m in inside]
    return Projections(
        attention=attention,
        before=before,
        direct={m for m in before if hidden is not None and probe.inputs.get(m) is hidden},
        exit=exits[0] if exits else None,
    )


def _find_trim(layer: nn.Module, projections: Projections, probe: _Probe) -> Trim | None:
    hidden, given = probe.inputs.get(projections.attention), probe.inputs.get(layer)
    if projections.exit is None or hidden is None:
        return None
    norm = None
    if hidden is not given:
        norm = probe.produced.get(id(hidden))
        if norm not in set(layer.children()) or probe.inputs.get(norm) is not given:
            return None
    return Trim(layer=layer, norm=norm, projections=projections)


def _unused(
    model: nn.Module, backbone: nn.Module, layer: nn.Module | None, attention: nn.Module, probe: _Probe
) -> set[nn.Module]:
    end = probe.order.index(("attention", attention))
    used = {m for _, m in probe.order[:end]}
    # Modules that never ran may be experts that no token chose here. Those outside of the backbone run outside of it.
    behind = {m for _, m in probe.order[end:]} | set(model.modules()) - set(backbone.modules())
    if layer is not None:
        behind |= set(layer.modules())
    return {m for m in behind - used if not any(True for _ in m.children())}
