"""What a step of instruction optimization costs, in plain training steps of the same model.

A plain step is forward, backward and optimizer. A step of ``InstructionOptimizer`` adds the gradient of the validation
loss and k + 1 products with the Hessian, two gradients each. The check of alpha, in every 100th step, isn't timed. In
one pass the instruction's hypergradient is held to autograd's in three; where it differs, nothing is timed. Rows go to
<out>/bilevel.csv, a plot of this run to <out>/bilevel.png.

    lora, one-pass    plain LoRA as it is used, and Bitune in one pass: finite differences of gradients
    three-pass        Bitune in three passes: autograd through the gradient (method "exact")
"""

from __future__ import annotations

import sys
from functools import partial

import matplotlib.figure
import torch
from common.report import milliseconds
from common.run import (
    Wrong,
    check_at_least,
    check_names,
    check_setup,
    parser,
    relative_error,
    sweep,
    timed,
)
from common.text import Text, padded_samples

from bitune_kernels.training import InstructionOptimizer, SoftInstruction, hypergradient, prepend_instruction

EXPLANATION = """\
A step of instruction optimization in plain steps of the same model. The floor of "finite" counts gradients: of the
plain step, of the validation loss, and two for each of k + 1 products. "exact" computes one gradient for all products.
"""
METHODS = {"lora": "finite", "one-pass": "finite", "three-pass": "exact"}
INSTRUCTION = 10  # vectors in front of the training prompts
BOUND = 0.05  # relative error of a hypergradient by differences in float32
# Every round shall be the same: nothing moves. The cost depends on neither.
LR = ALPHA = 1e-12
FIELDS = ("batch", "length", "provider", "method", "k", "rounds", "p20_ms", "p50_ms", "p80_ms")
FIELDS += ("cost_in_plain_steps", "floor")


def floor(provider: str, k: int | None) -> int | str:
    if METHODS[provider] == "exact":
        return ""
    return 1 if k is None else 2 + 2 * (k + 1)


class Training:
    """Batches of one shape, and what each provider does with them; ``k`` None is the plain step."""

    def __init__(self, models, text: Text, batch: int, length: int):
        self.model = models.bitune.train()
        self.batches = [self._batch(text.samples(batch, length, seed)) for seed in range(2)]
        torch.manual_seed(0)
        self.instruction = SoftInstruction(self.model.get_input_embeddings(), length=INSTRUCTION)
        self.optimizers = {}

    def _batch(self, samples) -> dict[str, torch.Tensor]:
        device = next(self.model.parameters()).device
        return {name: x.to(device) for name, x in padded_samples(samples).items()}

    def parameters(self, provider: str) -> list[torch.nn.Parameter]:
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        return [p for name, p in trained if provider != "lora" or ".causal." in name]

    def optimizer(self, provider: str, k: int | None) -> InstructionOptimizer:
        if (provider, k) not in self.optimizers:
            inner = torch.optim.Adam(self.parameters(provider), lr=LR)
            outer = torch.optim.Adam(self.instruction.parameters(), lr=LR)
            self.optimizers[provider, k] = InstructionOptimizer(
                self.model, self.instruction, inner, outer, alpha=ALPHA, k=k or 0, method=METHODS[provider]
            )
        return self.optimizers[provider, k]

    def schedule(self, provider: str):
        if provider == "lora":
            return self.model.disable_bitune()
        return self.model.use_schedule(use_fused=provider == "one-pass")

    def run(self, provider: str, k: int | None) -> None:
        optimizer = self.optimizer(provider, k)
        with self.schedule(provider):
            if k is not None:
                optimizer.step(*self.batches)
                return
            self.model(**self.batches[0]).loss.backward()
            optimizer.inner_optimizer.step()
            optimizer.inner_optimizer.zero_grad()

    def hypergradient(self, provider: str) -> torch.Tensor:
        train, validation = self.batches
        # with an alpha at which the products count
        options = dict(alpha=1e-3, k=1, method=METHODS[provider])
        with self.schedule(provider):
            return hypergradient(
                lambda: self.model(**prepend_instruction(self.model, train, *self.instruction(train))).loss,
                lambda: self.model(**validation).loss,
                self.parameters(provider),
                list(self.instruction.parameters()),
                **options,
            )[0]

    def check(self) -> None:
        error = relative_error(self.hypergradient("one-pass"), self.hypergradient("three-pass"))
        if not error <= BOUND:
            raise Wrong(f"the hypergradient of one-pass differs from that of three-pass by {error:.1e} (bound {BOUND})")


def measure(models, text: Text, args, setup, *shape: int) -> list[dict]:
    training = Training(models, text, *shape)
    if {"one-pass", "three-pass"} & set(args.providers):
        training.check()
    calls = {(name, k): partial(training.run, name, k) for name in args.providers for k in (None, *args.k)}
    for call in calls.values():  # the first step of each checks alpha
        call()
    times = timed(calls, args, setup.device)
    rows = []
    for (name, k), timing in times.items():
        cells = (*shape, name, METHODS[name], "plain" if k is None else k, timing.rounds, *milliseconds(timing))
        cost = round(timing.ratio(times[name, None]), 4)
        rows.append(dict(zip(FIELDS, (*cells, cost, floor(name, k)), strict=True)))
    return rows


def table_line(row: dict) -> str:
    shape, costs = f"{row['batch']:3} x {row['length']:<4}", f"{row['cost_in_plain_steps']:6.2f}  {row['floor']:>3}"
    return f"{shape}  {row['provider']:<10}  {row['method']:<6}  {row['k']:>5}  {row['p50_ms']:9.1f}  {costs}"


def draw(path, rows, title: str) -> str | None:
    """The cost of each provider over k, a panel for each shape, and the floor."""
    rows = [row for row in rows if row["k"] != "plain"]
    shapes = list(dict.fromkeys((row["batch"], row["length"]) for row in rows))
    figure = matplotlib.figure.Figure(figsize=(1 + 4 * len(shapes), 4), layout="constrained")
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False, sharey=True)[0], shapes, strict=True):
        here = [row for row in rows if (row["batch"], row["length"]) == shape]
        for name in dict.fromkeys(row["provider"] for row in here):
            own = [row for row in here if row["provider"] == name]
            label = f"{name}, {own[0]['method']}"
            axes.plot([row["k"] for row in own], [row["cost_in_plain_steps"] for row in own], "o-", label=label)
        ks = sorted({row["k"] for row in here})
        floors = [floor("one-pass", k) for k in ks]
        axes.plot(ks, floors, color="black", linestyle="dashed", label="floor of finite (gradients)")
        axes.set_title(f"{shape[0]} samples of up to {shape[1]} tokens", fontsize=9)
        axes.set_xticks(ks)
        axes.set_xlabel("k")
    figure.axes[0].set_ylabel("cost in plain steps (lower is better)")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    return None


def parse(argv: list[str] | None):
    p = parser(__doc__.partition("\n")[0], f"{', '.join(METHODS)}; default: all")
    p.add_argument("--samples", type=int, nargs="+", metavar="B", default=[4], help="default: 4")
    p.add_argument("--max-lengths", type=int, nargs="+", metavar="L", default=[128], help="default: 128")
    p.add_argument("--k", type=int, nargs="+", metavar="K", default=[0, 1, 3], help="default: 0 1 3")
    args = p.parse_args(argv)
    args.dtype = args.dtype or "float32"
    setup = check_setup(p, args)
    check_at_least(p, args, samples=1, max_lengths=4, k=0)
    if max(args.max_lengths) + INSTRUCTION > setup.max_length:
        p.error(
            f"--max-lengths: expected at most {setup.max_length} tokens with the instruction's {INSTRUCTION}, "
            f"got {max(args.max_lengths)}"
        )
    if setup.dtype != torch.float32:
        p.error(f"--dtype: expected float32, which differences of gradients need, got {args.dtype}")
    args.providers = check_names(p, "providers", args.providers or METHODS, METHODS)
    args.k = sorted(set(args.k))
    return args, setup


def main(argv: list[str] | None = None) -> int:
    args, setup = parse(argv)
    shapes = [(b, n) for n in sorted(set(args.max_lengths)) for b in sorted(set(args.samples))]
    print(EXPLANATION)
    columns = "samples x longest, provider, method, k, p50 ms, cost in plain steps, floor"
    return sweep("bilevel", args, setup, FIELDS, shapes, measure, table_line, draw, columns, "instruction optimization")


if __name__ == "__main__":
    sys.exit(main())
