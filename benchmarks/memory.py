"""Memory of a prefill over the length of its prompt, without the weights, against a floor.

One call per provider: nothing is timed. What two providers compute must agree. Rows go to <out>/memory.csv, a plot of
this run to <out>/memory.png.
"""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from unittest.mock import patch

import matplotlib.figure
import torch
from common.floor import head_dim_of
from common.memory import memory_of
from common.models import Models
from common.run import (
    SMALLEST_BOUND,
    check_at_least,
    check_errors,
    check_names,
    check_setup,
    parser,
    relative_error,
    sweep,
)
from common.text import Text, padded

from bitune_kernels.modeling import row_chunks

EXPLANATION = """\
The peak of a prefill without the weights. one-pass has two rows per prompt token; three-pass, one stream after the
other, and plain LoRA have one at a time. one-pass and lora-packed run their MLPs on some thousand rows at a time, lora
(plain LoRA as it is used), three-pass and one-pass+whole-mlp on all at once. The floor: the key/value cache, and for
each row the residual stream twice and one layer's q, k, v and attention output.
"""
PROVIDERS = ("one-pass", "one-pass+whole-mlp", "three-pass", "lora-packed", "lora")
FIELDS = ("batch", "length", "provider", "rows", "step_mib", "floor_mib", "over_floor", "bytes_per_token", "over_lora")
FIELDS += ("error",)


def floor_bytes(config, layers: int, itemsize: int, tokens: int, rows: int) -> int:
    """The cache of all layers, and of one layer the residual stream [rows, hidden] twice, q, k, v and their output."""
    width_q, width_kv = (
        heads * head_dim_of(config)
        for heads in (config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads))
    )
    cache = tokens * layers * 2 * width_kv
    return itemsize * (cache + rows * (2 * config.hidden_size + 2 * width_q + 2 * width_kv))


class Prefill:
    """Prompts of one length, and how each provider reads them."""

    def __init__(self, models: Models, text: Text, batch: int, length: int):
        self.models = models
        device = next(models.bitune.parameters()).device
        ids, self.mask = (x.to(device) for x in padded(text.prompts(batch, length), "left"))
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.inputs = dict(input_ids=ids, attention_mask=self.mask, position_ids=positions)
        self.tokens, self.real = ids.numel(), int(self.mask.sum())
        one_pass = 2 * self.real - batch
        self.rows = dict(zip(PROVIDERS, (one_pass, one_pass, self.tokens, self.real, self.tokens), strict=True))

    @torch.no_grad()
    def run(self, provider: str):
        model = self.models.of(provider)
        schedule = (
            model.disable_bitune() if provider == "lora" else model.use_schedule(use_fused=provider != "three-pass")
        )
        whole = patch.object(row_chunks, "ROWS", math.inf) if provider == "one-pass+whole-mlp" else nullcontext()
        with schedule, whole:
            return model(**self.inputs, use_cache=True, logits_to_keep=1)

    def outputs(self, found) -> list[torch.Tensor]:
        """The logits, and each layer's keys and values at the real tokens."""
        caches = [x for layer in found.past_key_values.layers for x in (layer.keys, layer.values)]
        return [found.logits, *(x.transpose(1, 2)[self.mask[:, -x.shape[2] :].bool()] for x in caches)]


def measure(models: Models, text: Text, args, setup, *shape: int) -> list[dict]:
    case, measured, first = Prefill(models, text, *shape), {}, {}
    for name in args.providers:
        kept = []
        memory = memory_of(setup.device, lambda name=name, kept=kept: kept.append(case.run(name)))
        found, is_lora, error = case.outputs(kept.pop()), name.startswith("lora"), ""
        if is_lora in first:
            error = max(relative_error(f, e) for f, e in zip(found, first[is_lora], strict=True))
            check_errors(name, {"outputs": error}, {"outputs": SMALLEST_BOUND[setup.dtype_name]})
        first.setdefault(is_lora, found)
        measured[name] = memory.step, error
    rows = []
    for name, (step, error) in measured.items():
        least = floor_bytes(setup.text_config, setup.layers, setup.dtype.itemsize, case.tokens, case.rows[name]) / 2**20
        values = (*shape, name, case.rows[name], round(step, 3), round(least, 3), round(step / least, 4))
        values += (round(step * 2**20 / case.real, 1),)
        values += (round(step / measured["lora"][0], 4) if "lora" in measured else "", error)
        rows.append(dict(zip(FIELDS, values, strict=True)))
    return rows


def table_line(row: dict) -> str:
    over_lora = "n/a" if row["over_lora"] == "" else f"{row['over_lora']:.2f}"
    cells = [f"{row['batch']} x {row['length']:<6}", f"{row['provider']:<18}", f"{row['step_mib']:8.0f}"]
    cells += [f"{row['floor_mib']:8.0f}", f"{row['over_floor']:5.2f}", f"{row['bytes_per_token']:8.0f}"]
    return "  ".join([*cells, f"{over_lora:>5}"])


def draw(path, rows, title: str) -> None:
    """KiB per prompt token of each provider and of its floor: flat where memory is linear in the length."""
    batches = list(dict.fromkeys(r["batch"] for r in rows))
    names = list(dict.fromkeys(r["provider"] for r in rows))
    figure = matplotlib.figure.Figure(figsize=(2 + 5 * len(batches), 4), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False, sharey=True)[0], batches, strict=True):
        for i, name in enumerate(names):
            points = [r for r in rows if r["batch"] == batch and r["provider"] == name]
            lengths = [r["length"] for r in points]
            kib = [r["bytes_per_token"] / 1024 for r in points]
            axes.plot(lengths, kib, marker="o", color=f"C{i}", label=name)
            beside = dict(textcoords="offset points", xytext=(0, -12 if name == "lora" else 5), ha="center", fontsize=7)
            for x, y in zip(lengths, kib, strict=True):
                axes.annotate(f"{y:.1f}", (x, y), **beside)
            if name in ("one-pass", "lora"):
                least = [y / r["over_floor"] for y, r in zip(kib, points, strict=True)]
                axes.plot(lengths, least, color=f"C{i}", linestyle="dashed", label=f"floor of {name}")
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1.08 * axes.dataLim.y1)
        axes.set_xlabel(f"tokens of the prompt (batch {batch})")
    figure.axes[0].set_ylabel("KiB per token, without the weights")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None):
    p = parser(__doc__.partition("\n")[0], f"{', '.join(PROVIDERS)}; default: all", timed=False)
    p.set_defaults(layers=2)
    p.add_argument("--batch-sizes", type=int, nargs="+", metavar="B", default=[1], help="default: 1")
    p.add_argument(
        "--lengths", type=int, nargs="+", metavar="P", default=[2048, 8192, 32768], help="default: 2048 8192 32768"
    )
    args = p.parse_args(argv)
    setup = check_setup(p, args)
    check_at_least(p, args, batch_sizes=1)
    if setup.folder is None:  # random weights have no limit but the config's
        setup.text_config.max_position_embeddings = max(setup.max_length, *args.lengths)
    if bad := [n for n in args.lengths if not 2 <= n <= setup.max_length]:
        p.error(f"--lengths: expected 2 to {setup.max_length} tokens ({setup.name}), got {bad[0]}")
    args.providers = check_names(p, "providers", args.providers or PROVIDERS, PROVIDERS)
    return args, setup


def main(argv: list[str] | None = None) -> int:
    args, setup = parse(argv)
    shapes = [(b, n) for n in sorted(set(args.lengths)) for b in sorted(set(args.batch_sizes))]
    print(EXPLANATION)
    columns = "shape, provider, MiB, floor MiB, in floors, bytes per token, in lora's"
    return sweep("memory", args, setup, FIELDS, shapes, measure, table_line, draw, columns, "memory of a prefill")


if __name__ == "__main__":
    sys.exit(main())
