"""Prefill of Bitune on real instructions: the paper's three passes, one pass, and one plain LoRA pass.

Every provider runs on the same weights and the same tokens, in turns. A provider that disagrees with the
reference backend in float32 (LoRA: with PEFT's over the padded batch) is not timed. Rows go to <out>/prefill.csv, a
plot of this run to <out>/prefill.png.

    three-pass      the paper's schedule over the padded batch, authors-schedule: sample by sample, without padding
    one-pass        this package
    lora            plain LoRA as it is used: PEFT's layers, the padded batch, all rows in the last layer
    lora-packed     plain LoRA as well optimised as one-pass: the same rows less one stream, attention backend, LoRA
                    layer and trimmed last layer
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial

import torch
from common.floor import Dims, floor
from common.models import Models, float32_inference, scope
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
from common.text import Text, padded

EXPLANATION = """\
A prompt runs through Bitune's two streams (two LoRA adapters) and leaves one mixed cache: three-pass calls the model
three times for that, one-pass[backend] once. Units of cost: lora, plain LoRA as it is used; lora-packed, optimised.
"""


class Prefill(Case):
    """Prompts, padded on the left as generate() has them."""

    outputs = ("logits", "cache")

    def __init__(self, models: Models, dims: Dims, text: Text, batch: int, length: int):
        self.models, self.batch, self.length = models, batch, length
        rows = text.prompts(batch, length)
        lengths = [len(row) for row in rows]
        device = next(models.bitune.parameters()).device
        self.ids, self.mask = (x.to(device) for x in padded(rows, "left"))
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)  # else padding shifts LoRA's rotary angles
        self.lengths, self.tokens = lengths, sum(lengths)
        self.padding = 1 - self.tokens / self.ids.numel()
        self.floor = floor(dims, [n - 1 for n in lengths], [1] * batch, training=False)
        self.oracle = {}

    def providers(self, names: Sequence[str]) -> list[str]:
        alone = self.batch == 1 and "three-pass" in names  # then authors-schedule is the same
        return [name for name in names if not (alone and name == "authors-schedule")]

    @torch.no_grad()
    def run(self, provider: str) -> list:
        """What the model returns for the batch, or for each sample."""
        options = dict(use_cache=True, logits_to_keep=1)
        with scope(self.models, provider) as model:
            if provider == "authors-schedule":
                return [
                    model(input_ids=row[None, -n:], **options) for row, n in zip(self.ids, self.lengths, strict=True)
                ]
            inputs = dict(input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions)
            return [model(**inputs, **options)]

    def errors(self, provider: str) -> dict[str, float]:
        # What LoRA computes is not Bitune: its oracle is PEFT's in float32.
        oracle = oracle_of(provider)
        if oracle not in self.oracle:
            with float32_inference(self.models.of(oracle)):
                self.oracle[oracle] = self._outputs(oracle)
        expected, found = self.oracle[oracle], self._outputs(provider)
        return {
            name: max(relative_error(f, e) for f, e in zip(found[name], expected[name], strict=True))
            for name in self.outputs
        }

    def _outputs(self, provider: str) -> dict[str, list[torch.Tensor]]:
        """The next-token logits of each sample, and each layer's keys and values at the real tokens."""
        logits, cache = [], []
        for out in self.run(provider):
            logits += out.logits[:, -1]
            layers = out.past_key_values.layers
            cache.append([x for layer in layers for x in (layer.keys, layer.values)])  # [batch, heads, seq, dim] each
        joined = []
        for tensors in zip(*cache, strict=True):
            samples = zip((sample for x in tensors for sample in x), self.lengths, strict=True)
            joined.append(torch.cat([sample[:, -n:] for sample, n in samples], dim=1))
        return {"logits": logits, "cache": joined}

    def forget_oracle(self) -> None:
        self.oracle = {}


def parse(argv: list[str] | None):
    p = parser(
        __doc__.partition("\n")[0],
        "authors-schedule, three-pass, one-pass, one-pass+peft, single-stream, single-stream-dual, lora-packed (the "
        "usual backends, or with [BACKEND]), lora; default: authors-schedule three-pass one-pass lora-packed lora",
    )
    p.add_argument("--batch-sizes", type=int, nargs="+", metavar="B", help="default: 1 4")
    p.add_argument("--lengths", type=int, nargs="+", metavar="P", help="default: 64 256, on a GPU up to 2048")
    add_sweep_options(p, "4 on a CPU unless shapes are given")
    args = p.parse_args(argv)
    setup = check_setup(p, args)
    check_minutes(p, args)
    on_cpu = setup.device.type == "cpu"
    if args.minutes is None and on_cpu and args.batch_sizes is None and args.lengths is None:
        args.minutes = 4
    args.batch_sizes = args.batch_sizes or [1, 4]
    args.lengths = args.lengths or [
        n for n in ((64, 256) if on_cpu else (64, 256, 1024, 2048)) if n <= setup.max_length
    ]
    check_at_least(p, args, batch_sizes=1)
    if bad := [n for n in args.lengths if not 2 <= n <= setup.max_length]:
        p.error(f"--lengths: expected 2 to {setup.max_length} tokens ({setup.name}), got {bad[0]}")
    names = args.providers or ["authors-schedule", "three-pass", "one-pass", "lora-packed", "lora"]
    args.providers, notes = choose_providers(p, setup, names, without=args.without, training=False)
    return args, setup, notes


def main(argv: list[str] | None = None) -> int:
    start = time.perf_counter()
    args, setup, notes = parse(argv)
    print(EXPLANATION)
    results, facts, text, models, dims = prepare("prefill", args, setup, notes, Prefill.outputs)
    shapes = sorted({(b, n) for b in args.batch_sizes for n in args.lengths})
    make_case = partial(Prefill, models, dims, text)
    right = measure(shapes, make_case, setup, args, results, facts, start, f"prefill: {title(setup, facts)}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
