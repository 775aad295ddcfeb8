"""The attention operator alone: each backend and what one would use instead, over shapes, forward and backward.

Providers run on the same tensors, in turns. One that disagrees with the formula in float32 is not timed. On a GPU times
are the device's, of inputs that are not in its cache; what the host needs to enqueue a call stands beside them. Rows go
to <out>/attention.csv, a plot of this run to <out>/attention.png.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from functools import partial

import matplotlib.figure
import torch
import torch._functorch.config
from common.floor import PEAK_FIELDS, measured_peaks, visible_pairs
from common.memory import memory_of
from common.models import Machine
from common.peers import PEERS, SdpaCalls, VarlenCalls
from common.report import Results, Table, milliseconds, worst_error
from common.run import (
    Case,
    add_run_options,
    add_sweep_options,
    check_at_least,
    check_machine,
    check_minutes,
    check_names,
    exits,
    machine_name,
    measure,
    not_usual,
    reasons_against,
    relative_error,
)

from bitune_kernels import SegmentPlan, bitune_attention, bitune_prefill, mix_kv
from bitune_kernels.backends import OWN, Options, flash, reference
from bitune_kernels.testing.error_budget import poisoned
from bitune_kernels.testing.timing import Timing, provenance

EXPLANATION = """\
Both prompt attentions, the mixed cache and the answer's attention of one layer, for one packed batch. TFLOP/s count the
visible query-key pairs only: 4 x head_dim x query heads each, 2.5 times that for a backward pass.
"""
MODES = ("forward", "backward", "prefill", "shared_qkv")
# Whose shared-QKV mode is set against a pass of each stream alone and against two calls.
VARIANTS_OF = ("cuda", "triton", "sdpa")
ONE_STREAM = {"one-stream": "bidir", "causal": "causal"}
OUTPUTS = ("out", "mixed", "cache", "d_q", "d_k", "d_v")
CASE_FIELDS = ("mode", "batch", "length", "answer", "ragged", "heads_q", "heads_kv", "head_dim", "rows", "tokens")
TIME_FIELDS = (
    "provider",
    "rounds",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "host_ms",
    "useful_gflop",
    "useful_tflops",
    "floor_mib",
    "floor_ms",
    "time_over_floor",
    "best_peer",
    "speedup_over_best_peer",
    "cost_in_one_stream_passes",
    "peak_mib",
    "error",
)

# Lengths of the answer: one row where a cache is filled, a quarter of the prompt where a model learns.
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
FEWER_LENGTHS = (256, 1024, 4096, 16384)
MAIN_HEADS = (32, 8, 128)
OTHER_HEADS = ((16, 16, 64), (8, 1, 256))  # the latter are gemma-2b's


class Attention(Case):
    """One layer's attention over a batch of prompts of the same or of different lengths."""

    yardstick = "formula"
    device_alone = True

    def __init__(self, machine: Machine, batch, length, mode, ragged, heads_q, heads_kv, head_dim):
        self.device, self.dtype = machine.device, machine.dtype
        self.batch, self.length, self.mode, self.ragged = batch, length, mode, ragged
        self.heads_q, self.heads_kv, self.head_dim = heads_q, heads_kv, head_dim
        self.prompts, self.answers = lengths_of(batch, length, mode, ragged)
        self.outputs = {
            "backward": ("d_q", "d_k", "d_v"),
            "prefill": ("out", "cache"),
            "shared_qkv": ("out",),
        }.get(mode, ("out", "mixed"))
        self.shared = mode == "shared_qkv"
        self.plan = self._plan(self.answers)
        self.N, self.A = self.plan.num_prompt, self.plan.num_answer
        self.tokens = self.N + self.A

        generator = torch.Generator(self.device).manual_seed(batch * length + head_dim)

        def normal(rows, heads):
            shape = rows, heads, head_dim
            return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32).to(self.dtype)

        self.q, self.k, self.v = (normal(self.plan.num_rows, h) for h in (heads_q, heads_kv, heads_kv))
        self.alphas = (None, None)
        if not self.shared:
            self.alphas = tuple(torch.tensor(x, device=self.device) for x in (0.3, 0.6))
        if mode == "backward":
            self.d_out = normal(2 * self.N + self.A, heads_q)
            # d_alpha belongs to the work; the tests check it, with a bound for a sum of terms that cancel.
            self.leaves = [x.requires_grad_() for x in (self.q, self.k, self.v, *self.alphas)]
        if mode == "prefill":
            self.caches = [torch.empty_like(x[: self.tokens]) for x in (self.k, self.v)]
        prompt, answer = [], []
        for n, a in zip(self.prompts, self.answers, strict=True):  # a sample's slots follow each other
            start = len(prompt) + len(answer)
            prompt += range(start, start + n)
            answer += range(start + n, start + n + a)
        self.positions = torch.tensor(prompt + answer, device=self.device)
        self.calls, self.graphs, self.expected = {}, {}, None

    @property
    def label(self) -> str:
        return f"{self.mode}, {self.batch} x {self.length}{' ragged' if self.ragged else ''}, {self.heads}"

    @property
    def heads(self) -> str:
        return f"{self.heads_q}/{self.heads_kv}x{self.head_dim}"

    def facts(self) -> dict:
        return {
            "mode": self.mode,
            "batch": self.batch,
            "length": self.length,
            "answer": max(self.answers),
            "ragged": int(self.ragged),
            "heads_q": self.heads_q,
            "heads_kv": self.heads_kv,
            "head_dim": self.head_dim,
            "rows": self.plan.num_rows,
            "tokens": self.tokens,
        }

    def providers(self, names: Sequence[str]) -> list[str]:
        if not self.shared:
            return list(names)
        variants = [f"{n}[{kind}]" for n in names if n in VARIANTS_OF for kind in (*ONE_STREAM, "two-calls")]
        return [*names, *variants]

    def _plan(self, answers: Sequence[int]) -> SegmentPlan:
        streams = 1 if self.shared else 2
        return SegmentPlan.from_lengths(self.prompts, answers, num_streams=streams, device=self.device)

    # What is timed

    def run(self, provider: str):
        if self.mode != "backward":
            with torch.no_grad():
                return self._forward(provider)
        if provider not in self.graphs:  # kept, so that the backward pass is timed alone
            pieces = self._pieces(provider, self._forward(provider))
            d_out = [self.d_out[rows] if o.ndim == 3 else _like_sdpa(self.d_out[rows], o) for rows, o in pieces]
            self.graphs[provider] = [o for _, o in pieces], d_out
        return torch.autograd.grad(self.graphs[provider][0], self.leaves, self.graphs[provider][1], retain_graph=True)

    def _forward(self, provider: str):
        if provider not in self.calls:
            self.calls[provider] = self._call(provider)
        return self.calls[provider]()

    def _call(self, provider: str):
        inputs = self.q, self.k, self.v, *self.alphas
        if provider in PEERS:
            varlen = provider == "varlen"
            calls = VarlenCalls(self.plan, self.positions) if varlen else SdpaCalls(provider, self.plan, self.device)
            return partial(calls, *inputs, self.caches if self.mode == "prefill" else None)
        backend, _, kind = provider.removesuffix("]").partition("[")
        if self.mode == "prefill":
            k_cache, v_cache = self.caches
            options = {"k_cache": k_cache, "v_cache": v_cache, "cache_positions": self.positions, "backend": backend}
            return partial(bitune_prefill, *inputs, self.plan, **options)
        if kind == "two-calls":
            causal = self._plan([0] * self.batch)
            rows = [x[: self.N] for x in (self.q, self.k, self.v)]

            def two_calls():
                full = bitune_attention(*inputs, self.plan, backend=backend)
                return full, bitune_attention(*rows, None, None, causal, stream_mask="causal", backend=backend)

            return two_calls
        options = {"shared_qkv": self.shared and not kind, "stream_mask": "causal" if kind == "causal" else "full"}
        return partial(bitune_attention, *inputs, self.plan, **options, backend=backend)

    def _pieces(self, provider: str, found) -> list[tuple[slice, torch.Tensor]]:
        """What a call returned as rows of [bidir prompts | causal prompts | answers]."""
        N, A = self.N, self.A
        bidir, causal, answer = slice(0, N), slice(N, 2 * N), slice(2 * N, 2 * N + A)
        if provider in PEERS:
            return found
        if provider.endswith("[two-calls]"):
            (full, _, _), (second, _, _) = found
            return [(bidir, full[:N]), (answer, full[N:]), (causal, second)]
        out = found if self.mode == "prefill" else found[0]
        if alone := stream_alone(provider):
            return [(bidir if alone == "bidir" else causal, out[:N]), (answer, out[N:])]
        return [(slice(0, 2 * N + A), out)]

    def memory(self, device: torch.device, provider: str) -> float | None:
        """MiB at the peak of one call above inputs, caches and graphs that were there before; None on a CPU."""
        return memory_of(device, partial(self.run, provider)).step if device.type == "cuda" else None

    # What is right

    def errors(self, provider: str) -> dict[str, float]:
        if self.expected is None:
            self.expected = self._formula(torch.float32)
        found = self._formula(self.dtype, upcast=False) if provider == self.yardstick else self._results(provider)
        N, start = self.N, self.plan.answer_start
        # Each segment for itself: a wrong answer row of a long prompt would not show in the norm over all rows.
        of_rows = [slice(0, N), slice(start - N, start), slice(start, None)]
        segments = {"out": [slice(0, N), slice(N, 2 * N), slice(2 * N, None)], "mixed": [slice(None)]}
        segments |= {"cache": [slice(None)]} | dict.fromkeys(("d_q", "d_k", "d_v"), of_rows)
        if alone := stream_alone(provider):
            segments["out"].pop(1 if alone == "bidir" else 0)
        return {
            name: max(
                relative_error(f[rows], e[rows])
                for f, e in zip(found[name], self.expected[name], strict=True)
                for rows in segments[name]
            )
            for name in self.outputs
            if name in found
        }

    def _results(self, provider: str) -> dict[str, list[torch.Tensor]]:
        """The outputs of a call by name; what it didn't write is NaN."""
        with poisoned(provider.partition("[")[0]):
            return self._found(provider)

    def _found(self, provider: str) -> dict[str, list[torch.Tensor]]:
        if self.mode == "backward":
            return {f"d_{name}": [grad] for name, grad in zip("qkv", self.run(provider), strict=False)}
        for cache in getattr(self, "caches", ()):
            cache.fill_(float("nan"))
        found = self.run(provider)
        out = self.q.new_full((2 * self.N + self.A, self.heads_q, self.head_dim), float("nan"))
        for rows, o in self._pieces(provider, found):
            out[rows] = o if o.ndim == 3 else o.transpose(1, 2).flatten(0, 1)
        results = {"out": [out]}
        if self.mode == "prefill":
            results["cache"] = [x.clone() for x in self.caches]
        elif self.mode == "forward" and provider not in PEERS:
            results["mixed"] = list(found[1:])
        return results

    def _formula(self, dtype: torch.dtype, upcast: bool = True) -> dict[str, list[torch.Tensor]]:
        """The same from ``backends.reference``, as many heads at a time as 2^27 scores of a stream allow."""
        N, start, backward = self.N, self.plan.answer_start, self.mode == "backward"
        q, k, v = (x.detach().to(dtype) for x in (self.q, self.k, self.v))
        alphas = [None if x is None else x.detach() for x in self.alphas]
        out = q.new_empty(2 * N + self.A, self.heads_q, self.head_dim)
        grads = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)] if backward else []
        at_once = max(1, 2**27 // sum(n * n for n in self.prompts))
        for heads in torch.arange(self.heads_q, device=self.device).split(at_once):
            heads_kv = heads // (self.heads_q // self.heads_kv)
            chunk = [x[:, h].requires_grad_(backward) for x, h in ((q, heads), (k, heads_kv), (v, heads_kv))]
            with torch.set_grad_enabled(backward):
                options = Options(softmax_scale=self.head_dim**-0.5, shared_qkv=self.shared)
                o, _, _ = reference.attention(*chunk, *alphas, self.plan, options, upcast)
            out[:, heads] = o.detach()
            if backward:
                found = torch.autograd.grad(o, chunk, self.d_out[:, heads].to(dtype))
                for grad, part, h in zip(grads, found, (heads, heads_kv, heads_kv), strict=True):
                    grad.index_add_(1, h, part.float())
        results = {"out": [out]} | {f"d_{name}": [grad] for name, grad in zip("qkv", grads, strict=False)}
        if not self.shared:
            results["mixed"] = [mix_kv(x[N:start], x[:N], alpha) for x, alpha in zip((k, v), alphas, strict=True)]
        if self.mode == "prefill":
            results["cache"] = [torch.empty_like(x[: self.tokens]) for x in (k, v)]
            for cache, mixed, own in zip(results["cache"], results["mixed"], (k, v), strict=True):
                cache[self.positions] = torch.cat([mixed, own[start:]])
        return results

    def forget_oracle(self) -> None:
        self.expected = None

    # What it must cost

    def useful_flops(self, provider: str) -> int:
        """Two products of head_dim multiplications and additions per visible pair and head; backward has five."""
        alone = stream_alone(provider)
        streams = (alone,) if alone else ("bidir", "causal")
        flops = 4 * self.head_dim * self.heads_q * visible_pairs(self.prompts, self.answers, streams)
        return flops * 5 // 2 if self.mode == "backward" else flops

    def floor_bytes(self, provider: str) -> int:
        """Each input read once and each output written once."""
        rows, N = self.plan.num_rows, self.N
        q, kv = rows * self.heads_q, 2 * rows * self.heads_kv
        out = (self.tokens if stream_alone(provider) else N + self.tokens) * self.heads_q
        written = {"prefill": self.tokens, "forward": N}.get(self.mode, 0) * 2 * self.heads_kv  # cache or mixed rows
        heads = 2 * (q + kv) + 2 * out if self.mode == "backward" else q + kv + out + written
        return heads * self.head_dim * self.dtype.itemsize


def stream_alone(provider: str) -> str | None:
    """The only stream of the prompt that a variant computes: "bidir" or "causal"."""
    return ONE_STREAM.get(provider.removesuffix("]").partition("[")[2])


def _like_sdpa(rows: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    """[B * n, H, D] as a view [B, H, n, D]."""
    return rows.unflatten(0, (o.shape[0], -1)).transpose(1, 2)


def lengths_of(batch: int, length: int, mode: str, ragged: bool) -> tuple[list[int], list[int]]:
    """Prompt and answer rows of each sample; ragged: the longest prompt is ``length``, others an eighth and more."""
    generator = random.Random(0)
    prompts = [generator.randint(max(1, length // 8), length) if ragged and i else length for i in range(batch)]
    return prompts, [1 if mode == "prefill" else max(1, n // 4) for n in prompts]


def rows_of(facts: dict, case: Attention, times: dict[str, Timing], checks: dict, memory: dict) -> list[dict]:
    """One CSV row per provider."""
    peers = [n for n in times if n not in OWN and "[" not in n]
    best = min(peers, key=lambda n: times[n].quantile(0.5), default=None)
    rows = []
    for name, t in times.items():
        seconds, flops, size = t.quantile(0.5), case.useful_flops(name), case.floor_bytes(name)
        floor = None
        if facts["measured_tflops"] != "":
            floor = max(flops / facts["measured_tflops"], size / facts["measured_tb_per_s"]) / 1e12
        one_stream = times.get(f"{name.partition('[')[0]}[one-stream]")
        values = (
            name,
            t.rounds,
            *milliseconds(t),
            "" if t.host is None else round(t.host * 1e3, 4),
            round(flops / 1e9, 6),
            round(flops / seconds / 1e12, 6),
            round(size / 2**20, 6),
            "" if floor is None else round(floor * 1e3, 6),
            "" if floor is None else round(seconds / floor, 3),
            best or "",
            "" if best is None else round(times[best].ratio(t), 4),
            "" if one_stream is None else round(t.ratio(one_stream), 4),
            "" if memory[name] is None else round(memory[name], 1),
            worst_error(checks[name]),
        )
        rows.append(facts | dict(zip(TIME_FIELDS, values, strict=True)) | checks[name])
    return rows


COLUMNS = (
    ("mode", 10),
    ("shape", 15),
    ("heads", 10),
    ("provider", 18),
    ("p20 ms", 9),
    ("p50 ms", 9),
    ("p80 ms", 9),
    ("host ms", 7),
    ("TFLOP/s", 8),
    ("x peer", 6),
    ("x floor", 7),
    ("x one", 6),
    ("MiB", 6),
    ("error", 7),
)
LEGEND = """\
host ms: of the host alone, to enqueue a call; where it is longer than the device's, that is what a lone call takes.
x peer: speed over the fastest peer of that shape.  x floor: time over the larger of useful FLOPs and fewest bytes at
the rates measured above.  x one: cost in one-stream passes of the same backend.  MiB: peak above what was there."""


def table_head() -> str:
    return f"{LEGEND}\n\n{_line([name for name, _ in COLUMNS])}"


def table_line(row: dict) -> str:
    def number(key, digits):
        return "n/a" if row[key] == "" else f"{row[key]:.{digits}f}"

    shape = f"{row['batch']} x {row['length']}{' ragged' if row['ragged'] else ''}"
    cells = [row["mode"], shape, f"{row['heads_q']}/{row['heads_kv']}x{row['head_dim']}", row["provider"]]
    cells += [number(q, 3) for q in ("p20_ms", "p50_ms", "p80_ms", "host_ms")] + [f"{row['useful_tflops']:.4g}"]
    cells += [number(key, 2) for key in ("speedup_over_best_peer", "time_over_floor", "cost_in_one_stream_passes")]
    return _line([*cells, number("peak_mib", 0), f"{row['error']:.1e}"])


def _line(cells: Sequence[str]) -> str:
    words = ("mode", "shape", "heads", "provider")
    aligned = (
        cell.ljust(width) if name in words else cell.rjust(width)
        for cell, (name, width) in zip(cells, COLUMNS, strict=True)
    )
    return "  ".join(aligned).rstrip()


def draw(path, rows: Sequence[dict], title: str) -> None:
    """Throughput over prompt length at the largest batch of equal lengths; a row per mode, a column per head dim."""
    rows = [r for r in rows if not r["ragged"]] or rows
    modes = [m for m in MODES if any(r["mode"] == m for r in rows)]
    dims = sorted({r["head_dim"] for r in rows})
    names = list(dict.fromkeys(r["provider"] for r in rows))
    figure = matplotlib.figure.Figure(figsize=(2 + 4 * len(dims), 1 + 2.6 * len(modes)), layout="constrained")
    grid = figure.subplots(len(modes), len(dims), squeeze=False)
    lines = {}
    for mode, line_of_axes in zip(modes, grid, strict=True):
        for dim, axes in zip(dims, line_of_axes, strict=True):
            for i, name in enumerate(names):
                found = [r for r in rows if (r["mode"], r["head_dim"], r["provider"]) == (mode, dim, name)]
                points = {r["length"]: r["useful_tflops"] for r in sorted(found, key=lambda r: r["batch"])}
                if points:
                    x = sorted(points)
                    lines[name] = axes.plot(x, [points[n] for n in x], marker="o", markersize=3, color=f"C{i}")[0]
            axes.set_xscale("log", base=2)
            axes.set_ylim(0, 1.08 * axes.dataLim.y1)
            axes.set_title(f"{mode}, head_dim {dim}", fontsize=8)
            axes.tick_params(labelsize=7)
    for axes in grid[-1]:
        axes.set_xlabel("prompt rows per sample", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("useful TFLOP/s (higher is better)", fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=150)


def choose_providers(p: argparse.ArgumentParser, args, machine: Machine, heads) -> tuple[list[str], list[str]]:
    """What is timed, and a note on each provider that isn't."""
    reasons = {}
    for head_dim in sorted({h[2] for h in heads}):
        facts = {"device": machine.device, "dtype": machine.dtype, "head_dim": head_dim, "head_dim_v": head_dim}
        for name, reason in reasons_against(**facts, requires_grad="backward" in args.modes).items():
            # who can run one of the head dims is asked for all of them, and says no where it must
            reasons[name] = None if reason is None else reasons.get(name, reason)
    kind = machine.device.type
    reasons["sdpa-flash"] = None
    reasons["varlen"] = reasons["flash"]
    reasons |= dict.fromkeys(args.without, "--without")
    reasons["sdpa-cudnn"] = None if kind == "cuda" else f"cuDNN's attention needs a CUDA device, got {kind}"
    names = check_names(p, "providers", args.providers or [], reasons)
    if missing := [n for n in names if reasons[n]]:
        p.error(f"--providers: {missing[0]} can't run here: {reasons[missing[0]]}")
    if names:
        return names, []
    other = {
        "sdpa": "its calls are those of sdpa-flash and sdpa-cudnn" if kind == "cuda" else None,
        "sdpa-flash": "sdpa runs the same kernel on a CPU" if kind == "cpu" else None,
        "flash": None if flash.PACKAGE else "without the package flash-attn its calls are those of varlen",
    }
    order = [*OWN, "sdpa-flash", "sdpa-cudnn", "varlen", "flash", "flex", "sdpa", "reference"]
    why = {n: reasons[n] or other.get(n) or (not_usual(n, machine.device) if n in reasons else None) for n in order}
    return [n for n in order if why[n] is None], [f"left out: {n}: {why[n]}" for n in order if why[n] is not None]


def heads_of(text: str) -> tuple[int, int, int]:
    try:
        heads_q, heads_kv, head_dim = (int(x) for x in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected three numbers as 32,8,128, got {text!r}") from None
    if min(heads_q, heads_kv, head_dim) < 1 or heads_q % heads_kv:
        raise argparse.ArgumentTypeError(f"expected query heads a multiple of key/value heads, got {text!r}")
    return heads_q, heads_kv, head_dim


def shapes_of(args, on_cpu: bool) -> list[tuple]:
    """(batch, length, mode, ragged, heads_q, heads_kv, head_dim), the most telling ones first."""
    if args.heads:
        plans = [(heads, args.lengths or LENGTHS) for heads in args.heads]
    elif on_cpu:
        plans = [((4, 2, 32), args.lengths or (32, 64))]
    else:
        plans = [(MAIN_HEADS, args.lengths or ((256, 2048) if args.quick else LENGTHS))]
        plans += [(heads, args.lengths or FEWER_LENGTHS) for heads in OTHER_HEADS if not args.quick]
    tokens = args.tokens or (128 if on_cpu else 16384)
    shapes = []
    for heads, lengths in plans:
        for length in lengths:
            filled = max(1, min(64, tokens // length))
            batches = args.batch_sizes or {filled, *([1] if heads == MAIN_HEADS and length <= 1024 else [])}
            for batch in sorted(batches):
                # different lengths tell the same story at every length, so they are sampled
                many = batch > 1 and (length in (64, 256, 1024, 4096) or args.lengths is not None)
                kinds = [False] * ("equal" in args.only) + [True] * ("ragged" in args.only and many)
                shapes += [(batch, length, mode, ragged, *heads) for ragged in kinds for mode in args.modes]
    return shapes


def parse(argv: list[str] | None):
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_run_options(
        p,
        "cuda, triton, sdpa-flash, sdpa-cudnn, varlen, flash, flex, sdpa, reference; default: what can run here but "
        "the last two, on a CPU sdpa",
        seconds=0.3,
        min_rounds=5,
        warmup=2,
    )
    p.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    p.add_argument(
        "--lengths", type=int, nargs="+", metavar="N", help="prompt rows; default: 64 to 16384, on a CPU less"
    )
    p.add_argument("--batch-sizes", type=int, nargs="+", metavar="B", help="default: what --tokens allows, at most 64")
    p.add_argument("--tokens", type=int, help="prompt rows of a batch (default: 16384, on a CPU 128)")
    p.add_argument("--heads", type=heads_of, nargs="+", metavar="Q,KV,DIM", help="default: 32,8,128 16,16,64 8,1,256")
    p.add_argument("--only", nargs="+", choices=("equal", "ragged"), default=["equal", "ragged"], help="default: both")
    p.add_argument("--quick", action="store_true", help="two lengths, one kind of heads")
    add_sweep_options(p, "8")
    p.set_defaults(minutes=8)
    args = p.parse_args(argv)
    check_minutes(p, args)
    check_at_least(p, args, lengths=1, batch_sizes=1, tokens=1)
    machine = check_machine(p, args)
    shapes = shapes_of(args, machine.device.type == "cpu")
    if not shapes:
        p.error("--only: ragged batches need more than one sample")
    args.providers, notes = choose_providers(p, args, machine, [shape[4:] for shape in shapes])
    return args, machine, shapes, notes


def main(argv: list[str] | None = None) -> int:
    start = time.perf_counter()
    args, machine, shapes, notes = parse(argv)
    # FlexAttention's compiled backward would free the graph that is kept for timing.
    torch._functorch.config.donated_buffer = False
    facts = provenance(machine.device) | {
        "benchmark": "attention",
        "dtype": machine.dtype_name,
        "warmup": args.warmup,
    }
    fields = [*facts, *PEAK_FIELDS, *CASE_FIELDS, *TIME_FIELDS]
    fields += [f"{kind}_{name}" for kind in ("error", "bound") for name in OUTPUTS]
    with exits("attention"):
        results = Results(args.out / "attention.csv", fields)
    title = f"{machine.dtype_name}, {machine_name(facts)}"
    print(EXPLANATION)
    print(f"{len(shapes)} shapes in {title}")
    for note in notes:
        print(note)
    facts |= measured_peaks(machine.device, machine.dtype)
    if facts["measured_tflops"] != "":
        print(
            f"measured here: {facts['measured_tflops']} TFLOP/s in a matrix product of 8192^3 and "
            f"{facts['measured_tb_per_s']} TB/s in a copy of 1 GiB"
        )
    table = Table(table_head, lambda rows: [table_line(row) for row in rows], rows_of, draw)
    make_case, heading = partial(Attention, machine), f"attention: {title}"
    right = measure(shapes, make_case, machine, args, results, facts, start, heading, table)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
