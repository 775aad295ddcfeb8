"""Rows of CSV, lines of a table, a plot."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure

from bitune_kernels.testing.timing import Timing

COLUMNS = (
    ("batch", 5),
    ("length", 6),
    ("provider", 19),
    ("tokens/s", 9),
    ("p20 ms", 8),
    ("p50 ms", 8),
    ("p80 ms", 8),
    ("speedup", 7),
    ("x LoRA", 6),
    ("floor", 5),
    ("MiB", 6),
    ("error", 7),
)


LEGEND = """\
speedup: over three-pass.  x LoRA: cost in plain LoRA passes.  floor: the same in FLOPs of linear layers alone, which
the time can pass below where both are bound by overhead or memory.
MiB: peak of the allocator.  error: of the worst output, relative, against the reference backend in float32."""


def table_head() -> str:
    return f"{LEGEND}\n\n{_line([name for name, _ in COLUMNS])}"


def table_line(row: dict) -> str:
    """One measurement (a row of the CSV file) on the terminal."""

    def number(key, digits=2):
        return "n/a" if row[key] == "" else f"{row[key]:.{digits}f}"

    cells = [str(row["batch"]), str(row["length"]), row["provider"], number("tokens_per_s", 0)]
    cells += [number(q, 1) for q in ("p20_ms", "p50_ms", "p80_ms")]
    cells += [number("speedup_over_three_pass"), number("cost_in_lora_passes")]
    cells += ["" if row["provider"] == "lora" else number("floor_linear"), number("peak_mib", 0)]
    return _line([*cells, f"{row['error']:.1e}"])


def _line(cells: Sequence[str]) -> str:
    aligned = (
        cell.ljust(width) if name == "provider" else cell.rjust(width)
        for cell, (name, width) in zip(cells, COLUMNS, strict=True)
    )
    return "  ".join(aligned).rstrip()


CASE_FIELDS = ("batch", "length", "tokens", "padding", "floor_rows", "floor_linear", "floor_attention")
TIME_FIELDS = (
    "provider",
    "rounds",
    "tokens_per_s",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "speedup_over_three_pass",
    "cost_in_lora_passes",
    "peak_mib",
    "error",
)


def measurements(
    facts: dict, case, times: dict[str, Timing], checks: dict[str, dict], memory: dict[str, float | None]
) -> list[dict]:
    """One CSV row per provider: ``facts``, which all share, ``TIME_FIELDS``, and ``checks`` of the provider."""
    three, lora = times.get("three-pass"), times.get("lora")
    rows = []
    for name, t in times.items():
        values = (
            name,
            t.rounds,
            round(case.tokens / t.quantile(0.5), 2),
            *milliseconds(t),
            "" if three is None else round(three.ratio(t), 4),
            "" if lora is None else round(t.ratio(lora), 4),
            "" if memory[name] is None else round(memory[name], 1),
            worst_error(checks[name]),
        )
        rows.append(facts | dict(zip(TIME_FIELDS, values, strict=True)) | checks[name])
    return rows


def milliseconds(t: Timing) -> list[float]:
    """p20, p50 and p80."""
    return [round(t.quantile(q) * 1e3, 4) for q in (0.2, 0.5, 0.8)]


def worst_error(checks: dict[str, float]) -> float:
    return max(value for what, value in checks.items() if what.startswith("error_"))


class Table(NamedTuple):
    """How a benchmark shows what it measured.

    Attributes:
        head: () -> the text above the table.
        line: row of the CSV file -> line of the table.
        rows: (facts, case, times, checks, memory) -> rows of the CSV file.
    """

    head: Callable[[], str]
    line: Callable[[dict], str]
    rows: Callable[..., list[dict]]


WHOLE_MODEL = Table(table_head, table_line, measurements)


class Results:
    """The CSV file that every run appends to."""

    def __init__(self, path: Path, fields: Sequence[str]):
        self.path, self.fields, self.rows = path, list(fields), []
        if path.is_file():
            with path.open(newline="") as file:
                found = next(csv.reader(file), None)
            if found is not None and found != self.fields:
                raise ValueError(f"{path}: has other columns than this version writes; move it away")

    def append(self, rows: Sequence[dict]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.is_file() or self.path.stat().st_size == 0
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.fields)
            if new:
                writer.writeheader()
            writer.writerows(rows)
        self.rows += rows


def plot(path: Path, rows: Sequence[dict], title: str) -> str | None:
    """Cost of each provider in plain LoRA passes, grouped by shape, and the floor of each group.

    Returns why nothing was drawn, or None.
    """
    rows = [row for row in rows if row["cost_in_lora_passes"] != ""]
    if not rows:
        return "it shows costs in LoRA passes, and lora was not among the providers"
    shapes = list(dict.fromkeys((row["batch"], row["length"]) for row in rows))
    names = [n for n in dict.fromkeys(row["provider"] for row in rows) if n != "lora"]
    width = max(6.0, 2 + 0.6 * len(shapes) * max(1, len(names)))
    figure = matplotlib.figure.Figure(figsize=(width, 4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        bars = [(shapes.index((r["batch"], r["length"])), r) for r in rows if r["provider"] == name]
        x = [place - 0.4 + width * (i + 0.5) for place, _ in bars]
        drawn = axes.bar(x, [r["cost_in_lora_passes"] for _, r in bars], width * 0.92, label=name)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7)
    floors = {(r["batch"], r["length"]): r["floor_linear"] for r in rows}
    for place, shape in enumerate(shapes):
        label = "floor (FLOPs of linears)" if place == 0 else None
        ends = place - 0.45, place + 0.45
        axes.plot(ends, [floors[shape]] * 2, color="black", linestyle="dashed", label=label)
    axes.set_xticks(range(len(shapes)), [f"{batch} x {length}" for batch, length in shapes])
    axes.set_xlabel("batch x length")
    axes.set_ylabel("cost in plain LoRA passes (lower is better)")
    axes.set_title(title, fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)


def finish(results: Results, title: str, draw: Callable[..., str | None] = plot) -> None:
    """Say where the numbers are, and draw them."""
    if not results.rows:
        print("nothing was measured")
        return
    print(f"\n{len(results.rows)} rows appended to {results.path}")
    path = results.path.with_suffix(".png")
    missing = draw(path, results.rows, title)
    print(f"plot: {path}" if missing is None else f"no plot: {missing}")
