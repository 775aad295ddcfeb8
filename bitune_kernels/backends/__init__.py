"""Backends of the attention operators, and the one place that chooses between them.

Each module has ``unsupported(**call)`` and, with the meaning given by ``bitune_kernels.ops.bitune_attention``, either
``attention(q, k, v, alpha_k, alpha_v, plan, options)``, differentiable, or ``forward`` and ``backward``. The others are
tested against ``reference``, the formula. ``options`` has its scale, and weights are float32 or float64 tensors [] or
[heads].

The functions of kernels are not seen by autograd. Tensors that come in may have any strides (a gradient also 0); those
that go out are contiguous and share no memory with each other or what came in.

``forward(q, k, v, alpha_k, alpha_v, plan, options, *, save) -> (out, k_mixed, v_mixed, streams, lse)`` and
``backward(d_out, d_k_mixed, d_v_mixed, q, k, v, alpha_k, alpha_v, beta, sinks, k_prefix, v_prefix, out, streams, lse,
plan, *, softmax_scale, window, softcap, stream_mask, shared_qkv) -> gradients``
    With one stream k_mixed and v_mixed may be views of k and v. ``save`` says that backward will follow, where
    d_k_mixed and d_v_mixed may be None; without it streams and lse have 0 rows:

    * streams [2 N, num_heads_q, head_dim_v] in q's dtype: outputs of the bidir and then the causal rows before
      ``beta`` mixes them. 0 rows without ``beta`` and for q of answer rows alone.
    * lse float32 [R, num_heads_q]: logarithm (to base 2) of the sum that each row of each stream was divided by, sink
      included. R = the rows of q, and with ``shared_qkv`` N more unless q has answer rows alone.

    The gradients are a list, one for each tensor of q .. v_prefix that is not None, in that order and with the shape
    and dtype of that tensor.

    With k_cache, v_cache and cache_positions, as in ``bitune_prefill``, k_mixed and v_mixed are written there alone.
``mix(causal, bidir, alpha) -> mixed`` and ``mix_backward(d_mixed, causal, bidir, alpha) -> (d_causal, d_bidir,
d_alpha)``, both or neither
    ``bitune_kernels.ops.mix_kv``.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS = ("sdpa", "cuda", "triton", "flash", "flex", "reference")

# With kernels of this package; others are peers, and on a CPU all there is.
OWN = ("cuda", "triton")

# "auto" takes the first that supports the call, of what is tested wherever the tests run; others are asked for by name.
AUTO = ("sdpa", "reference")


class Options(NamedTuple):
    """The options of ``bitune_attention``."""

    softmax_scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    stream_mask: str = "full"
    shared_qkv: bool = False
    beta: Tensor | float | None = None
    prefix: tuple[Tensor, Tensor] | None = None

    def without_tensors(self) -> dict:
        """Those that ``backward`` gets by name."""
        return {name: x for name, x in self._asdict().items() if name not in ("sinks", "beta", "prefix")}


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


def choose(name: str, q, v, requires_grad: bool, options: Options) -> ModuleType:
    """The module that runs a call of ``bitune_attention`` with these arguments, or ValueError."""
    facts = dict(device=q.device, dtype=q.dtype, head_dim=q.shape[-1], head_dim_v=v.shape[-1])
    name, _ = resolve(name, **facts, requires_grad=requires_grad, **options._asdict())
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


def prefill(module: ModuleType, args: tuple, options: Options, k_cache, v_cache, cache_positions):
    """``bitune_prefill`` with this module, in as few launches as it can; ``args``: q, k, v, alpha_k, alpha_v, plan."""
    if hasattr(module, "forward"):
        cache = dict(k_cache=k_cache, v_cache=v_cache, cache_positions=cache_positions)
        return module.forward(*args, options, **cache, save=False)[0]
    _, k, v, _, _, plan = args
    out, k_mixed, v_mixed = module.attention(*args, options)
    prompt_slots, answer_slots = cache_positions.split([plan.num_prompt, plan.num_answer])
    for cache, mixed, own in ((k_cache, k_mixed, k), (v_cache, v_mixed, v)):
        cache.index_copy_(0, prompt_slots, mixed)
        cache.index_copy_(0, answer_slots, own[plan.answer_start :])
    return out
