"""Backends of the attention operators, and the one place that chooses between them.

Each module has one function ``attention(q, k, v, alpha_k, alpha_v, plan, **options)`` with the meaning given by
``bitune_kernels.ops.bitune_attention``; ``reference`` is the formula that the others are tested against.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

# Ordered by how the choice of "auto" goes: the first one that supports the call.
BACKENDS = ("sdpa", "flash", "flex", "reference")

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


def choose(name: str, q, v, window, softcap, sinks, stream_mask, prefix, requires_grad: bool) -> ModuleType:
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
