"""The tables of docs/performance.md and README.md, from the rows in benchmarks/results/, held to them by a test.

Rows of a changed tree are left out, and but for the tables of GPUs those of other models than ``small``, whole where
time is measured, and those in bfloat16 of a CPU that emulates it. A line is the newest run of its shape that has all
providers of the table, whose commit it names; ranges are over all runs of that shape.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from bitune_kernels.backends import OWN

RESULTS = Path(__file__).parent / "results"
ONE_PASS, PACKED = "one-pass[sdpa]", "lora-packed[sdpa]"


# Rows of before results said what a CPU can do are of one kind.
CPUS = {"AMD EPYC": "AVX2", "AMD EPYC, AVX512, bfloat16": "AVX512"}


def clean(benchmark: str) -> list[dict[str, str]]:
    """Without the rows of a changed tree; "cpu" is the GPU where there was one."""
    with (RESULTS / f"{benchmark}.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["git_dirty"] == "0"]
    return [row | {"cpu": row["gpu"] or CPUS.get(row["cpu"], row["cpu"])} for row in rows]


def read(benchmark: str) -> list[dict[str, str]]:
    rows = [row for row in clean(benchmark) if row.get("model", "small") == "small"]
    return [row for row in rows if (row["cpu"], row.get("dtype")) != ("AVX2", "bfloat16")]


def whole(benchmark: str) -> list[dict[str, str]]:
    """``read`` without the rows of a model that was cut to its first layers."""
    return [row for row in read(benchmark) if row["layers"] == "12"]


def runs(rows: Iterable[dict], *shape: str) -> dict[tuple, list[dict[str, dict]]]:
    """Per shape, the values of these columns, its runs from old to new: provider -> row."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        same = found.setdefault(tuple(row[name] for name in shape), {})
        same.setdefault(row["timestamp_utc"], {})[row["provider"]] = row
    return {shape: list(by_time.values()) for shape, by_time in found.items()}


def newest(found: list[dict[str, dict]], providers: Iterable[str]) -> dict[str, dict] | None:
    return next((run for run in reversed(found) if set(providers) <= set(run)), None)


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    table = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def number(row: dict, column: str, digits: int = 2, scale: float = 1.0) -> str:
    return f"{float(row[column]) * scale:.{digits}f}"


def in_packed_lora(row: dict) -> str:
    return f"{number(row, 'cost_in_lora_packed_passes')} ({number(row, 'floor_packed_linear')})"


def commit(row: dict) -> str:
    return f"`{row['git_sha'][:7]}`"


def faster(run: dict[str, dict], *others: str) -> float:
    """How many times faster one pass is than the fastest of the others, from the medians of ratios round by round."""

    def cost(row: dict) -> float:
        if "three-pass" in run:
            return 1 / float(row["speedup_over_three_pass"])
        return float(row["cost_in_lora_packed_passes"])

    return min(cost(run[name]) for name in others if name in run) / cost(run[ONE_PASS])


def span(values: Sequence[float]) -> str:
    low, high = (f"{x:.2f}" for x in (min(values), max(values)))
    return f"{low} to {high} ({len(values)})" if len(values) > 1 else f"{low} (1)"


def in_order(found: dict[tuple, list]) -> list[tuple[tuple, list]]:
    """By CPU, the newer one first, dtype and size."""
    return sorted(
        found.items(), key=lambda item: (item[0][0] == "AVX2", item[0][1], *(int(x) for x in item[0] if x.isdigit()))
    )


def prefill() -> str:
    needed = ("three-pass", ONE_PASS, PACKED, "lora")
    lines = []
    for (cpu, dtype, batch, length), found in in_order(runs(whole("prefill"), "cpu", "dtype", "batch", "length")):
        run = newest(found, needed)
        if run is None:
            continue
        one = run[ONE_PASS]
        alone = run.get("authors-schedule", run["three-pass"])  # the same for one prompt
        times = (number(row, "p50_ms", 0) for row in (run["three-pass"], alone, one))
        every = [faster(r, "three-pass") for r in found if "three-pass" in r]
        packed = in_packed_lora(one)
        ratios = (f"{faster(run, 'three-pass', 'authors-schedule'):.2f}", span(every), packed)
        where = [f"{cpu}, {dtype}", f"{batch} x {length}"]
        lines.append([*where, *times, *ratios, number(one, "cost_in_lora_passes"), commit(one)])
    head = ["CPU, dtype", "prompts", "three passes, padded: ms", "one by one: ms", "one pass: ms"]
    head += ["faster than the better", "than padded, all runs", "packed LoRA = 1 (floor)", "padded LoRA = 1", "commit"]
    return markdown(head, lines)


SCHEDULES = {
    ONE_PASS: "one pass",
    "one-pass+peft[sdpa]": "one pass with PEFT's LoRA layers",
    "authors-schedule": "authors' schedule: three passes, sample by sample",
    "three-pass": "three passes over the padded batch",
    PACKED: "packed LoRA",
    "lora": "padded LoRA",
}


def updates() -> dict[tuple, dict[str, dict]]:
    """(CPU, dtype, batch, length) -> the newest run of that update of the paper's."""
    found = in_order(runs(whole("train_step"), "cpu", "dtype", "batch", "length"))
    chosen = {shape: newest(same, (ONE_PASS, "authors-schedule", PACKED)) for shape, same in found}
    return {shape: run for shape, run in chosen.items() if run is not None}


def train_step() -> str:
    lines = []
    for (cpu, dtype, batch, length), run in updates().items():
        for name in SCHEDULES.keys() & run.keys():
            row = run[name]
            packed = in_packed_lora(row) if name == ONE_PASS else number(row, "cost_in_lora_packed_passes")
            memory = number(row, "memory_over_lora_packed")
            shape = f"{cpu}, {dtype}, {batch} x {length}"
            lines.append([shape, SCHEDULES[name], number(row, "p50_ms", 1, 1e-3), packed, memory, commit(row)])
    order = list(SCHEDULES.values())
    shapes = list(dict.fromkeys(line[0] for line in lines))
    lines.sort(key=lambda line: (shapes.index(line[0]), order.index(line[1])))
    return markdown(
        ["CPU, dtype, update", "schedule", "s", "packed LoRA = 1 (floor)", "memory, packed LoRA = 1", "commit"], lines
    )


def linear() -> str:
    lines = []
    shapes = runs(read("lora"), "cpu", "dtype", "rows", "features", "adapter_dtype")
    for (cpu, dtype, rows, features, adapters), found in in_order(shapes):
        row = found[-1]["segment"]
        lines.append([f"{cpu}, {dtype}", adapters, rows, features, number(row, "speedup_over_peft"), commit(row)])
    return markdown(["CPU, dtype", "adapters", "rows", "features", "faster than PEFT's", "commit"], lines)


def request() -> str:
    lines = []
    shapes = runs(whole("generate"), "cpu", "dtype", "batch", "prompt", "new")
    for (cpu, dtype, batch, prompt, new), found in in_order(shapes):
        row = found[-1]["bitune"]
        costs = (number(row, f"cost_of_{part}") for part in ("first", "decoding", "request"))
        lines.append([f"{cpu}, {dtype}", f"{batch} x {prompt} + {new}", *costs, commit(row)])
    return markdown(["CPU, dtype", "prompts + new tokens", "first token", "decoding", "request", "commit"], lines)


def choices() -> str:
    lines = []
    for (prompt, number_of, answer), found in runs(whole("choices"), "prompt", "choices", "answer").items():
        row = found[-1]["one-pass"]
        ratios = (number(row, column) for column in ("speedup_over_one_by_one", "fewer_rows", "cost_in_lora"))
        lines.append([prompt, f"{number_of} x {answer}", *ratios, commit(row)])
    head = ["prompt", "choices", "faster than a pass for each", "fewer rows", "padded LoRA over all = 1", "commit"]
    return markdown(head, lines)


def memory_runs() -> dict[str, dict[str, dict]]:
    """Prompt length -> provider -> row."""
    needed = ("one-pass", "one-pass+whole-mlp", "three-pass", "lora-packed", "lora")
    found = {length: newest(same, needed) for (length,), same in runs(read("memory"), "length").items()}
    return {length: run for length, run in found.items() if run is not None}


def over_packed(run: dict[str, dict]) -> float:
    return float(run["one-pass"]["step_mib"]) / float(run["lora-packed"]["step_mib"])


def memory() -> str:
    lines = []
    for length, run in memory_runs().items():
        names = ("one-pass", "one-pass+whole-mlp", "three-pass", "lora-packed", "lora")
        kib = (number(run[name], "bytes_per_token", 1, 1 / 1024) for name in names)
        one = run["one-pass"]
        lines.append([length, *kib, number(one, "over_floor"), f"{over_packed(run):.2f}", commit(one)])
    head = ["prompt", "one pass", "MLPs over all rows at once", "three passes", "packed LoRA", "LoRA"]
    return markdown([*head, "one pass, floor = 1", "packed LoRA = 1", "commit"], lines)


SUMMARY = [("AVX512", "bfloat16"), ("AVX2", "float32")]


def summary() -> str:
    """Of README.md."""
    lines = []
    for (cpu, dtype, batch, length), found in in_order(runs(whole("prefill"), "cpu", "dtype", "batch", "length")):
        run = newest(found, ("three-pass", ONE_PASS, PACKED))
        if run is not None and (cpu, dtype) in SUMMARY:
            one = run[ONE_PASS]
            cost = in_packed_lora(one)
            what = "1 prompt of" if batch == "1" else f"{batch} prompts of up to"
            over = (faster(run, name) for name in ("three-pass", "authors-schedule") if name in run)
            against = ", ".join(f"{x:.2f}" for x in over)
            lines.append([f"{cpu}, {dtype}", f"prefill, {what} {length} tokens", against, cost])
    for (cpu, dtype, batch, length), run in updates().items():
        one = run[ONE_PASS]
        cost = in_packed_lora(one)
        over = (f"{faster(run, name):.2f}" for name in ("three-pass", "authors-schedule"))
        what = f"training step, {batch} samples of up to {length} tokens"
        lines.append([f"{cpu}, {dtype}", what, ", ".join(over), cost])
    head = [
        "CPU, dtype",
        "one pass",
        "times faster than three passes: padded, one by one",
        "its time, packed LoRA = 1 (floor)",
    ]
    return markdown(head, lines)


# of GPUs, empty without rows of one

CHECKS = ("first", "tests", "operators", "repeats", "sanitizer", "large")


def on_gpu(benchmark: str) -> list[dict[str, str]]:
    return [row for row in clean(benchmark) if row["gpu"]] if (RESULTS / f"{benchmark}.csv").is_file() else []


def optional(row: dict, column: str, digits: int = 2, scale: float = 1.0) -> str:
    return "" if row[column] == "" else number(row, column, digits, scale)


def gpu_hardware() -> str:
    """The newest outcome of each stage of gpu_check.py, with its commit."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in on_gpu("gpu_check"):
        if row["backend"] and row["state"] != "skipped":
            found.setdefault((row["gpu"], row["backend"]), {})[row["stage"]] = row
    lines = []
    for (gpu, backend), last in found.items():
        cells = []
        for stage in CHECKS:
            # of one commit: tools and parts of the stage that another one has passed say nothing about this one
            rows = [row for label, row in last.items() if label.split("-")[0] == stage]
            rows = [row for row in rows if row["git_sha"] == max(rows, key=lambda row: row["timestamp_utc"])["git_sha"]]
            passed = sum(row["state"] == "passed" for row in rows)
            said = "passed" if passed == len(rows) else "failed" if not passed else f"{passed} of {len(rows)} passed"
            cells.append(f"{said} {commit(rows[0])}" if rows else "not run")
        newest_row = max(last.values(), key=lambda row: row["timestamp_utc"])
        versions = "CUDA {cuda}, driver {driver}, torch {torch}, triton {triton}".format(**newest_row)
        lines.append([gpu, f"`{backend}`", *cells, versions])
    return markdown(["GPU", "backend", *CHECKS, "versions, at last"], lines) if lines else ""


def gpu_attention() -> str:
    """TFLOP/s of each provider, one operator call; the fastest of ours over the fastest peer, and over its floor."""
    rows = [row for row in on_gpu("attention") if "[" not in row["provider"]]
    names = list(dict.fromkeys([*OWN, *(row["provider"] for row in rows)]))
    shapes = runs(rows, "gpu", "dtype", "mode", "heads_q", "heads_kv", "head_dim", "batch", "length", "ragged")
    lines = []
    for (gpu, dtype, mode, heads_q, heads_kv, dim, batch, length, ragged), found in shapes.items():
        run = next((run for run in reversed(found) if not run.keys().isdisjoint(OWN)), None)
        if run is None:
            continue
        best = max((run[x] for x in OWN if x in run), key=lambda row: float(row["useful_tflops"]))
        each = (number(run[x], "useful_tflops", 0) if x in run else "" for x in names)
        shape = f"{batch} x {length}" + (" ragged" if ragged == "1" else "")
        ratios = optional(best, "speedup_over_best_peer"), optional(best, "time_over_floor")
        lines.append([f"{gpu}, {dtype}", mode, f"{heads_q}/{heads_kv} x {dim}", shape, *each, *ratios, commit(best)])
    head = ["GPU, dtype", "mode", "heads x dim", "prompts", *names, "ours over the best peer", "floor = 1", "commit"]
    return markdown(head, lines) if lines else ""


def gpu_models(benchmark: str) -> str:
    """Every provider of the newest run of each shape that has one pass."""
    lines = []
    shapes = runs(on_gpu(benchmark), "gpu", "dtype", "model", "layers", "batch", "length")
    for (gpu, dtype, model, layers, batch, length), found in shapes.items():
        run = next((run for run in reversed(found) if any(name.startswith("one-pass[") for name in run)), {})
        for name, row in run.items():
            own = name.startswith("one-pass")
            lora, packed = (optional(row, f"cost_in_{unit}_passes") for unit in ("lora", "lora_packed"))
            lora += f" ({number(row, 'floor_linear')})" if own and lora else ""
            packed += f" ({number(row, 'floor_packed_linear')})" if own and packed else ""
            cells = number(row, "p50_ms", 1), optional(row, "speedup_over_three_pass"), lora, packed
            cells = *cells, optional(row, "utilisation"), optional(row, "peak_mib", 1, 1 / 1024)
            where = [f"{gpu}, {dtype}", f"{model}, {layers} layers", f"{batch} x {length}", f"`{name}`"]
            lines.append([*where, *cells, commit(row)])
    head = ["GPU, dtype", "model", "batch x length", "provider", "ms", "faster than three passes, padded"]
    head += ["padded LoRA = 1 (FLOPs)", "packed LoRA = 1 (floor)", "MFU", "peak GiB", "commit"]
    return markdown(head, lines) if lines else ""


def gpu_request() -> str:
    lines = []
    for (gpu, dtype, model, batch, prompt, new), found in runs(
        on_gpu("generate"), "gpu", "dtype", "model", "batch", "prompt", "new"
    ).items():
        run = newest(found, ("bitune",))
        if run is not None:
            row = run["bitune"]
            costs = (optional(row, f"cost_of_{part}") for part in ("first", "decoding", "request"))
            shape = [f"{gpu}, {dtype}", model, f"{batch} x {prompt} + {new}", number(row, "first_ms", 1)]
            lines.append([*shape, *costs, commit(row)])
    head = [
        "GPU, dtype",
        "model",
        "prompts + new tokens",
        "first token: ms",
        "padded LoRA = 1: first token",
        "decoding",
    ]
    return markdown([*head, "request", "commit"], lines) if lines else ""


GPU_TABLES: dict[str, Callable[[], str]] = {
    "hardware": gpu_hardware,
    "attention": gpu_attention,
    "prefill on a GPU": partial(gpu_models, "prefill"),
    "train_step on a GPU": partial(gpu_models, "train_step"),
    "generate on a GPU": gpu_request,
}

TABLES: dict[str, Callable[[], str]] = {
    "prefill": prefill,
    "train_step": train_step,
    "lora": linear,
    "generate": request,
    "choices": choices,
    "memory": memory,
    "README": summary,
}


def main(argv: list[str] | None = None) -> None:
    options = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    argparse.ArgumentParser(**options).parse_args(argv)
    for name, table in (TABLES | GPU_TABLES).items():
        if text := table():
            print(f"{name}\n\n{text}\n")


if __name__ == "__main__":
    main()
