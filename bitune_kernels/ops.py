"""The public operators. Their docstrings are the specification that every backend is tested against."""

from __future__ import annotations

import torch

from . import backends, custom_ops, mixing
from .backends import Options, autograd
from .masks import STREAM_MASKS
from .plan import SegmentPlan

_LARGE = 2.0**126  # 1 / _LARGE is the smallest normal float32


def bitune_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha_k: torch.Tensor | float | None,
    alpha_v: torch.Tensor | float | None,
    plan: SegmentPlan,
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    stream_mask: str = "full",
    shared_qkv: bool = False,
    beta: torch.Tensor | float | None = None,
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both prompt attentions, the mixed key/value cache and the answer's attention over it (arXiv 2405.14862).

    Rows are packed without padding, segment-major over the batch (``plan``); keys already carry their positions.
    Per sample, with n prompt rows per stream, a answer rows, and n <= N, a <= A their sums over the batch::

                     bidir k,v   causal k,v   mixed k,v   answer k,v
        bidir q      full            .            .            .        "full", "causal" or "anti_causal"
        causal q       .          causal          .            .
        answer q       .             .          full        causal

        k_mixed = (1 - alpha_k) k_causal + alpha_k k_bidir      v_mixed likewise, float32, rounded to k's dtype

    Softmax is computed in float32 (float64 for float64 input), and autocast changes nothing. Differentiable in q, k, v,
    alpha_k, alpha_v, beta, sinks and prefix. Samples without prompt or answer rows are allowed.

    Args:
        q: [T, num_heads_q, head_dim], or [A, ...] the answer rows alone when the prompt's own attention isn't needed
            (a model's last layer). T = plan.num_rows.
        k: [T, num_heads_kv, head_dim]; query head h uses key/value head h // (num_heads_q / num_heads_kv).
        v: [T, num_heads_kv, head_dim_v].
        alpha_k, alpha_v: weight of the bidirectional stream in [0, 1]: a number, or float32 (float64) [] or
            [num_heads_kv]. None when ``plan.num_streams`` is 1: nothing is mixed, and k_mixed, v_mixed are the prompt
            rows themselves.
        plan: lengths of the samples.
        softmax_scale: default head_dim ** -0.5.
        window: a query sees keys with |i - j| < window only; positions count from the sample's first token.
        softcap: scores become softcap * tanh(scores / softcap) before the softmax.
        sinks: [num_heads_q], one further score per head that takes weight and gives no value.
        stream_mask: what a prompt token of the bidirectional stream sees: "full", "causal" (j <= i) or
            "anti_causal" (j >= i).
        shared_qkv: both streams have the same q, k, v: the plan has num_streams 1 and the output both streams' rows.
        beta: the prompt's two outputs become one, ``(1 - beta) causal + beta bidir`` in float32; a number, or
            float32 (float64) [] or [num_heads_q].
        prefix: (k, v), sum of plan.prefix_lengths rows as those of k and v, of an already cached past, which every row
            of its sample sees (within the window).
        backend: "auto" or a name of ``bitune_kernels.backends.BACKENDS``, which is then used or refused.

    Returns:
        out [rows, num_heads_q, head_dim_v]: bidir, causal and answer rows; with ``beta`` or one stream, prompt and
        answer rows; for q of A rows, answer rows. k_mixed, v_mixed: N rows as those of k and v.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    options = Options(softmax_scale, window, softcap, sinks, stream_mask, shared_qkv, beta, prefix)
    args, options = _checked(q, k, v, alpha_k, alpha_v, plan, options)
    requires_grad = bool(_requiring_grad(*args, options))
    if torch.compiler.is_compiling():
        return custom_ops.attention(*args, options, requires_grad, backend)
    return autograd.attention(backends.choose(backend, q, v, requires_grad, options), *args, options, requires_grad)


def bitune_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha_k: torch.Tensor | float | None,
    alpha_v: torch.Tensor | float | None,
    plan: SegmentPlan,
    *,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_positions: torch.Tensor,
    backend: str = "auto",
    **options,
) -> torch.Tensor:
    """``bitune_attention`` for inference, which also writes what later tokens attend to into a key/value cache.

    Args:
        q, k, v, alpha_k, alpha_v, plan, options: as in ``bitune_attention``.
        k_cache, v_cache: [num_slots, ...] of rows as those of k and v, written in place; any strides, for "cuda"
            contiguous rows at multiples of 16 bytes.
        cache_positions: int64 [N + A], the slot of each mixed prompt row and then of each answer row, all different, in
            any order: of a padded cache or a paged one. Their values are checked on CPUs alone, a GPU isn't waited for.
        backend: as in ``bitune_attention``.

    Returns:
        out, as ``bitune_attention``. Not differentiable: call it under ``torch.no_grad()``.

    Raises:
        ValueError, TypeError: as ``bitune_attention``; and for an argument that requires a gradient.
    """
    if unknown := sorted(options.keys() - set(Options._fields)):
        raise TypeError(f"{unknown[0]}: expected one of {', '.join(Options._fields)}, got another keyword")
    args, options = _checked(q, k, v, alpha_k, alpha_v, plan, Options(**options))
    rows = plan.num_prompt + plan.num_answer
    if not isinstance(cache_positions, torch.Tensor):
        raise TypeError(f"cache_positions: expected an int64 tensor, got {type(cache_positions).__name__}")
    if cache_positions.dtype != torch.int64 or tuple(cache_positions.shape) != (rows,):
        raise ValueError(
            f"cache_positions: expected int64 [{rows}] (prompt and answer rows), got {cache_positions.dtype} "
            f"{list(cache_positions.shape)}"
        )
    if cache_positions.device != k.device:
        raise ValueError(f"cache_positions: expected it on {k.device}, got {cache_positions.device}")
    for name, cache, rows_of in (("k_cache", k_cache, k), ("v_cache", v_cache, v)):
        _check_floating(name, cache)
        if cache.ndim != 3 or cache.shape[1:] != rows_of.shape[1:] or cache.dtype != rows_of.dtype:
            expected = ", ".join(["num_slots", *map(str, rows_of.shape[1:])])
            raise ValueError(f"{name}: expected {rows_of.dtype} [{expected}], got {cache.dtype} {list(cache.shape)}")
        if cache.device != rows_of.device:
            raise ValueError(f"{name}: expected it on {rows_of.device}, got {cache.device}")
        if any(step == 0 and size > 1 for step, size in zip(cache.stride(), cache.shape, strict=True)):
            raise ValueError(f"{name}: expected memory for each element, got strides {list(cache.stride())}")
    slots = min(len(k_cache), len(v_cache))
    if rows and _may_read(cache_positions):
        low, high = (int(x) for x in cache_positions.aminmax())
        if low < 0 or high >= slots:
            raise ValueError(f"cache_positions: expected slots of 0 to {slots - 1}, got {low} to {high}")
        if cache_positions is not plan.token_index:  # whose places differ, and which a model names in each layer
            found = cache_positions.sort().values
            if twice := found[1:][found.diff() == 0].tolist():
                raise ValueError(f"cache_positions: expected slots that are all different, got {twice[0]} twice")
    # The mix also depends on alpha: with its gradient the caller's cache would become part of a graph.
    needs_grad = _requiring_grad(*args, options)
    if torch.is_grad_enabled():
        needs_grad += [name for name, x in (("k_cache", k_cache), ("v_cache", v_cache)) if x.requires_grad]
    if needs_grad:
        raise ValueError(
            f"{', '.join(needs_grad)}: expected no gradients (bitune_prefill is for inference), got requires_grad=True"
        )
    cache = k_cache, v_cache, cache_positions
    if torch.compiler.is_compiling():
        return custom_ops.prefill(args, options, cache, backend)
    return backends.prefill(backends.choose(backend, q, v, False, options), args, options, *cache)


def mix_kv(
    causal: torch.Tensor, bidir: torch.Tensor, alpha: torch.Tensor | float, *, backend: str = "auto"
) -> torch.Tensor:
    """The mix alone: ``(1 - alpha) * causal + alpha * bidir`` in float32, rounded to the dtype of ``causal``.

    Args:
        causal, bidir: [rows, num_heads_kv, head_dim], same dtype and device.
        alpha: in [0, 1]: a number, or float32 (float64) [] or [num_heads_kv].
        backend: "auto" and "reference" are plain PyTorch, which torch.compile fuses with what stands around it;
            another name is a backend with a kernel for it, which is then used or refused.

    Returns:
        [rows, num_heads_kv, head_dim]. Differentiable in all three.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    _check_floating("causal", causal)
    if causal.ndim != 3:
        raise ValueError(f"causal: expected [rows, heads, head_dim], got shape {list(causal.shape)}")
    _check_floating("bidir", bidir)
    if causal.shape != bidir.shape or causal.dtype != bidir.dtype or causal.device != bidir.device:
        raise ValueError(
            f"bidir: expected {causal.dtype} {list(causal.shape)} on {causal.device} as causal, got {bidir.dtype} "
            f"{list(bidir.shape)} on {bidir.device}"
        )
    alpha = _coefficient("alpha", alpha, causal.shape[1], causal)
    if backend in ("auto", "reference"):
        return mixing.mix(causal, bidir, alpha)
    return torch.ops.bitune.mix_kv(causal, bidir, alpha, str(backend))


def _coefficient(name: str, value, heads: int, like: torch.Tensor) -> torch.Tensor:
    # A mixing weight as a float tensor of shape [] or [heads] on the device of `like`.
    if not isinstance(value, torch.Tensor):
        if not _is_number(value):
            raise TypeError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
        if not abs(value) < _LARGE:
            raise ValueError(f"{name}: expected a finite float32, got {value}")
        return torch.full((), float(value), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 (or float64), got {value.dtype}")
    if value.ndim and tuple(value.shape) != (heads,):
        raise ValueError(f"{name}: expected a scalar or shape [{heads}] (one per head), got {list(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected it on {like.device}, got {value.device}")
    if _may_read(value) and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name}: expected finite values, got {value.tolist()}")
    return value


def _may_read(x: torch.Tensor) -> bool:
    # Reading the values of a GPU tensor would stall every layer: there the model checks theta when it is loaded.
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_float32(value) -> bool:
    # 0, or neither 0 nor infinite where kernels compute with it, times the logarithms' base.
    return _is_number(value) and (value == 0 or 1 / _LARGE < abs(value) < _LARGE)


def _check_floating(name: str, x) -> None:
    if getattr(x, "dtype", None) not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        found = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a floating point tensor of 16, 32 or 64 bits, got {found}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {x.layout}")


def _checked(q, k, v, alpha_k, alpha_v, plan, options: Options) -> tuple[tuple, Options]:
    # Refuse what bitune_attention can't take; what is left as backends get it.
    softmax_scale, window, softcap, sinks, stream_mask, shared_qkv, beta, prefix = options
    if not isinstance(plan, SegmentPlan):
        raise TypeError(f"plan: expected a SegmentPlan, got {type(plan).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_floating(name, x)
        if x.ndim != 3 or 0 in x.shape[1:]:
            raise ValueError(f"{name}: expected [rows, heads, head_dim], none but rows 0, got shape {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} as q, got {x.dtype} on {x.device}")
        if x.shape[0] != plan.num_rows and not (name == "q" and x.shape[0] == plan.num_answer):
            raise ValueError(f"{name}: expected {plan.num_rows} rows (plan.num_rows), got {x.shape[0]}")
    if k.shape[2] != q.shape[2] or v.shape[1] != k.shape[1]:
        raise ValueError(
            f"k, v: expected head_dim {q.shape[2]} as q and the same heads, got k {list(k.shape)}, v {list(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q: expected a multiple of the {k.shape[1]} key/value heads, got {q.shape[1]} heads")
    if stream_mask not in STREAM_MASKS:
        raise ValueError(f"stream_mask: expected one of {', '.join(STREAM_MASKS)}, got {stream_mask!r}")
    if softmax_scale is not None and not _is_float32(softmax_scale):
        raise ValueError(f"softmax_scale: expected a finite float32 or None, got {softmax_scale!r}")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ValueError(f"window: expected an int >= 1 or None, got {window!r}")
    if softcap is not None and not (_is_float32(softcap) and softcap > 0):
        raise ValueError(f"softcap: expected a finite float32 > 0 or None, got {softcap!r}")
    if sinks is not None:
        _check_floating("sinks", sinks)
        if tuple(sinks.shape) != (q.shape[1],) or sinks.device != q.device:
            raise ValueError(
                f"sinks: expected [{q.shape[1]}] (one per query head) on {q.device}, got {list(sinks.shape)} on "
                f"{sinks.device}"
            )
    if not isinstance(shared_qkv, bool):
        raise TypeError(f"shared_qkv: expected True or False, got {shared_qkv!r}")
    if shared_qkv and plan.num_streams != 1:
        raise ValueError("shared_qkv: expected a plan with num_streams=1 (the rows stand once), got num_streams=2")
    if plan.num_streams == 2:
        alpha_k = _coefficient("alpha_k", alpha_k, k.shape[1], k)
        alpha_v = _coefficient("alpha_v", alpha_v, k.shape[1], v)
    elif alpha_k is not None or alpha_v is not None:
        raise ValueError("alpha_k, alpha_v: expected None for a plan with num_streams=1, where nothing is mixed")
    if beta is not None:
        if plan.num_streams == 1 and not shared_qkv:
            raise ValueError("beta: expected two streams to mix (num_streams=2 or shared_qkv=True), got one")
        beta = _coefficient("beta", beta, q.shape[1], q)
    if (prefix is None) != (plan.prefix_lengths is None):
        raise ValueError("prefix: expected it together with plan.prefix_lengths, got one without the other")
    if prefix is not None:
        if not isinstance(prefix, (tuple, list)) or [isinstance(x, torch.Tensor) for x in prefix] != [True, True]:
            raise TypeError(f"prefix: expected two tensors (k, v), got {type(prefix).__name__}")
        for name, x, like in (("prefix[0]", prefix[0], k), ("prefix[1]", prefix[1], v)):
            _check_floating(name, x)
            expected = [plan.num_prefix, *like.shape[1:]]
            if list(x.shape) != expected or x.dtype != like.dtype or x.device != like.device:
                raise ValueError(
                    f"{name}: expected {like.dtype} {expected} on {like.device}, got {x.dtype} {list(x.shape)} on "
                    f"{x.device}"
                )
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    window = None if window is None else min(window, 2**30)  # kernels add positions to it, in 32 bits
    options = Options(softmax_scale, window, softcap, sinks, stream_mask, shared_qkv, beta, prefix)
    return (q, k, v, alpha_k, alpha_v, plan), options


def _requiring_grad(q, k, v, alpha_k, alpha_v, plan, options: Options) -> list[str]:
    # The arguments of a checked call that autograd wants a gradient of.
    if not torch.is_grad_enabled():
        return []
    given = {"q": q, "k": k, "v": v, "alpha_k": alpha_k, "alpha_v": alpha_v}
    given |= {"beta": options.beta, "sinks": options.sinks}
    given["prefix[0]"], given["prefix[1]"] = options.prefix or (None, None)
    return [name for name, x in given.items() if x is not None and x.requires_grad]
