"""``bitune_attention`` as registered operators, opaque to torch.compile: implementation, fake and gradient.

A compiled graph then doesn't specialize on the lengths of one batch. Checks happen before, in ``ops``.
"""

from __future__ import annotations

import torch

from . import backends
from .plan import SegmentPlan


def _run(inputs, plan, softmax_scale, window, softcap, stream_mask, shared_qkv, requires_grad, backend):
    # The backend's own call, for forward and for its repetition under autograd; inputs are q .. v_prefix.
    q, k, v, alpha_k, alpha_v, beta, sinks, k_prefix, v_prefix = inputs
    prefix = None if k_prefix is None else (k_prefix, v_prefix)
    module = backends.choose(backend, q, v, window, softcap, sinks, stream_mask, prefix, requires_grad)
    return module.attention(
        q,
        k,
        v,
        alpha_k,
        alpha_v,
        plan,
        softmax_scale=softmax_scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        stream_mask=stream_mask,
        shared_qkv=shared_qkv,
        beta=beta,
        prefix=prefix,
    )


@torch.library.custom_op("bitune::attention", mutates_args=())
def _attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha_k: torch.Tensor | None,
    alpha_v: torch.Tensor | None,
    beta: torch.Tensor | None,
    sinks: torch.Tensor | None,
    k_prefix: torch.Tensor | None,
    v_prefix: torch.Tensor | None,
    cu_prompt: torch.Tensor,
    cu_answer: torch.Tensor,
    cu_prefix: torch.Tensor | None,
    num_prompt: int,
    num_streams: int,
    softmax_scale: float,
    window: int | None,
    softcap: float | None,
    stream_mask: str,
    shared_qkv: bool,
    requires_grad: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = (q, k, v, alpha_k, alpha_v, beta, sinks, k_prefix, v_prefix)
    plan = SegmentPlan.from_cu_seqlens(cu_prompt, cu_answer, cu_prefix, num_streams)
    options = (softmax_scale, window, softcap, stream_mask, shared_qkv, requires_grad, backend)
    out, k_mixed, v_mixed = _run(inputs, plan, *options)
    if num_streams == 1:  # an operator's outputs may not alias its inputs
        k_mixed, v_mixed = k_mixed.clone(), v_mixed.clone()
    return out.contiguous(), k_mixed.contiguous(), v_mixed.contiguous()


@_attention_op.register_fake
def _(
    q,
    k,
    v,
    alpha_k,
    alpha_v,
    beta,
    sinks,
    k_prefix,
    v_prefix,
    cu_prompt,
    cu_answer,
    cu_prefix,
    num_prompt,
    num_streams,
    softmax_scale,
    window,
    softcap,
    stream_mask,
    shared_qkv,
    requires_grad,
    backend,
):
    rows = q.shape[0]
    if rows == k.shape[0] and num_prompt:
        rows += num_prompt * (int(shared_qkv) - int(beta is not None))
    return (
        q.new_empty(rows, q.shape[1], v.shape[2]),
        k.new_empty(num_prompt, *k.shape[1:]),
        v.new_empty(num_prompt, *v.shape[1:]),
    )


_DIFFERENTIABLE = 9  # the tensor arguments that stand first: q .. v_prefix


@torch.library.custom_op("bitune::attention_backward", mutates_args=())
def _attention_backward_op(
    d_out: torch.Tensor,
    d_k_mixed: torch.Tensor,
    d_v_mixed: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha_k: torch.Tensor | None,
    alpha_v: torch.Tensor | None,
    beta: torch.Tensor | None,
    sinks: torch.Tensor | None,
    k_prefix: torch.Tensor | None,
    v_prefix: torch.Tensor | None,
    cu_prompt: torch.Tensor,
    cu_answer: torch.Tensor,
    cu_prefix: torch.Tensor | None,
    num_prompt: int,
    num_streams: int,
    softmax_scale: float,
    window: int | None,
    softcap: float | None,
    stream_mask: str,
    shared_qkv: bool,
    requires_grad: bool,
    backend: str,
) -> list[torch.Tensor]:
    # The PyTorch backends have no backward of their own: run them again under autograd. An operator runs below the
    # autograd keys, where enable_grad alone records nothing and every gradient would be 0.
    inputs = (q, k, v, alpha_k, alpha_v, beta, sinks, k_prefix, v_prefix)
    autograd_keys = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with autograd_keys, torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        plan = SegmentPlan.from_cu_seqlens(cu_prompt, cu_answer, cu_prefix, num_streams)
        options = (softmax_scale, window, softcap, stream_mask, shared_qkv, requires_grad, backend)
        outputs = _run(leaves, plan, *options)
    given = [x for x in leaves if x is not None]
    pairs = zip(outputs, (d_out, d_k_mixed, d_v_mixed), strict=True)
    used = [(o, d) for o, d in pairs if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in used], given, [d for _, d in used], allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(given, grads, strict=True)]
    return [g.contiguous() for g in grads]


@_attention_backward_op.register_fake
def _(d_out, d_k_mixed, d_v_mixed, *args):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in args[:_DIFFERENTIABLE] if x is not None]


def _setup_context(ctx, inputs, output):
    ctx.options = inputs[12:]
    ctx.save_for_backward(*inputs[:12])


def _attention_backward(ctx, d_out, d_k_mixed, d_v_mixed):
    saved = ctx.saved_tensors
    grads = iter(torch.ops.bitune.attention_backward(d_out, d_k_mixed, d_v_mixed, *saved, *ctx.options))
    given = [None if x is None else next(grads) for x in saved[:_DIFFERENTIABLE]]
    return (*given, *[None] * (3 + len(ctx.options)))


_attention_op.register_autograd(_attention_backward, setup_context=_setup_context)
