"""The linear layer with two LoRA adapters alone: PEFT's layer on each block of rows, ours, and the base layer.

A step is forward and backward with gradients of the input and the adapters. Half of the rows belong to each adapter. A
provider that disagrees with the formula in float64 is not timed. Rows go to <out>/lora.csv, a plot of this run to
<out>/lora.png.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import matplotlib.figure
import torch
from common.models import Machine
from common.report import Results, finish, milliseconds
from common.run import (
    SMALLEST_BOUND,
    add_run_options,
    check_at_least,
    check_errors,
    check_machine,
    check_names,
    exits,
    machine_name,
    measure_each,
    relative_error,
    timed,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import linear

from bitune_kernels.lora.segment import Adapter, segment_lora_linear
from bitune_kernels.modeling.adapters import BIDIR, CAUSAL, by_blocks
from bitune_kernels.testing.timing import provenance

EXPLANATION = """\
base: the linear layer without adapters, forward and the gradient of its input. floor: FLOPs of base and adapters over
those of base. speedup: over peft, PEFT's own layer on each block of rows.
"""
PROVIDERS = ("peft", "segment", "base")
FIELDS = ("rows", "features", "r", "adapter_dtype", "provider", "rounds", "p20_ms", "p50_ms", "p80_ms")
FIELDS += ("speedup_over_peft", "cost_in_base_layers", "floor", "error", "bound")


class Step:
    """One shape: the layer, its input and the gradient of its output."""

    def __init__(self, machine: Machine, rows: int, features: int, r: int, adapter_dtype: torch.dtype):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(features, features, bias=False))
        config = LoraConfig(r=r, lora_alpha=1, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(model.to(machine.device, machine.dtype), config, adapter_name=CAUSAL)
        model.add_adapter(BIDIR, config)
        self.layer = model.base_model.model[0]
        self.weight = self.layer.base_layer.weight
        self.adapters = []
        for name in (BIDIR, CAUSAL):
            a, b = (
                part[name].to(adapter_dtype).requires_grad_(True).weight
                for part in (self.layer.lora_A, self.layer.lora_B)
            )
            self.adapters.append(Adapter(a, b, self.layer.scaling[name]))
        self.n = rows // 2
        self.x = torch.randn(rows, features, device=machine.device, dtype=machine.dtype, requires_grad=True)
        self.dy = torch.randn(rows, features, device=machine.device, dtype=machine.dtype)
        # a product of r and features for each of x A^T, h B^T, dy B, dh A, dy^T h and dh^T x; the base has two
        self.floor = 1 + 6 * r / (2 * features)

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.x, *(t for adapter in self.adapters for t in adapter[:2])]

    def run(self, provider: str) -> list[torch.Tensor]:
        if provider == "base":
            y, leaves = linear(self.x, self.weight), [self.x]
        elif provider == "peft":
            y, leaves = by_blocks(self.layer, self.layer.forward, 0, self.n, self.x), self.leaves
        else:
            y, leaves = segment_lora_linear(self.x, self.weight, None, self.n, *self.adapters), self.leaves
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy)]

    def formula(self, dtype: torch.dtype) -> list[torch.Tensor]:
        weight, dy, *leaves = (t.detach().to(dtype) for t in (self.weight, self.dy, *self.leaves))
        x, *ab = (t.requires_grad_() for t in leaves)
        blocks = [
            rows @ weight.T + adapter.scale * (rows @ a.T) @ b.T
            for rows, a, b, adapter in zip((x[: self.n], x[self.n :]), ab[::2], ab[1::2], self.adapters, strict=True)
        ]
        y = torch.cat(blocks)
        return [y.detach(), *torch.autograd.grad(y, [x, *ab], dy)]


def measure(machine: Machine, args, rows: int, features: int, r: int, adapter_dtype: torch.dtype) -> list[dict]:
    step = Step(machine, rows, features, r, adapter_dtype)
    expected = step.formula(torch.float64)

    def error(found):
        return max(relative_error(f, e) for f, e in zip(found, expected, strict=True))

    bound = max(2 * error(step.formula(machine.dtype)), SMALLEST_BOUND[machine.dtype_name])
    errors = {name: error(step.run(name)) for name in args.providers if name != "base"}
    for name, found in errors.items():
        check_errors(name, {"output or gradient": found}, {"output or gradient": bound})
    times = timed({name: partial(step.run, name) for name in args.providers}, args, machine.device)
    found = []
    for name, t in times.items():
        speedup = round(times["peft"].ratio(t), 4) if "peft" in times else ""
        cost = round(t.ratio(times["base"]), 4) if "base" in times else ""
        values = (rows, features, r, str(adapter_dtype)[6:], name, t.rounds, *milliseconds(t), speedup, cost)
        values += (round(step.floor, 4), errors.get(name, ""), bound)
        found.append(dict(zip(FIELDS, values, strict=True)))
    return found


def table_line(row: dict) -> str:
    cells = [f"{row['rows']} x {row['features']}, r={row['r']}", row["adapter_dtype"], f"{row['provider']:<7}"]
    cells += [f"{row[q]:9.3f}" for q in ("p20_ms", "p50_ms", "p80_ms")]
    cells += [
        f"{row[key]:7.2f}" if row[key] != "" else "    n/a" for key in ("speedup_over_peft", "cost_in_base_layers")
    ]
    return "  ".join([*cells, f"{row['floor']:5.2f}"])


def draw(path, rows, title: str) -> None:
    """Speedup over PEFT's layers over the number of rows, a line per width and adapter dtype."""
    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    lines = sorted({(r["features"], r["r"], r["adapter_dtype"]) for r in rows})
    for line in lines:
        own = [r for r in rows if (r["features"], r["r"], r["adapter_dtype"]) == line and r["provider"] == "segment"]
        own = sorted((r for r in own if r["speedup_over_peft"] != ""), key=lambda r: r["rows"])
        label = f"{line[0]} features, r={line[1]}, {line[2]} adapters"
        axes.plot([r["rows"] for r in own], [r["speedup_over_peft"] for r in own], marker="o", label=label)
    axes.axhline(1, color="black", linestyle="dashed", label="PEFT's layer on each block")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.08 * axes.dataLim.y1)
    axes.set_xlabel("rows")
    axes.set_ylabel("speedup (higher is better)")
    axes.set_title(title, fontsize=9)
    figure.legend(loc="outside lower center", fontsize=8)
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None):
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_run_options(p, f"{', '.join(PROVIDERS)}; default: all", seconds=2, min_rounds=5, warmup=2)
    p.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024, 4096], help="default: 64 256 1024 4096")
    p.add_argument("--features", type=int, nargs="+", default=[1024], help="in and out (default: 1024)")
    p.add_argument("--ranks", type=int, nargs="+", default=[8], help="default: 8")
    args = p.parse_args(argv)
    check_at_least(p, args, rows=2, features=1, ranks=1)
    args.providers = check_names(p, "providers", args.providers or PROVIDERS, PROVIDERS)
    return args, check_machine(p, args)


def main(argv: list[str] | None = None) -> int:
    args, machine = parse(argv)
    facts = provenance(machine.device) | {"benchmark": "lora", "dtype": machine.dtype_name, "warmup": args.warmup}
    with exits("lora"):
        results = Results(args.out / "lora.csv", [*facts, *FIELDS])
    title = f"{machine.dtype_name}, {machine_name(facts)}"
    # PEFT keeps the adapters of a 16-bit model in float32 unless told otherwise
    kinds = list(dict.fromkeys((machine.dtype, torch.float32)))
    shapes = [(n, d, r, kind) for kind in kinds for d in args.features for r in args.ranks for n in args.rows]
    print(f"{EXPLANATION}\n{len(shapes)} shapes in {title}")
    print("rows x features, adapters, provider, p20 ms, p50 ms, p80 ms, speedup, cost in base layers, floor")
    right = measure_each(shapes, partial(measure, machine, args), results, facts, table_line)
    finish(results, f"LoRA linear: {title}", draw)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
