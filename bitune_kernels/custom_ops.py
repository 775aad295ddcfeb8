"""The operators as PyTorch's custom operators, opaque to torch.compile: implementation, fake and gradient.

A compiled graph then doesn't specialize on the lengths of one batch, and the choice of the backend, which imports
modules, isn't traced. Checks happen before, in ``ops``.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch

from . import backends
from .backends import Options
from .backends.outputs import rows_of
from .plan import SegmentPlan

# Arguments of a call in the order of the operators' schemas: the tensors that may have a gradient, then the rest.
_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? alpha_k, Tensor? alpha_v, Tensor? beta, Tensor? sinks, "
    "Tensor? k_prefix, Tensor? v_prefix"
)
_REST = (
    "Tensor lengths, SymInt num_prompt, SymInt num_streams, float softmax_scale, SymInt? window, float? softcap, "
    "str stream_mask, bool shared_qkv, bool requires_grad, str backend"
)
_NUM_TENSORS = _TENSORS.count("Tensor")


class _Call(NamedTuple):
    """The arguments of a schema: _TENSORS, _REST."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    alpha_k: torch.Tensor | None
    alpha_v: torch.Tensor | None
    beta: torch.Tensor | None
    sinks: torch.Tensor | None
    k_prefix: torch.Tensor | None
    v_prefix: torch.Tensor | None
    lengths: torch.Tensor
    num_prompt: int
    num_streams: int
    softmax_scale: float
    window: int | None
    softcap: float | None
    stream_mask: str
    shared_qkv: bool
    requires_grad: bool
    backend: str

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self[:_NUM_TENSORS]

    @property
    def rest(self) -> tuple:
        return self[_NUM_TENSORS:]

    def plan(self) -> SegmentPlan:
        return _plan(tuple(map(tuple, self.lengths.tolist())), self.num_streams, self.q.device)

    def positional(self) -> tuple:
        return self.q, self.k, self.v, self.alpha_k, self.alpha_v, self.plan()

    def options(self) -> Options:
        prefix = None if self.k_prefix is None else (self.k_prefix, self.v_prefix)
        numbers = self.softmax_scale, self.window, self.softcap
        return Options(*numbers, self.sinks, self.stream_mask, self.shared_qkv, self.beta, prefix)

    def module(self) -> ModuleType:
        return backends.choose(self.backend, self.q, self.v, self.requires_grad, self.options())

    def rows(self) -> tuple[int, int, int]:
        """Of out, and of streams and lse when they are saved."""
        return rows_of(self.q.shape[0], self.k.shape[0], self.num_prompt, self.shared_qkv, self.beta is not None)

    def unused(self) -> tuple[torch.Tensor, torch.Tensor]:
        """streams and lse as a backend without its own backward returns them."""
        _, streams, lse = self.rows() if self.requires_grad else (0, 0, 0)
        heads = self.q.shape[1]
        return self.q.new_zeros(streams, heads, self.v.shape[2]), self.q.new_zeros(lse, heads, dtype=torch.float32)


def _flatten(q, k, v, alpha_k, alpha_v, plan, o: Options, requires_grad: bool, backend: str) -> _Call:
    tensors = (q, k, v, alpha_k, alpha_v, o.beta, o.sinks, *(o.prefix or (None, None)))
    rest = (plan.lengths, plan.num_prompt, plan.num_streams, o.softmax_scale, o.window, o.softcap)
    return _Call(*tensors, *rest, o.stream_mask, o.shared_qkv, requires_grad, backend)


# Each layer of a model runs the same batch: its plan goes to the GPU once, and so does what a backend derives from it.
@lru_cache(maxsize=16)
def _plan(lengths: tuple[tuple[int, ...], ...], num_streams: int, device: torch.device) -> SegmentPlan:
    prompt, answer, *prefix = lengths
    with torch.inference_mode(False):  # a later call may train, and autograd saves no inference tensors
        return SegmentPlan.from_lengths(
            prompt, answer, num_streams=num_streams, prefix_lengths=prefix[0] if prefix else None, device=device
        )


# attention


def attention(*arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A checked call of ``bitune_attention``; arguments as of ``_flatten``."""
    out, k_mixed, v_mixed, _, _ = torch.ops.bitune.attention(*_flatten(*arguments))
    return out, k_mixed, v_mixed


@torch.library.custom_op(
    "bitune::attention",
    mutates_args=(),
    schema=f"({_TENSORS}, {_REST}) -> (Tensor out, Tensor k_mixed, Tensor v_mixed, Tensor streams, Tensor lse)",
)
def _attention_op(*arguments):
    call = _Call(*arguments)
    module, options = call.module(), call.options()
    if hasattr(module, "forward"):
        out, k_mixed, v_mixed, *saved = module.forward(*call.positional(), options, save=call.requires_grad)
    else:
        out, k_mixed, v_mixed = module.attention(*call.positional(), options)
        saved = call.unused()
    if call.num_streams == 1:  # rows of k and v themselves, and an operator's outputs may not alias its inputs
        k_mixed, v_mixed = k_mixed.clone(), v_mixed.clone()
    return tuple(x.contiguous() for x in (out, k_mixed, v_mixed, *saved))


@_attention_op.register_fake
def _(*arguments):
    call = _Call(*arguments)
    q, k, v = call.q, call.k, call.v
    rows, _, _ = call.rows()
    return (
        q.new_empty(rows, q.shape[1], v.shape[2]),
        k.new_empty(call.num_prompt, *k.shape[1:]),
        v.new_empty(call.num_prompt, *v.shape[1:]),
        *call.unused(),
    )


def _split(arguments) -> tuple[_Call, tuple[torch.Tensor, ...]]:
    # Where three further tensors stand between _TENSORS and _REST: the call without them, and these.
    tensors, further, rest = arguments[:_NUM_TENSORS], arguments[_NUM_TENSORS:][:3], arguments[_NUM_TENSORS + 3 :]
    return _Call(*tensors, *rest), further


@torch.library.custom_op(
    "bitune::attention_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor d_k_mixed, Tensor d_v_mixed, {_TENSORS}, Tensor out, Tensor streams, Tensor lse, "
    f"{_REST}) -> Tensor[]",
)
def _attention_backward_op(d_out, d_k_mixed, d_v_mixed, *arguments):
    call, saved = _split(arguments)
    module = call.module()
    if hasattr(module, "backward"):
        given = (d_out, d_k_mixed, d_v_mixed, *call.tensors, *saved, call.plan())
        return module.backward(*given, **call.options().without_tensors())
    # The PyTorch backends have no backward of their own: run them again under autograd. An operator runs below the
    # autograd keys, where enable_grad alone records nothing and every gradient would be 0.
    autograd_keys = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with autograd_keys, torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in call.tensors]
        again = _Call(*leaves, *call.rest)
        outputs = module.attention(*again.positional(), again.options())
    given = [x for x in leaves if x is not None]
    pairs = zip(outputs, (d_out, d_k_mixed, d_v_mixed), strict=True)
    used = [(o, d) for o, d in pairs if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in used], given, [d for _, d in used], allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(given, grads, strict=True)]
    return [g.contiguous() for g in grads]


@_attention_backward_op.register_fake
def _(d_out, d_k_mixed, d_v_mixed, *arguments):
    call, _ = _split(arguments)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in call.tensors if x is not None]


def _save_attention(ctx, inputs, output):
    call, (out, _, _, streams, lse) = _Call(*inputs), output
    lengths, *ctx.options = call.rest
    ctx.save_for_backward(*call.tensors, out, streams, lse, lengths)


def _attention_backward(ctx, d_out, d_k_mixed, d_v_mixed, d_streams, d_lse):
    # streams and lse never leave this module, so their gradients are nobody's.
    saved = ctx.saved_tensors
    grads = iter(torch.ops.bitune.attention_backward(d_out, d_k_mixed, d_v_mixed, *saved, *ctx.options))
    given = [None if x is None else next(grads) for x in saved[:_NUM_TENSORS]]
    return (*given, None, *[None] * len(ctx.options))


_attention_op.register_autograd(_attention_backward, setup_context=_save_attention)


# prefill


def prefill(args: tuple, options: Options, cache: tuple, backend: str) -> torch.Tensor:
    """A checked call of ``bitune_prefill``; ``cache``: k_cache, v_cache, cache_positions."""
    call = _flatten(*args, options, False, backend)
    return torch.ops.bitune.prefill(*call.tensors, *cache, *call.rest)


@torch.library.custom_op(
    "bitune::prefill",
    mutates_args=("k_cache", "v_cache"),
    schema=f"({_TENSORS}, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_positions, {_REST}) -> Tensor",
)
def _prefill_op(*arguments):
    call, cache = _split(arguments)
    return backends.prefill(call.module(), call.positional(), call.options(), *cache).contiguous()


@_prefill_op.register_fake
def _(*arguments):
    call, _ = _split(arguments)
    rows, _, _ = call.rows()
    return call.q.new_empty(rows, call.q.shape[1], call.v.shape[2])


# mix_kv with a backend's own kernels


@torch.library.custom_op(
    "bitune::mix_kv", mutates_args=(), schema="(Tensor causal, Tensor bidir, Tensor alpha, str backend) -> Tensor"
)
def _mix_kv_op(causal, bidir, alpha, backend):
    return backends.choose_mix(backend, causal).mix(causal, bidir, alpha)


@_mix_kv_op.register_fake
def _(causal, bidir, alpha, backend):
    return torch.empty_like(causal, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "bitune::mix_kv_backward",
    mutates_args=(),
    schema="(Tensor d_mixed, Tensor causal, Tensor bidir, Tensor alpha, str backend) -> (Tensor, Tensor, Tensor)",
)
def _mix_kv_backward_op(d_mixed, causal, bidir, alpha, backend):
    return backends.choose_mix(backend, causal).mix_backward(d_mixed, causal, bidir, alpha)


@_mix_kv_backward_op.register_fake
def _(d_mixed, *inputs_and_backend):
    causal, bidir, alpha, _ = inputs_and_backend
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (causal, bidir, alpha))


def _save_mix_kv(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _mix_kv_backward(ctx, d_mixed):
    return (*torch.ops.bitune.mix_kv_backward(d_mixed, *ctx.saved_tensors, ctx.backend), None)


_mix_kv_op.register_autograd(_mix_kv_backward, setup_context=_save_mix_kv)
