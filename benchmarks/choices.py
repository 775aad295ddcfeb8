"""Multiple-choice questions scored: all choices in one pass over their prompt, against one pass for each of them.

Log-likelihoods in float32 are held to three passes', choice by choice; a provider that differs is not timed. Rows go to
<out>/choices.csv, a plot of this run to <out>/choices.png.
"""

from __future__ import annotations

import sys
from functools import partial

import matplotlib.figure
import torch
from common.run import Wrong, check_at_least, check_names, check_setup, parser, sweep, timed
from common.text import Text, padded

from bitune_kernels.modeling import score_choices

EXPLANATION = """\
lora: the plain LoRA model over the choices of a question as a padded batch, each with its prompt, as harnesses run any
model. one-by-one: a Bitune pass for each choice with its prompt. one-pass: all choices in one pass over their prompt.
"""
PROVIDERS = ("lora", "one-by-one", "one-pass")
FIELDS = ("prompt", "choices", "answer", "provider", "rounds", "rows", "p50_ms", "cost_in_lora")
FIELDS += ("speedup_over_one_by_one", "fewer_rows")


class Question:
    """A prompt and its choices, and how each provider scores them: log-likelihoods [choices]."""

    def __init__(self, models, text: Text, prompt: int, choices: int, answer: int):
        self.model = models.bitune
        (self.prompt,) = text.prompts(1, prompt)
        self.choices = [text.prompts(1, answer, seed)[0] for seed in range(1, choices + 1)]
        self.device = next(self.model.parameters()).device

    def rows(self, provider: str) -> int:
        """Rows that run through the layers: the speedup of linear layers that multiply at one speed."""
        prompt, choices = len(self.prompt), [len(choice) for choice in self.choices]
        if provider == "one-pass":  # both streams, the last prompt token once, each choice but its last token
            return 2 * (prompt - 1) + 1 + sum(choices) - len(choices)
        streams = 1 if provider == "lora" else 2
        return sum(streams * (prompt - 1) + choice for choice in choices)

    @torch.no_grad()
    def run(self, provider: str) -> torch.Tensor:
        if provider == "one-pass":
            (scores,) = score_choices(self.model, [self.prompt], [self.choices])
            return torch.tensor([score for score, _ in scores])
        if provider == "one-by-one":
            return torch.cat([self._score([choice], prompt_lengths=[len(self.prompt)]) for choice in self.choices])
        with self.model.disable_bitune():
            return self._score(self.choices)

    def _score(self, choices: list[list[int]], **options) -> torch.Tensor:
        # the last token of a choice is predicted and not read
        ids, mask = (x.to(self.device) for x in padded([self.prompt + choice[:-1] for choice in choices], "right"))
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
        scores = []
        for row, choice in zip(logits[:, len(self.prompt) - 1 :].float(), choices, strict=True):
            each = row[: len(choice)].log_softmax(-1)
            scores.append(each.gather(1, torch.tensor(choice, device=self.device)[:, None]).sum())
        return torch.stack(scores).cpu()

    def check(self, provider: str) -> None:
        with self.model.use_schedule(use_fused=False):
            expected = self.run("one-by-one")
        found = self.run(provider)
        if not torch.allclose(found, expected, rtol=1e-4, atol=1e-3):
            raise Wrong(f"{provider} scores {found.tolist()}, three passes {expected.tolist()}")


def measure(models, text: Text, args, setup, *shape: int) -> list[dict]:
    question = Question(models, text, *shape)
    if setup.dtype == torch.float32:
        for name in set(args.providers) - {"lora"}:
            question.check(name)
    calls = {name: partial(question.run, name) for name in args.providers}
    times = timed(calls, args, setup.device)
    rows = []
    for name, timing in times.items():
        row = dict(zip(FIELDS[:3], shape, strict=True)) | {"provider": name, "rounds": timing.rounds}
        row["rows"] = question.rows(name)
        row["p50_ms"] = round(timing.quantile(0.5) * 1e3, 3)
        row["cost_in_lora"] = round(timing.ratio(times["lora"]), 4) if "lora" in times else ""
        one = times.get("one-by-one")
        row["speedup_over_one_by_one"] = round(one.ratio(timing), 4) if one else ""
        row["fewer_rows"] = round(question.rows("one-by-one") / row["rows"], 4)
        rows.append(row)
    return rows


def table_line(row: dict) -> str:
    cells = [
        f"{row['prompt']:4} + {row['choices']} x {row['answer']}",
        f"{row['provider']:<10}",
        f"{row['p50_ms']:9.1f}",
    ]
    return "  ".join(cells + ["  n/a" if row[f] == "" else f"{row[f]:5.2f}" for f in FIELDS[-3:]])


def draw(path, rows, title: str) -> str | None:
    """The cost of each provider in plain LoRA's, a group of bars for each shape."""
    rows = [r for r in rows if r["cost_in_lora"] != "" and r["provider"] != "lora"]
    if not rows:
        return "it shows costs in those of lora, which was not among the providers"
    shapes = list(dict.fromkeys((r["prompt"], r["choices"], r["answer"]) for r in rows))
    figure = matplotlib.figure.Figure(figsize=(3 + 1.5 * len(shapes), 4), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(dict.fromkeys(r["provider"] for r in rows)):
        costs = [r["cost_in_lora"] for r in rows if r["provider"] == name]
        axes.bar_label(
            axes.bar([x + 0.3 * i for x in range(len(costs))], costs, 0.28, label=name), fmt="%.2f", fontsize=7
        )
    axes.axhline(1, color="black", linestyle="dashed")
    axes.set_xticks(range(len(shapes)), [f"{p} + {c} x {a} tokens" for p, c, a in shapes], fontsize=8)
    axes.set_ylabel("cost in plain LoRA's (lower is better)")
    axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    return None


def parse(argv: list[str] | None):
    p = parser(__doc__.partition("\n")[0], f"{', '.join(PROVIDERS)}; default: all")
    p.add_argument(
        "--lengths", type=int, nargs="+", metavar="P", default=[50, 200], help="of the prompt (default: 50 200)"
    )
    p.add_argument("--choices", type=int, nargs="+", metavar="N", default=[4], help="of a question (default: 4)")
    p.add_argument("--answer-tokens", type=int, default=10, metavar="N", help="of each choice (default: 10)")
    args = p.parse_args(argv)
    setup = check_setup(p, args)
    check_at_least(p, args, lengths=2, choices=1, answer_tokens=1)
    if max(args.lengths) + args.answer_tokens > setup.max_length:
        p.error(f"--lengths: expected at most {setup.max_length} tokens with the answer, got {max(args.lengths)}")
    args.providers = check_names(p, "providers", args.providers or PROVIDERS, PROVIDERS)
    return args, setup


def main(argv: list[str] | None = None) -> int:
    args, setup = parse(argv)
    shapes = [(n, c, args.answer_tokens) for n in sorted(set(args.lengths)) for c in sorted(set(args.choices))]
    print(EXPLANATION)
    columns = "prompt + choices, provider, p50 ms, cost in lora's, speedup over one-by-one, how many times fewer rows"
    return sweep("choices", args, setup, FIELDS, shapes, measure, table_line, draw, columns)


if __name__ == "__main__":
    sys.exit(main())
