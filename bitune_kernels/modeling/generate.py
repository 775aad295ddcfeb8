"""What ``generate()`` of transformers is told, and what it is refused, when prompts are read in both directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .labels import refuse_further_inputs
from .structure import Structure

_NEEDS_CACHE = "since without the mixed cache each step would read the answer so far as a part of the prompt"
_NEEDS_WHOLE_PROMPT = "since bidirectional attention needs the whole prompt at once"
_HAS_NO_STATES = "since the rows of a Bitune pass are not the input's tokens"
_RUNS_ITSELF = "since it may run the prompt again, or in parts"

# Options by which transformers would decode something else than the mixed prompt's answer: when, what instead, why.
_REFUSED = {
    "use_cache": (lambda x: x is False, True, _NEEDS_CACHE),
    "prefill_chunk_size": (lambda x: x is not None, None, _NEEDS_WHOLE_PROMPT),
    "cache_implementation": (lambda x: x == "paged", "another one", f"{_NEEDS_WHOLE_PROMPT} (continuous batching)"),
    "custom_generate": (lambda x: x is not None, None, _RUNS_ITSELF),
    "output_attentions": (bool, False, _HAS_NO_STATES),
    "output_hidden_states": (bool, False, _HAS_NO_STATES),
    "use_mtp": (bool, False, f"{_HAS_NO_STATES}, whose hidden states it needs"),
    "speculation_type": (lambda x: x is not None, None, f"{_HAS_NO_STATES}, whose hidden states it needs"),
    "token_healing": (bool, False, "since transformers pads the prompt anew, other than its attention_mask says"),
    "adapter_names": (lambda x: x is not None, None, "since each stream has its own adapter"),
}
_MODES = ("greedy_search", "sample", "beam_search", "beam_sample", "assisted_generation")


@dataclass
class Generation:
    """One run of ``generate()``, as the hooks on the backbone need to know it.

    Attributes:
        prompt_width: columns of the prompt. A call may bring tokens of the answer with it: candidates in assisted
            decoding, or all so far where a family reads everything again (phi3, behind the positions for which it
            switches its rotary embedding). None: all that a call brings is prompt, as there may be two prompts.
        filled: the first cache that a prompt was written to.
    """

    prompt_width: int | None = None
    filled: object = None


def find_option(name: str, kwargs: dict, generation_config, defaults):
    """An option of ``generate()`` from where it is given first: keywords, ``generation_config=``, the model's own."""
    configs = [vars(config) for config in (generation_config, defaults) if config is not None]
    return next((x for x in (source.get(name) for source in (kwargs, *configs)) if x is not None), None)


def prepare(structure: Structure, defaults, inputs, generation_config, kwargs: dict, turn=None) -> Generation:
    """Refuse what can't be right, before any work.

    Args:
        defaults: the model's own GenerationConfig.
        inputs, generation_config, kwargs: the arguments of ``generate()``.
        turn: a cache that may hold earlier turns of a conversation, over which a prompt is read.

    Raises:
        ValueError, TypeError: naming the option, what was expected and what came.
    """
    from transformers import GenerationConfig

    def option(name: str):
        return find_option(name, kwargs, generation_config, defaults)

    for name, (refused, expected, reason) in _REFUSED.items():
        if refused(option(name)):
            raise ValueError(f"{name}: expected {expected}, {reason}, got {option(name)!r}")
    config = GenerationConfig()
    for name in vars(config):
        setattr(config, name, option(name))
    mode = config.get_generation_mode(kwargs.get("assistant_model")).value
    if mode not in _MODES:
        raise ValueError(
            f"generation_config: expected a mode of {', '.join(_MODES)}, got {mode}, which runs code from "
            "elsewhere that may run the prompt again"
        )
    assisted = mode == "assisted_generation"
    guided = config.guidance_scale not in (None, 1)  # which reads a negative prompt too
    if assisted and guided:
        raise ValueError(
            "guidance_scale: expected None in assisted decoding, whose rejected candidates would stay in the cache of "
            f"the negative prompt, got {config.guidance_scale}"
        )
    prompts = {"inputs_embeds": kwargs.get("inputs_embeds"), "inputs": inputs, "input_ids": kwargs.get("input_ids")}
    prompts = {name: x for name, x in prompts.items() if x is not None}
    if assisted and len(prompts) > 1:
        raise ValueError(f"input_ids: expected one prompt in assisted decoding, got {' and '.join(prompts)}")
    width = 1  # transformers begins with the bos token
    if prompts:
        name, tokens = next(iter(prompts.items()))
        width = _width(name, tokens, kwargs.get("attention_mask"))
        refuse_further_inputs(kwargs, tokens.shape[:2])
    if turn is None or turn is not kwargs.get("past_key_values"):
        _refuse_cache(kwargs.get("past_key_values"), config)
    elif assisted:
        raise ValueError("generation_config: expected no assisted decoding in a turn over earlier ones, got it")
    _refuse_length(structure, kwargs, config, width)
    return Generation(prompt_width=None if guided else width)


def _width(name: str, tokens, mask) -> int:
    """The columns of the prompts, of token ids [batch, seq] or their embeddings [batch, seq, hidden]."""
    if not isinstance(tokens, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor [batch, seq], got {type(tokens).__name__}")
    if tokens.ndim < 2 or not tokens.shape[0] or not tokens.shape[1]:
        raise ValueError(f"{name}: expected [batch, seq] with at least one token per prompt, got {list(tokens.shape)}")
    if mask is not None and mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"attention_mask: expected shape {list(tokens.shape[:2])} as the tokens, got {list(mask.shape)}"
        )
    return tokens.shape[1]


def _refuse_cache(cache, config) -> None:
    # An assistant is called again for every few tokens, with the cache of the last call.
    if cache is None or config.is_assistant or not hasattr(cache, "get_seq_length"):
        return
    length = int(cache.get_seq_length())
    if length:
        raise ValueError(
            f"past_key_values: expected an empty cache, got one of {length} tokens; what follows them would be read "
            "causally and the tokens themselves not again, so call generate() with the whole prompt and no cache"
        )


def _refuse_length(structure: Structure, kwargs: dict, config, width: int) -> None:
    if config.max_new_tokens is not None:
        new = config.max_new_tokens
    elif config.max_length is not None:
        new = config.max_length - width
    else:  # transformers' default ends where the positions end
        return
    read = width + new - 1  # the last token is returned and never read
    limit, room = structure.max_positions, _room(kwargs.get("past_key_values"))
    if limit is not None:
        mask = kwargs.get("attention_mask")
        padding = 0 if mask is None else width - int(mask.ne(0).sum(1).max())
        if read - padding > limit:
            raise ValueError(
                f"max_new_tokens: expected prompt and answer, less one token, to be at most {limit} tokens, for which "
                f"the model has learned positions, got {width - padding} and {new}"
            )
    if room is not None and read > room:
        raise ValueError(
            f"past_key_values: expected a cache with room for {read} tokens (the prompt and {new} new ones, less one), "
            f"got {room}"
        )


def _room(cache) -> int | None:
    """The tokens that fit a cache of fixed size, None where it grows."""
    layers = [layer for layer in getattr(cache, "layers", ()) if not getattr(layer, "is_sliding", False)]
    return min((n for n in (layer.get_max_length() for layer in layers) if n >= 0), default=None)


def check_cache(cache, structure: Structure, batch: int, width: int, empty: bool = True) -> None:
    """Refuse a cache that the keys and values of ``batch`` prompts of ``width`` tokens don't fit.

    Args:
        empty: whether it must hold nothing yet.

    Raises:
        ValueError: before anything is written to it.
    """
    # early exit, a kind of assisted decoding, runs fewer layers for its candidates
    running = getattr(structure.backbone.config, "num_hidden_layers", structure.num_layers)
    own = [layer for layer, source in enumerate(structure.kv_layers[:running]) if layer == source]
    if not empty:
        kinds = [type(cache.layers[structure.cache_index(layer)]).__name__ for layer in own]
        kind = next((name for name in kinds if not name.startswith("Dynamic")), None)
        if kind is not None:
            raise ValueError(f"past_key_values: expected a DynamicCache of earlier turns, got {kind}")
    elif int(cache.get_seq_length()):
        raise ValueError(f"past_key_values: expected an empty cache, got one of {int(cache.get_seq_length())} tokens")
    expected = 1 + max(structure.cache_index(layer) for layer in own)
    if len(cache.layers) < expected and cache.layer_class_to_replicate is None:
        raise ValueError(f"past_key_values: expected a cache of {expected} layers, got {len(cache.layers)}")
    room = _room(cache)
    if room is not None and width > room:
        raise ValueError(f"past_key_values: expected a cache with room for {width} tokens, got {room}")
    for layer in own:
        i = structure.cache_index(layer)
        keys = cache.layers[i].keys if i < len(cache.layers) and cache.layers[i].is_initialized else None
        if not isinstance(keys, torch.Tensor) or keys.ndim != 4:
            continue
        shape = (batch, structure.num_heads_kv[layer], structure.head_dims[layer])
        found = (keys.shape[0], keys.shape[1], keys.shape[3])
        if found != shape:
            raise ValueError(
                f"past_key_values: expected batch, key/value heads and head dim {shape} in layer {i}, got {found}"
            )
