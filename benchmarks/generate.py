"""A request to generate(): time to the first token and tokens per second after it, beside the plain LoRA model.

Greedy, without an end token, so that every provider makes as many tokens. In float32 the tokens are held to three
passes'; a provider that differs is not timed. Rows go to <out>/generate.csv, a plot of this run to <out>/generate.png.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial

import matplotlib.figure
import torch
from common.run import Wrong, check_at_least, check_names, check_setup, parser, sweep, timed
from common.text import Text, padded

from bitune_kernels.testing.timing import Timing

EXPLANATION = """\
Time to the first token, tokens per second of one sample after it, and the whole request. The unit of cost is lora, the
plain LoRA model; what comes after the first token is the same work for both.
"""
PROVIDERS = ("lora", "bitune")
FIELDS = ("batch", "prompt", "new", "provider", "rounds", "first_ms", "request_ms", "tokens_per_s", "cost_of_first")
FIELDS += ("cost_of_decoding", "cost_of_request")


class Request:
    """Prompts of one length, and how each provider answers them."""

    def __init__(self, models, text: Text, batch: int, prompt: int, new: int):
        self.models, self.new = models, new
        ids, mask = padded(text.prompts(batch, prompt), "left")
        device = next(models.bitune.parameters()).device
        self.inputs = dict(input_ids=ids.to(device), attention_mask=mask.to(device))

    def run(self, provider: str, new: int) -> torch.Tensor:
        model = self.models.bitune
        with model.disable_bitune() if provider == "lora" else nullcontext():
            return self._generate(model, new)

    def _generate(self, model, new: int) -> torch.Tensor:
        options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        return model.generate(**self.inputs, **options)

    def check(self, provider: str) -> None:
        with self.models.bitune.use_schedule(use_fused=False):
            expected = self._generate(self.models.bitune, self.new)
        if not torch.equal(self.run(provider, self.new), expected):
            raise Wrong(f"{provider} makes other tokens than three passes")


def measure(models, text: Text, args, setup, *shape: int) -> list[dict]:
    request = Request(models, text, *shape)
    if setup.dtype == torch.float32 and "bitune" in args.providers:  # lower, rounding may decide between two tokens
        request.check("bitune")
    calls = {}
    for name in args.providers:
        calls[name, "first"] = partial(request.run, name, 1)
        calls[name, "all"] = partial(request.run, name, request.new)
    times = timed(calls, args, setup.device)
    rows = []
    for name in args.providers:
        first, whole = times[name, "first"], times[name, "all"]
        rest = _rest(first, whole)
        row = dict(zip(("batch", "prompt", "new"), shape, strict=True)) | {"provider": name, "rounds": whole.rounds}
        row |= {"first_ms": round(first.quantile(0.5) * 1e3, 3), "request_ms": round(whole.quantile(0.5) * 1e3, 3)}
        row["tokens_per_s"] = round((request.new - 1) / rest.quantile(0.5), 3)
        unit = [times["lora", "first"], times["lora", "all"]] if "lora" in args.providers else None
        costs = [first.ratio(unit[0]), rest.ratio(_rest(*unit)), whole.ratio(unit[1])] if unit else [""] * 3
        costs = [c if c == "" else round(c, 4) for c in costs]
        rows.append(row | dict(zip(FIELDS[-3:], costs, strict=True)))
    return rows


def _rest(first: Timing, whole: Timing) -> Timing:
    """What follows the first token; of a noisy machine, not below a thousandth of the request."""
    pairs = zip(first.seconds, whole.seconds, strict=True)
    return Timing(tuple(max(b - a, b / 1000) for a, b in pairs))


def table_line(row: dict) -> str:
    cells = [f"{row['batch']} x {row['prompt']} + {row['new']}", f"{row['provider']:<13}", f"{row['first_ms']:9.1f}"]
    cells += [f"{row['tokens_per_s']:8.2f}", f"{row['request_ms']:10.1f}"]
    return "  ".join(cells + ["  n/a" if row[f] == "" else f"{row[f]:5.2f}" for f in FIELDS[-3:]])


def draw(path, rows, title: str) -> str | None:
    """The cost of each part of a request, in plain LoRA's."""
    rows = [r for r in rows if r["cost_of_request"] != "" and r["provider"] != "lora"]
    if not rows:
        return "it shows costs in those of lora, which was not among the providers"
    shapes = list(dict.fromkeys((r["batch"], r["prompt"], r["new"]) for r in rows))
    figure = matplotlib.figure.Figure(figsize=(2 + 4 * len(shapes), 4), layout="constrained")
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False, sharey=True)[0], shapes, strict=True):
        for i, r in enumerate(r for r in rows if (r["batch"], r["prompt"], r["new"]) == shape):
            bars = axes.bar([x + 0.25 * i for x in range(3)], [r[f] for f in FIELDS[-3:]], 0.23, label=r["provider"])
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
        axes.axhline(1, color="black", linestyle="dashed")
        axes.set_xticks(range(3), ["first token", "decoding", "request"])
        axes.set_title(f"{shape[0]} x {shape[1]} + {shape[2]} tokens", fontsize=9)
    figure.axes[0].set_ylabel("cost in plain LoRA's (lower is better)")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    return None


def parse(argv: list[str] | None):
    p = parser(__doc__.partition("\n")[0], f"{', '.join(PROVIDERS)}; default: all")
    p.add_argument("--batch-sizes", type=int, nargs="+", metavar="B", default=[1], help="default: 1")
    p.add_argument("--lengths", type=int, nargs="+", metavar="P", default=[200], help="of the prompt (default: 200)")
    p.add_argument("--new-tokens", type=int, default=50, metavar="N", help="of the answer (default: 50)")
    args = p.parse_args(argv)
    setup = check_setup(p, args)
    check_at_least(p, args, batch_sizes=1, lengths=2, new_tokens=2)
    if max(args.lengths) + args.new_tokens > setup.max_length:
        p.error(f"--lengths: expected at most {setup.max_length} tokens with the new ones, got {max(args.lengths)}")
    args.providers = check_names(p, "providers", args.providers or PROVIDERS, PROVIDERS)
    return args, setup


def main(argv: list[str] | None = None) -> int:
    args, setup = parse(argv)
    shapes = [(b, n, args.new_tokens) for n in sorted(set(args.lengths)) for b in sorted(set(args.batch_sizes))]
    print(EXPLANATION)
    columns = "shape, provider, first ms, tokens/s, request ms, cost: first, decoding, request"
    return sweep("generate", args, setup, FIELDS, shapes, measure, table_line, draw, columns)


if __name__ == "__main__":
    sys.exit(main())
