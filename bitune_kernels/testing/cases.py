"""The cases that every attention backend is tested on, as data: the same table for CPU and GPU."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..backends import Options
from ..plan import SegmentPlan

# A separate axis: each case runs in each dtype that the backend under test supports.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call of ``bitune_attention``: the plainest one, except where a field says otherwise.

    Args:
        prompts, answers: rows of each sample's prompt (per stream) and answer segment.
        heads: query heads, key/value heads.
        head_dim: of q and k, and of v unless ``head_dim_v`` says otherwise.
        prefix: cached rows of each sample, or None.
        num_streams, window, softcap, softmax_scale, stream_mask, shared_qkv: as in ``bitune_attention``.
        alpha, beta: "scalar" or "head" (one value per head); beta None: the streams' outputs stay apart.
        sinks: whether there is one sink per query head.
        strided: q, k, v are slices of one buffer and the prefix is a transposed cache, with NaN in every gap.
        answer_only: q has the answer rows alone.
    """

    prompts: tuple[int, ...]
    answers: tuple[int, ...]
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    head_dim_v: int | None = None
    prefix: tuple[int, ...] | None = None
    num_streams: int = 2
    window: int | None = None
    softcap: float | None = None
    softmax_scale: float | None = None
    stream_mask: str = "full"
    shared_qkv: bool = False
    alpha: str = "scalar"
    beta: str | None = None
    sinks: bool = False
    strided: bool = False
    answer_only: bool = False

    @property
    def id(self) -> str:
        """Readable and unique, e.g. ``p63,1-a5,9-h4,2-d16-window7-sinks``."""

        def joined(values):
            return ",".join(map(str, values))

        parts = [f"p{joined(self.prompts)}", f"a{joined(self.answers)}"]
        parts += [f"h{joined(self.heads)}", f"d{self.head_dim}"]
        for name, text in (
            ("head_dim_v", f"dv{self.head_dim_v}"),
            ("prefix", f"prefix{joined(self.prefix or ())}"),
            ("num_streams", f"streams{self.num_streams}"),
            ("window", f"window{self.window}"),
            ("softcap", f"softcap{self.softcap}"),
            ("softmax_scale", f"scale{self.softmax_scale}"),
            ("stream_mask", self.stream_mask),
            ("shared_qkv", "shared_qkv"),
            ("alpha", f"alpha_per_{self.alpha}"),
            ("beta", f"beta_per_{self.beta}"),
            ("sinks", "sinks"),
            ("strided", "strided"),
            ("answer_only", "answer_only"),
        ):
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                parts.append(text)
        return "-".join(parts)

    def plan(self, device: torch.device | str = "cpu") -> SegmentPlan:
        """The lengths of the case."""
        options = {"num_streams": self.num_streams, "prefix_lengths": self.prefix}
        return SegmentPlan.from_lengths(self.prompts, self.answers, **options, device=device)

    def make(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        requires_grad: bool = False,
    ) -> dict[str, Any]:
        """Keyword arguments of ``bitune_attention``: the same numbers everywhere, rounded to ``dtype``."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.id.encode()))
        (heads_q, heads_kv), (dim, dim_v) = self.heads, self.dims
        plan = self.plan(device)
        rows_q = plan.num_answer if self.answer_only else plan.num_rows

        def place(values, transposed=False):
            values = values.to(dtype)
            if self.strided:
                rows, heads, width = values.shape
                shape = (heads, rows + 3, width) if transposed else (rows, 2 * heads + 1, width + 8)
                buffer = torch.full(shape, float("nan"), dtype=dtype, device=device)
                view = buffer.transpose(0, 1)[:rows] if transposed else buffer[:, heads : 2 * heads, :width]
                values = view.copy_(values)
            return values.to(device).requires_grad_(requires_grad)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def weight(kind, heads, low, high):  # unlike for k and v, so that exchanging them shows
            shape = () if kind == "scalar" else (heads,)
            values = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
            values = values.to(torch.promote_types(dtype, torch.float32))
            return values.to(device).requires_grad_(requires_grad)

        inputs: dict[str, Any] = {
            "q": place(normal(rows_q, heads_q, dim)),
            "k": place(normal(plan.num_rows, heads_kv, dim)),
            "v": place(normal(plan.num_rows, heads_kv, dim_v)),
            "alpha_k": None,
            "alpha_v": None,
            "plan": plan,
            "softmax_scale": self.softmax_scale,
            "window": self.window,
            "softcap": self.softcap,
            "stream_mask": self.stream_mask,
            "shared_qkv": self.shared_qkv,
        }
        if self.num_streams == 2:
            inputs["alpha_k"] = weight(self.alpha, heads_kv, 0.1, 0.4)
            inputs["alpha_v"] = weight(self.alpha, heads_kv, 0.6, 0.9)
        if self.beta is not None:
            inputs["beta"] = weight(self.beta, heads_q, 0.2, 0.8)
        if self.sinks:
            inputs["sinks"] = normal(heads_q).to(dtype).to(device).requires_grad_(requires_grad)
        if self.prefix is not None:
            past = sum(self.prefix)
            inputs["prefix"] = (
                place(normal(past, heads_kv, dim), transposed=True),
                place(normal(past, heads_kv, dim_v), transposed=True),
            )
        return inputs

    def call(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", requires_grad: bool = False
    ) -> tuple[list, Options]:
        """The same as backends get it: q, k, v, alpha_k, alpha_v and plan, and the options with their scale."""
        inputs = self.make(dtype, device, requires_grad)
        inputs["softmax_scale"] = self.scale
        options = Options(**{name: inputs.pop(name) for name in Options._fields if name in inputs})
        return list(inputs.values()), options

    def make_prefill(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", transposed: bool = True
    ) -> dict[str, Any]:
        """Keyword arguments of ``bitune_prefill``: more slots than rows, in any order, of caches that are NaN.

        ``transposed``: the caches are [heads, slots, dim] in memory.
        """
        plan = self.plan()
        rows = plan.num_prompt + plan.num_answer
        call = self.make(dtype, device)
        call["cache_positions"] = torch.randperm(rows + 9, generator=torch.Generator().manual_seed(0))[:rows].to(device)
        for name, dim in zip(("k_cache", "v_cache"), self.dims, strict=True):
            shape = (self.heads[1], rows + 9, dim) if transposed else (rows + 9, self.heads[1], dim)
            cache = torch.full(shape, float("nan"), dtype=dtype, device=device)
            call[name] = cache.transpose(0, 1) if transposed else cache
        return call

    @property
    def scale(self) -> float:
        """softmax_scale, or its default."""
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def dims(self) -> tuple[int, int]:
        """head_dim of q and k, head_dim of v."""
        return self.head_dim, self.head_dim if self.head_dim_v is None else self.head_dim_v


def assert_prefilled(call: dict[str, Any], mixed: Sequence[torch.Tensor], rtol: float = 0, atol: float = 0) -> None:
    """Hold the caches of a call of ``make_prefill`` to k_mixed and v_mixed of ``bitune_attention``: nothing else is
    written."""
    for name, prompt in zip("kv", mixed, strict=True):
        cache, own = call[f"{name}_cache"], call[name][call["plan"].answer_start :]
        wanted = torch.full_like(cache, float("nan"))
        wanted[call["cache_positions"]] = torch.cat([prompt, own])
        options = dict(rtol=rtol, atol=atol, equal_nan=True)
        torch.testing.assert_close(cache, wanted, **options, msg=lambda m, x=name: f"{x}_cache: values are off: {m}")


def leaves(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a call that have a gradient, by the name that its errors use."""
    found = {name: inputs.get(name) for name in ("q", "k", "v", "alpha_k", "alpha_v", "beta", "sinks")}
    found["prefix[0]"], found["prefix[1]"] = inputs.get("prefix") or (None, None)
    return {name: x for name, x in found.items() if x is not None}


# Lengths around the tiles that kernels use, with both segments empty once; then two short samples.
EDGES = {"prompts": (0, 1, 63, 65, 127, 0), "answers": (127, 65, 63, 1, 0, 0)}
SHORT = {"prompts": (9, 5), "answers": (3, 6)}

CASES = [
    # lengths
    Case(**EDGES),
    Case(prompts=(127,), answers=(127,)),
    Case(prompts=(64,), answers=(64,)),
    Case(prompts=(0,), answers=(1,)),
    Case(prompts=(1,), answers=(0,)),
    Case(prompts=(1,), answers=(1,)),
    Case(prompts=(1, 1, 1), answers=(1, 1, 1)),
    Case(prompts=(0, 0), answers=(65, 1)),
    Case(prompts=(65, 1), answers=(0, 0)),
    Case(prompts=(65, 1), answers=(0, 0), num_streams=1),  # texts that are encoded
    Case(prompts=(0,), answers=(0,)),
    Case(prompts=(), answers=()),
    Case(prompts=(300, 1, 2, 129), answers=(1, 40, 0, 2)),
    # heads and head dims
    Case(prompts=(65, 20), answers=(31, 63), heads=(1, 1)),
    Case(prompts=(65, 20), answers=(31, 63), heads=(4, 4)),
    Case(prompts=(65, 20), answers=(31, 63), heads=(8, 2)),
    Case(prompts=(65, 20), answers=(31, 63), heads=(8, 1)),
    Case(prompts=(65, 20), answers=(31, 63), heads=(6, 2), head_dim=64),
    Case(prompts=(65, 7), answers=(9, 33), heads=(4, 1), head_dim=80),
    Case(prompts=(65, 7), answers=(9, 33), heads=(4, 2), head_dim=96),
    Case(prompts=(65, 7), answers=(9, 33), heads=(4, 4), head_dim=128),
    Case(prompts=(33, 7), answers=(9, 17), heads=(2, 1), head_dim=256),
    Case(prompts=(33, 7), answers=(9, 17), head_dim=32, head_dim_v=16),
    # each option alone
    Case(**EDGES, alpha="head"),
    Case(**EDGES, window=1),
    Case(**EDGES, window=40),
    Case(**SHORT, window=1000),
    Case(**EDGES, softcap=2.0),
    Case(**SHORT, softcap=1000.0),
    Case(**SHORT, softmax_scale=2.0),
    Case(**SHORT, softmax_scale=-0.5),
    Case(**EDGES, sinks=True),
    Case(**EDGES, stream_mask="causal"),
    Case(**EDGES, stream_mask="anti_causal"),
    Case(**EDGES, strided=True),
    Case(**EDGES, answer_only=True),
    Case(**EDGES, num_streams=1),
    Case(**EDGES, num_streams=1, shared_qkv=True),
    Case(**EDGES, beta="scalar"),
    Case(**EDGES, prefix=(3, 65, 0, 1, 63, 5)),
    Case(prompts=(5, 3), answers=(4, 2), prefix=(0, 0)),
    # neighbours of equal lengths, which a backend may compute together
    Case(prompts=(5, 5, 5, 3, 3), answers=(2, 2, 4, 1, 1), prefix=(3, 3, 0, 2, 2), window=4),
    Case(prompts=(5, 5, 5), answers=(4, 4, 4), beta="head", stream_mask="anti_causal"),
    # the whole prompt is cached already; the answer is one token: a step of decoding
    Case(prompts=(0, 0), answers=(1, 1), prefix=(70, 5)),
    # options together, as models and variants use them
    Case(**EDGES, window=40, prefix=(3, 65, 0, 1, 63, 5)),
    Case(**EDGES, window=40, stream_mask="causal", alpha="head"),
    Case(**EDGES, window=40, stream_mask="anti_causal"),
    Case(**EDGES, window=40, softcap=2.0, heads=(4, 1)),
    Case(**EDGES, window=40, sinks=True, heads=(8, 1)),
    Case(**EDGES, window=40, answer_only=True, strided=True),
    Case(**EDGES, stream_mask="anti_causal", prefix=(3, 65, 0, 1, 63, 5)),
    Case(**EDGES, num_streams=1, window=40, prefix=(3, 65, 0, 1, 63, 5)),
    Case(**EDGES, num_streams=1, stream_mask="anti_causal", answer_only=True),
    Case(**EDGES, num_streams=1, shared_qkv=True, beta="head"),
    Case(**EDGES, num_streams=1, shared_qkv=True, beta="scalar", window=40),
    Case(**EDGES, num_streams=1, shared_qkv=True, prefix=(3, 65, 0, 1, 63, 5), strided=True),
    Case(**EDGES, num_streams=1, shared_qkv=True, beta="head", answer_only=True),
    Case(**EDGES, beta="head", alpha="head", stream_mask="anti_causal", window=40),
    Case(**SHORT, beta="head", sinks=True, softcap=2.0, window=4, prefix=(6, 2), alpha="head", strided=True),
    Case(**SHORT, sinks=True, answer_only=True, prefix=(6, 0), num_streams=1),
    # each mask where the prompt has one set of rows
    Case(**SHORT, num_streams=1, stream_mask="causal"),
    Case(**SHORT, num_streams=1, stream_mask="anti_causal"),
    Case(**SHORT, num_streams=1, shared_qkv=True, stream_mask="causal"),
    Case(**SHORT, num_streams=1, shared_qkv=True, stream_mask="anti_causal"),
]
