"""Rows of CSV, lines of a table, a plot."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure
import torch

from bitune_kernels.testing.timing import Timing

from .floor import Floor
from .memory import Memory
from .models import DEFAULT_MODEL

# The paper's schedule of three passes: over the padded batch, and sample by sample as its authors run it.
THREE_PASS = ("three-pass", "authors-schedule")


class Column(NamedTuple):
    """One of the table on the terminal.

    Attributes:
        needs: the provider without which no row has anything here, its backend aside; "gpu" for what a CPU lacks.
        meaning: what the legend says.
    """

    name: str
    width: int
    cell: Callable[[dict], str]
    needs: str = ""
    meaning: str = ""


def _number(key: str, digits: int = 2) -> Callable[[dict], str]:
    return lambda row: "n/a" if row[key] == "" else f"{row[key]:.{digits}f}"


def _flops(row: dict) -> str:
    if row["provider"] == "lora":  # the unit
        return ""
    if row["provider"].startswith("lora-packed"):
        return f"{row['floor_linear'] / row['floor_packed_linear']:.2f}"
    return f"{row['floor_linear']:.2f}"


def _floor(row: dict) -> str:
    return "" if row["provider"].startswith("lora") else f"{row['floor_packed_linear']:.2f}"


COLUMNS = (
    Column("batch", 5, lambda row: str(row["batch"])),
    Column("length", 6, lambda row: str(row["length"])),
    Column("provider", 19, lambda row: row["provider"]),
    Column("tokens/s", 9, _number("tokens_per_s", 0)),
    Column("TFLOP/s", 7, _number("useful_tflops", 1), "gpu", "of the FLOPs that a method needs for the real tokens"),
    Column("MFU", 4, _number("utilisation"), "gpu", "those over a large matrix product's"),
    Column("p20 ms", 8, _number("p20_ms", 1)),
    Column("p50 ms", 8, _number("p50_ms", 1)),
    Column("p80 ms", 8, _number("p80_ms", 1)),
    Column(
        "speedup",
        7,
        _number("speedup"),
        "three-pass",
        f"over the faster of {' and '.join(THREE_PASS)}, which has 1.00",
    ),
    Column("x LoRA", 6, _number("cost_in_lora_passes"), "lora", "in plain LoRA passes"),
    Column("FLOPs", 5, _flops, "lora", "the same in FLOPs of linear layers: LoRA's padding and last layer are counted"),
    Column("x packed", 8, _number("cost_in_lora_packed_passes"), "lora-packed", "in those of lora-packed"),
    Column(
        "floor",
        5,
        _floor,
        "lora-packed",
        "the same in FLOPs of linear layers; less where both are bound by overhead or memory",
    ),
    Column("MiB", 6, _number("step_mib", 0), "", "peak of a pass without the weights"),
    Column("x LoRA", 6, _number("memory_over_lora"), "lora"),
    Column("x packed", 8, _number("memory_over_lora_packed"), "lora-packed"),
    Column("error", 7, lambda row: f"{row['error']:.1e}", "", "of the worst output, relative, against float32"),
)


def whole_model(providers: Sequence[str], device: torch.device) -> Table:
    """The table of a run with these providers, without the columns that none of them could fill."""
    there = {name.partition("[")[0] for name in providers} | ({"gpu"} if device.type == "cuda" else set())
    columns = [c for c in COLUMNS if not c.needs or c.needs in there]

    def line(cells: Sequence[str]) -> str:
        pairs = zip(cells, columns, strict=True)
        return "  ".join(x.ljust(c.width) if c.name == "provider" else x.rjust(c.width) for x, c in pairs).rstrip()

    def head() -> str:
        legend = "\n".join(f"{c.name:<8}  {c.meaning}" for c in columns if c.meaning)
        return f"{legend}\n\n{line([c.name for c in columns])}"

    def lines(rows: Sequence[dict]) -> list[str]:
        fastest = max((r["speedup_over_three_pass"] for r in rows if r["provider"] in THREE_PASS), default="")
        found = []
        for row in rows:
            speedup = "" if fastest == "" else row["speedup_over_three_pass"] / fastest
            found.append(line([c.cell(row | {"speedup": speedup}) for c in columns]))
        return found

    return Table(head, lines, measurements, plot)


CASE_FIELDS = (
    "batch",
    "length",
    "tokens",
    "padding",
    "floor_rows",
    "floor_linear",
    "floor_attention",
    "floor_packed_linear",
    "floor_packed_attention",
    "floor_flops",
)
TIME_FIELDS = (
    "provider",
    "rounds",
    "tokens_per_s",
    "useful_tflops",
    "utilisation",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "speedup_over_three_pass",
    "cost_in_lora_passes",
    "cost_in_lora_packed_passes",
    "peak_mib",
    "step_mib",
    "memory_over_lora",
    "memory_over_lora_packed",
    "error",
)


def measurements(
    facts: dict, case, times: dict[str, Timing], checks: dict[str, dict], memory: dict[str, Memory]
) -> list[dict]:
    """One CSV row per provider: ``facts``, which all share, ``TIME_FIELDS``, and ``checks`` of the provider."""
    three, lora = times.get("three-pass"), times.get("lora")
    medians = {name: t.quantile(0.5) for name, t in times.items()}
    steps = {name: m.step for name, m in memory.items()}
    rows = []
    for name, t in times.items():
        packed = packed_unit(name, medians)
        values = (
            name,
            t.rounds,
            round(case.tokens / t.quantile(0.5), 2),
            *utilisation(name, case.floor, t, facts["measured_tflops"]),
            *milliseconds(t),
            "" if three is None else round(three.ratio(t), 4),
            "" if lora is None else round(t.ratio(lora), 4),
            "" if packed is None else round(t.ratio(times[packed]), 4),
            "" if memory[name].peak is None else round(memory[name].peak, 1),
            *memory_columns(name, steps, packed).values(),
            worst_error(checks[name]),
        )
        rows.append(facts | dict(zip(TIME_FIELDS, values, strict=True)) | checks[name])
    return rows


def utilisation(name: str, floor: Floor, t: Timing, peak: float | str) -> list[float | str]:
    """TFLOP/s, FLOPs counted that the provider's method needs for the real tokens, and their share of the measured
    ``peak``: padding that a schedule computes is no use, and the two LoRA need the same.

    "" where they aren't known: of the single-stream variants, and of a CPU the peak.
    """
    methods = dict.fromkeys(("lora", "lora-packed"), floor.packed_attention)
    methods |= dict.fromkeys((*THREE_PASS, "one-pass", "one-pass+peft"), 1)
    method = methods.get(name.partition("[")[0])
    if method is None:
        return ["", ""]
    tflops = floor.flops / method / t.quantile(0.5) / 1e12
    return [round(tflops, 6), "" if peak == "" else round(tflops / peak, 4)]


def packed_unit(name: str, costs: dict[str, float]) -> str | None:
    """The lora-packed provider that ``name`` is set against: on its own backend, or else the cheapest one."""
    packed = [n for n in costs if n.startswith("lora-packed[")]
    same = f"lora-packed[{name.partition('[')[2]}"
    return same if same in packed else min(packed, key=costs.get, default=None)


def memory_columns(name: str, steps: dict[str, float], packed: str | None) -> dict[str, float | str]:
    """The columns on memory: MiB of a provider's step, and that over the steps of lora and of ``packed``."""
    units = {"memory_over_lora": "lora", "memory_over_lora_packed": packed}
    ratios = {field: round(steps[name] / steps[unit], 4) if unit in steps else "" for field, unit in units.items()}
    return {"step_mib": round(steps[name], 3)} | ratios


def milliseconds(t: Timing) -> list[float]:
    """p20, p50 and p80."""
    return [round(t.quantile(q) * 1e3, 4) for q in (0.2, 0.5, 0.8)]


def worst_error(checks: dict[str, float]) -> float:
    return max(value for what, value in checks.items() if what.startswith("error_"))


class Table(NamedTuple):
    """How a benchmark shows what it measured.

    Attributes:
        head: () -> the text above the table.
        lines: rows of a shape, as in the CSV file -> lines of the table.
        rows: (facts, case, times, checks, memory) -> rows of the CSV file.
        draw: (path, rows, title) -> why there is no plot, or None.
    """

    head: Callable[[], str]
    lines: Callable[[list[dict]], list[str]]
    rows: Callable[..., list[dict]]
    draw: Callable[..., str | None]


class Results:
    """The CSV file that every run appends to."""

    def __init__(self, path: Path, fields: Sequence[str]):
        self.path, self.fields, self.rows = path, list(fields), []
        path.parent.mkdir(parents=True, exist_ok=True)  # an error here, not behind the first measurement
        if path.is_file():
            with path.open(newline="") as file:
                found = next(csv.reader(file), None)
            if found is not None and found != self.fields:
                raise ValueError(f"{path}: has other columns than this version writes; move it away")
            whole, _, cut = path.read_bytes().rpartition(b"\n")
            if whole and cut:  # a row that a kill has cut off would swallow the next one
                path.write_bytes(whole + b"\n")

    def append(self, rows: Sequence[dict]) -> None:
        new = not self.path.is_file() or self.path.stat().st_size == 0
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.fields)
            if new:
                writer.writeheader()
            writer.writerows(rows)
        self.rows += rows


# Provider that is the unit, column of the cost in it, column of the same in FLOPs of linear layers, what that is to a
# pass (padded LoRA wastes FLOPs, so no floor), the line it gets, what a pass of the unit is.
UNITS = (
    ("lora", "cost_in_lora_passes", "floor_linear", "ratio of FLOPs", "dotted", "plain LoRA passes"),
    ("lora-packed", "cost_in_lora_packed_passes", "floor_packed_linear", "floor", "dashed", "packed LoRA passes"),
)


def plot(path: Path, rows: Sequence[dict], title: str) -> str | None:
    """Cost of each provider in plain LoRA passes, padded and packed, grouped by shape, and one pass's in FLOPs.

    Returns why nothing was drawn, or None.
    """
    units = [unit for unit in UNITS if any(row[unit[1]] != "" for row in rows)]
    if not units:
        return "it shows costs in LoRA passes, and no LoRA was among the providers"
    shapes = list(dict.fromkeys((row["batch"], row["length"]) for row in rows))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    width = max(6.0, 2 + 0.6 * len(shapes) * len(names))
    figure = matplotlib.figure.Figure(figsize=(width * len(units), 4), layout="constrained")
    for axes, unit in zip(figure.subplots(1, len(units), squeeze=False)[0], units, strict=True):
        _bars(axes, rows, shapes, names, *unit)
    figure.suptitle(title, fontsize=9)
    legend = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)


def _bars(axes, rows: Sequence[dict], shapes: list, names: list[str], unit, cost, flops, what, style, passes) -> None:
    shown = [name for name in names if name.partition("[")[0] != unit]
    width = 0.8 / max(1, len(shown))
    for i, name in enumerate(shown):
        bars = [(shapes.index((r["batch"], r["length"])), r[cost]) for r in rows if r["provider"] == name]
        bars = [(place, value) for place, value in bars if value != ""]
        x = [place - 0.4 + width * (i + 0.5) for place, _ in bars]
        drawn = axes.bar(x, [value for _, value in bars], width * 0.92, label=name, color=f"C{names.index(name)}")
        axes.bar_label(drawn, fmt="%.2f", fontsize=7)
    ratios = {(r["batch"], r["length"]): r[flops] for r in rows}
    for place, shape in enumerate(shapes):
        label = f"{what} (linear layers)" if place == 0 else None
        ends = place - 0.45, place + 0.45
        axes.plot(ends, [ratios[shape]] * 2, color="black", linestyle=style, label=label)
    axes.set_xticks(range(len(shapes)), [f"{batch} x {length}" for batch, length in shapes])
    axes.set_xlabel("batch x length")
    axes.set_ylabel(f"cost in {passes} (lower is better)", fontsize=8)


def finish(results: Results, title: str, draw: Callable[..., str | None] = plot, before: Sequence[dict] = ()) -> None:
    """Say where the numbers are, and draw them, behind rows that the file had ``before``."""
    rows = [*before, *results.rows]
    if not rows:
        print("nothing was measured")
        return
    print(f"\n{len(results.rows)} rows appended to {results.path}")
    model = rows[-1].get("model", DEFAULT_MODEL)
    path = results.path.with_name(results.path.stem + (f"-{model}" if model != DEFAULT_MODEL else "") + ".png")
    missing = draw(path, rows, title)
    print(f"plot: {path}" if missing is None else f"no plot: {missing}")
