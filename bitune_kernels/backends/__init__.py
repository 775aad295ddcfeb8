"""Backends of the attention operators, and the one place that chooses between them.

Each module has ``unsupported(**call)`` and ``attention(q, k, v, alpha_k, alpha_v, plan, **options)`` with the meaning
given by ``bitune_kernels.ops.bitune_attention``, differentiable; ``reference`` is the formula that the others are
tested against. Every option but ``backend`` is given, the weights as float32 or float64 tensors [] or [heads].

A module with kernels of its own may also have these, which autograd does not see. Tensors that come in may have any
strides (a gradient also 0); those that go out are contiguous and share no memory with each other or what came in.

``forward(q, k, v, alpha_k, alpha_v, plan, **options, save) -> (out, k_mixed, v_mixed, streams, lse)`` and
``backward(d_out, d_k_mixed, d_v_mixed, q, k, v, alpha_k, alpha_v, beta, sinks, k_prefix, v_prefix, out, streams, lse,
plan, *, softmax_scale, window, softcap, stream_mask, shared_qkv) -> gradients``, both or neither
    The call under torch.compile, where ``attention`` is not used. With one stream k_mixed and v_mixed may be views of
    k and v. ``save`` says that backward will follow; without it streams and lse have 0 rows:

    * streams [2 N, num_heads_q, head_dim_v] in q's dtype: outputs of the bidir and then the causal rows before
      ``beta`` mixes them. 0 rows without ``beta`` and for q of answer rows alone.
    * lse float32 [R, num_heads_q]: logarithm (to base 2) of the sum that each row of each stream was divided by, sink
      included. R = the rows of q, and with ``shared_qkv`` N more unless q has answer rows alone.

    The gradients are a list, one for each tensor of q .. v_prefix that is not None, in that order and with the shape
    and dtype of that tensor.
``prefill(q, k, v, alpha_k, alpha_v, plan, **options, k_cache, v_cache, cache_positions) -> out``
    ``bitune_kernels.ops.bitune_prefill`` without writing k_mixed and v_mixed anywhere but into the cache.
``mix(causal, bidir, alpha) -> mixed`` and ``mix_backward(d_mixed, causal, bidir, alpha) -> (d_causal, d_bidir,
d_alpha)``, both or neither
    ``bitune_kernels.ops.mix_kv``.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

# Ordered by how the choice of "auto" goes: the first one that supports the call.
BACKENDS = ("sdpa", "cuda", "triton", "flash", "flex", "reference")

# "auto" takes only what is tested wherever the tests run; the others must be asked for by name.
AUTO = ("sdpa", "reference")


def load(name: str) -> ModuleType:
    """The module of one backend, imported on first use."""
    return import_module(f"{__name__}.{name}")


def resolve(name: str, **call) -> tuple[str, str]:
    """Choose the backend of a call: its name and the reason, for error messages and reports.

    Args:
        name: a backend, which is then used or refused but never replaced, or "auto".
        call: facts of the call that decide what can run it: ``device``, ``dtype``, ``head_dim``, ``softcap``,
            ``sinks``, ``window``, ``stream_mask``, ``prefix``, ``requires_grad``. Absent means the plainest case.

    Raises:
        ValueError: an unknown name, or a named backend that can't run this call (with its reason).
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {name!r}")
    if name != "auto":
        if reason := load(name).unsupported(**call):
            raise ValueError(f"backend: {name!r} can't run this call: {reason}")
        return name, "asked for by name"
    passed_over = []
    for candidate in AUTO:
        reason = load(candidate).unsupported(**call)
        if reason is None:
            return candidate, "; ".join(passed_over) or "the fastest that runs here"
        passed_over.append(f"not {candidate}: {reason}")
    raise ValueError(f"backend: none can run this call: {'; '.join(passed_over)}")


def choose(
    name: str, q, v, requires_grad: bool, *, window, softcap, sinks, stream_mask, prefix, **indifferent
) -> ModuleType:
    """The module that runs a call of ``bitune_attention`` with these arguments, or ValueError."""
    name, _ = resolve(
        name,
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        window=window,
        softcap=softcap,
        sinks=sinks,
        stream_mask=stream_mask,
        prefix=prefix,
        requires_grad=requires_grad,
    )
    return load(name)


def choose_mix(name: str, like) -> ModuleType:
    """The module of this name, which mixes tensors like this one with ``mix`` and ``mix_backward``, or ValueError."""
    # Both are asked for: backends written in PyTorch have a `mix` too, the one that they import.
    able = [x for x in BACKENDS if hasattr(load(x), "mix_backward")]
    if name not in able:
        raise ValueError(
            f"backend: expected one that can mix ({', '.join(['auto', 'reference', *able])}), got {name!r}"
        )
    name, _ = resolve(name, device=like.device, dtype=like.dtype)
    return load(name)


def prefill(module: ModuleType, q, k, v, alpha_k, alpha_v, plan, *, k_cache, v_cache, cache_positions, **options):
    """``bitune_prefill`` with this module, in as few launches as it can."""
    if hasattr(module, "prefill"):
        cache = {"k_cache": k_cache, "v_cache": v_cache, "cache_positions": cache_positions}
        return module.prefill(q, k, v, alpha_k, alpha_v, plan, **options, **cache)
    out, k_mixed, v_mixed = module.attention(q, k, v, alpha_k, alpha_v, plan, **options)
    prompt_slots, answer_slots = cache_positions.split([plan.num_prompt, plan.num_answer])
    for cache, mixed, own in ((k_cache, k_mixed, k), (v_cache, v_mixed, v)):
        cache.index_copy_(0, prompt_slots, mixed)
        cache.index_copy_(0, answer_slots, own[plan.answer_start :])
    return out
