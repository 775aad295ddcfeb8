"""CUDA C++ kernels (``csrc/attention.h``): ``bitune_attention`` in one launch. Its backward is Triton's."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from .. import env
from ..plan import SegmentPlan
from . import Options, load, schedule
from .outputs import allocate

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
MAX_SOFTCAP = 1000.0  # times the rounding error of its tanh, about 2**-22: still below that of float16


def unsupported(
    *, device=None, dtype=None, head_dim=None, head_dim_v=None, softcap=None, requires_grad=False, **call
) -> str | None:
    """Why this backend can't run a call, or None."""
    try:
        native = _native()
    except ImportError:
        return f"the native extension can't be used: {env.native_extension()['reason']}"
    if getattr(native, "ITEM_COLUMNS", None) != schedule.FORWARD:
        return "the native extension was built from other sources than these: install the package again"
    device = torch.device(native.DEVICE_TYPE if device is None else device)
    if device.type != native.DEVICE_TYPE:
        return f"the native extension needs a {native.DEVICE_TYPE} device, got {device.type}"
    if dtype is not None and dtype not in DTYPES:
        return f"the kernels compute bfloat16 and float16, got {dtype}"
    dims = head_dim or 64, head_dim_v or head_dim or 64
    for dim in dims:
        if dim % 8 or dim > MAX_HEAD_DIM:
            return f"the kernels need head dims that are multiples of 8 up to {MAX_HEAD_DIM}, got {dim}"
    if softcap is not None and softcap > MAX_SOFTCAP:
        return f"the kernels' tanh is too coarse for a softcap above {MAX_SOFTCAP:g}, got {softcap:g}"
    try:
        capability = native.capability(_index(device))
    except RuntimeError as e:
        return native.device_info()["error"] or str(e)
    if not native.forward_tile(capability, *dims)[0]:
        return f"the native extension has no kernel for compute capability {capability // 10}.{capability % 10}"
    if requires_grad:
        facts = {"device": device, "dtype": dtype, "head_dim": head_dim, "head_dim_v": head_dim_v}
        if reason := load("triton").unsupported(**facts, **call, requires_grad=True):
            return f"its backward is Triton's: {reason}"
    return None


def forward(
    q,
    k,
    v,
    alpha_k,
    alpha_v,
    plan: SegmentPlan,
    options: Options,
    *,
    save: bool,
    k_cache: torch.Tensor | None = None,
    v_cache: torch.Tensor | None = None,
    cache_positions: torch.Tensor | None = None,
):
    """Allocates the outputs and launches the kernel: ``out, k_mixed, v_mixed, streams, lse``.

    With caches, the mixed and the answer's keys and values go to ``cache_positions`` there; k_mixed, v_mixed are None.

    Raises:
        ValueError: a cache whose rows the kernels can't address.
        RuntimeError: CUDA refused the launch.
    """
    softmax_scale, window, softcap, sinks, stream_mask, shared_qkv, beta, prefix = options
    native, index = _native(), _index(q.device)
    heads_kv, dim, dim_v = k.shape[1], q.shape[2], v.shape[2]
    mixes, has_beta, to_cache = plan.num_streams == 2, beta is not None, cache_positions is not None
    answer_only = q.shape[0] != k.shape[0]
    two_parts = (shared_qkv or has_beta) and not answer_only
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if to_cache and not _addressable(cache):
            raise ValueError(
                f"{name}: expected contiguous rows at multiples of 16 bytes, got strides {list(cache.stride())} from "
                f"address {cache.data_ptr():#x} on"
            )

    outputs = allocate(q, k, v, plan, shared_qkv=shared_qkv, beta=has_beta, save=save, to_cache=to_cache)
    out, k_mixed, v_mixed, streams, lse = outputs
    k_written, v_written = (k_cache, v_cache) if to_cache else (k_mixed, v_mixed)
    block_m, *_ = native.forward_tile(native.capability(index), dim, dim_v)
    launch = schedule.Launch(q.shape[1] // heads_kv, window, stream_mask, shared_qkv, has_beta, answer_only)
    items = schedule.cached(plan, q.device, schedule.forward_items, launch, block_m, to_cache)
    if not len(items):
        return outputs
    # What is made here must live until the launch; after it, the stream's order keeps its memory from being reused.
    q, k, v, *prefix = (x if _addressable(x) else _copy(x) for x in (q, k, v, *(prefix or ())))
    alpha_k, alpha_v, beta, sinks = (
        None if x is None else x.float().contiguous() for x in (alpha_k, alpha_v, beta, sinks)
    )
    slots = cache_positions.contiguous() if to_cache else None
    writes = mixes or to_cache
    # Torch's guard around the kernels' own: on its way back that one would open a context on a device that has none.
    with torch.cuda.device_of(q):
        code, text = native.forward(
            items=items.data_ptr(),
            num_items=len(items),
            bf16=q.dtype == torch.bfloat16,
            num_heads_kv=heads_kv,
            group_size=launch.group_size,
            head_dim=dim,
            head_dim_v=dim_v,
            num_prompt=plan.num_prompt,
            q=_rows(q),
            k=_rows(k),
            v=_rows(v),
            k_prefix=_rows(prefix[0]) if plan.num_prefix else None,
            v_prefix=_rows(prefix[1]) if plan.num_prefix else None,
            out=_rows(out),
            streams=_rows(streams) if len(streams) else None,
            k_written=_rows(k_written) if writes else None,
            v_written=_rows(v_written) if writes else None,
            slots=slots.data_ptr() if to_cache else 0,
            lse=lse.data_ptr(),
            alpha_k=_per_head(alpha_k),
            alpha_v=_per_head(alpha_v),
            beta=_per_head(beta) if two_parts else None,
            sinks=0 if sinks is None else sinks.data_ptr(),
            softmax_scale=softmax_scale,
            softcap=softcap or 0.0,
            window=window or 0,
            two_parts=two_parts,
            goes_on=shared_qkv and stream_mask != "anti_causal",
            device=index,
            stream=torch._C._cuda_getCurrentRawStream(index) if q.is_cuda else 0,  # without a Stream around it
        )
    if code:
        raise RuntimeError(f"{text} (error {code})")
    return outputs


def backward(*tensors, **options) -> list[torch.Tensor]:
    """The gradients, by Triton's kernels: ``streams`` and ``lse`` are the same here.

    The one backend that uses another: a second backward would have to compute the same from the same.
    """
    return load("triton").backward(*tensors, **options)


def _native() -> ModuleType:
    # Looked up by each call: importing the package must not need what it was built without.
    return import_module("bitune_kernels._C")


def _index(device: torch.device) -> int:
    if device.index is not None or device.type != "cuda":
        return device.index or 0
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _addressable(x: torch.Tensor) -> bool:
    # Whether the kernels' copies of 16 bytes, which go on from row to row, reach every element.
    row, head, element = x.stride()
    return element == 1 and row > 0 and head > 0 and row % 8 == 0 and head % 8 == 0 and x.data_ptr() % 16 == 0


def _copy(x: torch.Tensor) -> torch.Tensor:
    # Not contiguous(): that is x itself where a contiguous x begins in the middle of 16 bytes. New memory never does.
    return x.clone(memory_format=torch.contiguous_format)


def _rows(x: torch.Tensor) -> tuple[int, int, int, int]:
    row, head, _ = x.stride()
    return x.data_ptr(), row, head, x.shape[0]


def _per_head(x: torch.Tensor | None) -> tuple[int, int] | None:
    return None if x is None else (x.data_ptr(), x.ndim)
