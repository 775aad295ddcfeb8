"""How exact a backend must be: at most twice as far from the truth as plain PyTorch in the same precision."""

from __future__ import annotations

import zlib
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .. import backends
from ..backends import reference
from ..ops import bitune_attention
from .cases import Case, leaves

_OUTPUTS = ("out", "k_mixed", "v_mixed")
_NEW_MEMORY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


def default_device() -> str:
    """Where the table of cases runs: on a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class PoisonedMemory(TorchDispatchMode):
    """Inside, new floating-point memory holds NaN: what a kernel leaves unwritten has no value of an earlier call."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        x = operator(*args, **(kwargs or {}))
        return x.fill_(torch.nan) if operator in _NEW_MEMORY and x.is_floating_point() else x


def poisoned(backend: str):
    """``PoisonedMemory`` for our own kernels: torch.compile, which a peer needs, can't be in it."""
    return PoisonedMemory() if backend in backends.OWN else nullcontext()


def assert_within_budget(
    name: str,
    actual: torch.Tensor,
    oracle64: torch.Tensor,
    low_precision: torch.Tensor,
    dtype: torch.dtype,
    case_id: str,
    cancelled: float = 0.0,
) -> None:
    """Raise AssertionError unless ``actual`` is finite and

    max |actual - oracle64| <= 2 (max |low_precision - oracle64| + eps(dtype) max |oracle64| + cancelled)

    Args:
        name: of the output or gradient, for the message.
        actual: what the backend computed.
        oracle64: the reference in float64 on the same inputs.
        low_precision: the reference computed in ``dtype`` throughout.
        dtype: of the inputs.
        case_id: for the message.
        cancelled: rounding errors of terms that cancel in the sum, of which ``oracle64`` shows nothing; see
            ``cancellation``.
    """
    where = f"{case_id} {str(dtype).removeprefix('torch.')}: {name}"
    if actual.shape != oracle64.shape:
        raise AssertionError(f"{where}: shape {list(actual.shape)}, expected {list(oracle64.shape)}")
    if not actual.numel():
        return
    actual, oracle64 = actual.detach().double().cpu(), oracle64.detach().cpu()
    of_pytorch = (low_precision.detach().double().cpu() - oracle64).abs().max()
    limit = 2 * (of_pytorch + torch.finfo(dtype).eps * oracle64.abs().max() + cancelled)
    # NaN must count as the largest error, and argmax takes NaN for the largest.
    error = (actual - oracle64).abs()
    if bool(torch.isfinite(actual).all()) and error.max() <= limit:
        return
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), actual.shape))
    off = int((~(error <= limit)).sum())
    raise AssertionError(
        f"{where}{list(worst)} is {actual[worst]:.9g}, expected {oracle64[worst]:.9g}: "
        f"error {error[worst]:.3g} > {limit:.3g}; {off} of {actual.numel()} values are off"
    )


def assert_backend_within_budget(
    backend: str, case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", backward: bool = True
) -> None:
    """Run a case and hold each output and gradient to the budget."""
    actual = run_case(case, backend, dtype, device, backward)
    oracle64, low, cancelled = _expected(case, dtype, device, backward)
    for name, expected in oracle64.items():
        slack = cancelled.get(name, 0.0)
        assert_within_budget(name, actual[name], expected, low[name], dtype, f"{backend} {case.id}", slack)


def runnable_backends(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[str]:
    """The backends that say they can run a case and its backward."""
    inputs = case.make(dtype)
    facts = {name: inputs.get(name) for name in ("window", "softcap", "sinks", "stream_mask", "prefix")}
    facts |= {"device": torch.device(device), "dtype": dtype, "requires_grad": True}
    facts |= {"head_dim": case.dims[0], "head_dim_v": case.dims[1]}
    return [name for name in backends.BACKENDS if backends.load(name).unsupported(**facts) is None]


def run_case(
    case: Case, backend: str, dtype: torch.dtype, device: torch.device | str = "cpu", backward: bool = True
) -> dict[str, torch.Tensor]:
    """Outputs of ``bitune_attention`` and, as ``d_<input>``, the gradients for one fixed random cotangent."""
    inputs = case.make(dtype, device, requires_grad=backward)
    with poisoned(backend):
        return _results(case, inputs, bitune_attention(**inputs, backend=backend), backward)


def oracle(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", backward: bool = True
) -> dict[str, torch.Tensor]:
    """What ``run_case`` should give: the formula in float64, on the inputs as ``dtype`` rounds them."""
    inputs = _double_inputs(case, dtype, device, backward)
    return _results(case, inputs, bitune_attention(**inputs, backend="reference"), backward)


def low_precision(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", backward: bool = True
) -> dict[str, torch.Tensor]:
    """The same from the formula computed in ``dtype`` throughout: the error that plain PyTorch makes."""
    args, options = case.call(dtype, device, requires_grad=backward)
    outputs = reference.attention(*args, options, upcast=False)
    inputs = dict(zip(("q", "k", "v", "alpha_k", "alpha_v"), args, strict=False)) | options._asdict()
    return _results(case, inputs, outputs, backward)


def cancellation(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, float]:
    """Rounding errors that a gradient may have although the oracle's value of it is small, or 0.

    d_q and d_k are sums over P (dP - delta) with dP = <d_out, v> in float32: where a row sees one key, the
    two are equal and d_q is rounding error alone. d_alpha and d_beta are each one sum over all rows, of terms
    that carry the rounding errors of ``dtype``, independent of each other, and of their probabilities: float32
    scores of size s are exact to s eps, which exp makes their relative error.
    """
    inputs = _double_inputs(case, dtype, device, requires_grad=True)
    out, k_mixed, v_mixed = bitune_attention(**inputs, backend="reference")
    if not out.numel():
        return {}
    plan, d_out = inputs["plan"], _cotangent(case, "out", out)

    def longest(x):
        return float(x.norm(dim=-1).max()) if x.numel() else 0.0

    k, v, prefix = inputs["k"].detach(), inputs["v"].detach(), inputs.get("prefix", ())
    longest_k = max(longest(x) for x in (inputs["q"].detach(), k, *(x.detach() for x in prefix[:1])))
    longest_v = max(longest(x) for x in (v, *(x.detach() for x in prefix[1:])))
    # |x_i| <= |x| / sqrt(head_dim) times a small factor: the size of one element of P (dP - delta) k.
    size = abs(case.scale) * longest(d_out) * longest_v * longest_k / case.head_dim**0.5
    d_scores = torch.finfo(torch.float32).eps * size
    slack = dict.fromkeys(("d_q", "d_k", "d_prefix[0]"), d_scores)

    scores = min(abs(case.scale) * longest(inputs["q"].detach()) * longest_k, case.softcap or float("inf"))
    relative = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * scores

    def of_sum(terms, weight):  # independent errors add in squares
        squares = terms.detach().square()
        squares = squares.sum() if not weight.ndim else squares.sum(dim=(0, 2))
        return relative * float(squares.sqrt().max())

    N = plan.num_prompt
    if plan.num_streams == 2 and N:
        cotangents = [d_out, _cotangent(case, "k_mixed", k_mixed), _cotangent(case, "v_mixed", v_mixed)]
        d_k, d_v = torch.autograd.grad([out, k_mixed, v_mixed], [k_mixed, v_mixed], cotangents)
        slack["d_alpha_k"] = of_sum((k[:N] - k[N : 2 * N]) * d_k, inputs["alpha_k"])
        slack["d_alpha_v"] = of_sum((v[:N] - v[N : 2 * N]) * d_v, inputs["alpha_v"])
    if case.beta is not None and not case.answer_only and N:
        apart, _, _ = bitune_attention(**inputs | {"beta": None}, backend="reference")
        slack["d_beta"] = of_sum((apart[:N] - apart[N : 2 * N]) * d_out[:N], inputs["beta"])
    return slack


@lru_cache(maxsize=4)  # the backends of one case follow each other
def _expected(case: Case, dtype: torch.dtype, device: torch.device | str, backward: bool):
    slack = cancellation(case, dtype, device) if backward else {}
    return oracle(case, dtype, device, backward), low_precision(case, dtype, device, backward), slack


def _double_inputs(case: Case, dtype: torch.dtype, device, requires_grad: bool) -> dict[str, Any]:
    def double(value):
        if isinstance(value, tuple):
            return tuple(double(x) for x in value)
        return value.double().requires_grad_(requires_grad) if isinstance(value, torch.Tensor) else value

    return {name: double(value) for name, value in case.make(dtype, device).items()}


def _cotangent(case: Case, name: str, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.id} d_{name}".encode()))
    values = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    # Rounded to bfloat16: the same numbers in every dtype, so that the backend's error is the only one.
    values = values.to(torch.bfloat16).to(like)
    return values.transpose(0, 1).contiguous().transpose(0, 1) if case.strided else values


def _results(case: Case, inputs: dict[str, Any], outputs: tuple, backward: bool) -> dict[str, torch.Tensor]:
    results = {name: output.detach() for name, output in zip(_OUTPUTS, outputs, strict=True)}
    if not backward:
        return results
    given = leaves(inputs)
    # An output without rows may depend on nothing.
    used = [(o, _cotangent(case, name, o)) for name, o in zip(_OUTPUTS, outputs, strict=True) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in used], list(given.values()), [d for _, d in used], allow_unused=True)
    for (name, leaf), grad in zip(given.items(), grads, strict=True):
        results[f"d_{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results
