"""A training step of Bitune on ragged samples: the authors' schedule, three passes, one pass, plain LoRA.

A step is forward and backward, without an optimizer. The default on a GPU is the paper's update: 10 samples of up
to 512 tokens; prompts are instructions, answers cuts of other instructions. A provider whose loss or gradients
disagree with the reference backend in float32 (those of LoRA: with PEFT's over the padded batch) is not timed. Rows go
to <out>/train_step.csv, a plot of this run to <out>/train_step.png.

    three-pass      the paper's schedule over the padded batch, authors-schedule: sample by sample
    one-pass        this package; one-pass+peft: with PEFT's own LoRA layers, once per adapter's block of rows
    lora            plain LoRA as it is used: PEFT's layers, the padded batch, the head over all rows
    single-stream   this package's variants with one stream per prompt, single-stream-dual: two adapters on q, k, v
    lora-packed     plain LoRA as well optimised as one-pass: the same rows less one stream, attention backend, LoRA
                    layer, trimmed last layer and head over answer rows
"""

from __future__ import annotations

import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from common.floor import Dims, floor
from common.memory import Memory
from common.models import Models, float32_weights, scope
from common.run import (
    Case,
    add_sweep_options,
    check_at_least,
    check_minutes,
    check_setup,
    choose_providers,
    measure,
    oracle_of,
    parser,
    prepare,
    relative_error,
    title,
)
from common.text import Text, padded_samples

EXPLANATION = """\
One update's forward and backward passes: authors-schedule runs three passes sample by sample, three-pass the padded
batch, one-pass the rows of all samples at once. Units of cost: lora, plain LoRA as it is used; lora-packed, optimised.
"""


class TrainStep(Case):
    """Samples padded on the right; the loss is the mean over all answer tokens."""

    outputs = ("loss", "gradient")

    def __init__(self, models: Models, dims: Dims, text: Text, batch: int, length: int, fill: bool = False):
        self.models, self.batch, self.length = models, batch, length
        samples = text.samples(batch, length, fill=fill)
        self.device = next(models.bitune.parameters()).device
        self.ids, self.mask, self.labels = (x.to(self.device) for x in padded_samples(samples).values())
        self.lengths = [len(prompt) + len(answer) for prompt, answer in samples]
        answers = [len(answer) for _, answer in samples]
        self.weights = [a / sum(answers) for a in answers]  # of each sample's mean loss
        self.tokens = sum(self.lengths)
        self.padding = 1 - self.tokens / self.ids.numel()
        self.floor = floor(dims, [len(prompt) - 1 for prompt, _ in samples], [a + 1 for a in answers], training=True)
        self.oracle = {}

    def run(self, provider: str) -> torch.Tensor:
        self.models.zero_grad()
        with scope(self.models, provider) as model:
            if provider != "authors-schedule":
                return self._step(model, self.ids, self.mask, self.labels)
            losses = []
            for b, (length, weight) in enumerate(zip(self.lengths, self.weights, strict=True)):
                sample = slice(b, b + 1), slice(0, length)
                losses.append(self._step(model, self.ids[sample], None, self.labels[sample], weight))
            return torch.stack(losses).sum()

    def _step(self, model, ids, mask, labels, weight: float = 1.0) -> torch.Tensor:
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss * weight
        loss.backward()
        return loss.detach()

    def errors(self, provider: str) -> dict[str, float]:
        # What LoRA learns is not what Bitune learns: its oracle is PEFT's over the padded batch in float32.
        oracle = oracle_of(provider)
        if oracle not in self.oracle:
            with float32_weights(self.models.of(oracle)), _checkpointed(self.models.of(oracle)):
                self.oracle[oracle] = self._outputs(oracle)
        with _checkpointed(self.models.of(provider)) if provider == self.yardstick else nullcontext():
            found_loss, found_gradient = self._outputs(provider)
        loss, gradient = self.oracle[oracle]
        return {
            "loss": relative_error(found_loss, loss),
            "gradient": relative_error(found_gradient, gradient),
        }

    def _outputs(self, provider: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and all gradients as one vector; 0 where a provider has none."""
        loss = self.run(provider).float()
        # whichever model runs plain LoRA, its adapter is Bitune's
        model = self.models.bitune if provider.startswith("lora") else self.models.of(provider)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        vector = torch.cat([g.float().flatten() for g in gradients])
        self.models.zero_grad()
        return loss, vector

    def memory(self, device: torch.device, provider: str) -> Memory:
        self.models.zero_grad()  # or a GPU would count the last step's as there before
        return super().memory(device, provider)

    def forget_oracle(self) -> None:
        self.oracle = {}


@contextmanager
def _checkpointed(model):
    """Inside, the formula, which keeps whole attention matrices, keeps those of one layer at a time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names that transformers 5.17 still has alone
        model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            model.gradient_checkpointing_disable()


def parse(argv: list[str] | None):
    p = parser(
        __doc__.partition("\n")[0],
        "authors-schedule, three-pass, one-pass, one-pass+peft, single-stream, single-stream-dual, lora-packed (the "
        "usual backends, or with [BACKEND]), lora; default: all but the single-stream ones",
    )
    p.add_argument("--samples", type=int, nargs="+", metavar="B", help="default: 10; on a CPU 4")
    p.add_argument("--max-lengths", type=int, nargs="+", metavar="L", help="default: 512; on a CPU 128")
    p.add_argument("--fill", action="store_true", help="samples of exactly L tokens, half prompt, half answer")
    add_sweep_options(p, "none")
    args = p.parse_args(argv)
    setup = check_setup(p, args)
    check_minutes(p, args)
    on_cpu = setup.device.type == "cpu"
    args.samples = args.samples or [4 if on_cpu else 10]
    args.max_lengths = args.max_lengths or [min(128 if on_cpu else 512, setup.max_length)]
    check_at_least(p, args, samples=1)
    if bad := [n for n in args.max_lengths if not 4 <= n <= setup.max_length]:
        p.error(f"--max-lengths: expected 4 to {setup.max_length} tokens ({setup.name}), got {bad[0]}")
    names = args.providers or ["authors-schedule", "three-pass", "one-pass", "one-pass+peft", "lora-packed", "lora"]
    args.providers, notes = choose_providers(p, setup, names, without=args.without, training=True)
    return args, setup, notes


def main(argv: list[str] | None = None) -> int:
    start = time.perf_counter()
    args, setup, notes = parse(argv)
    print(EXPLANATION)
    results, facts, text, models, dims = prepare("train_step", args, setup, notes, TrainStep.outputs)
    for model in models.all:
        model.train()
    shapes = sorted({(b, n) for b in args.samples for n in args.max_lengths})
    make_case = partial(TrainStep, models, dims, text, fill=args.fill)
    right = measure(shapes, make_case, setup, args, results, facts, start, f"training step: {title(setup, facts)}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
