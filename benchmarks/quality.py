"""What Bitune and its variants learn, on a tiny model and a synthetic language (``quality_tasks.py``).

A Llama of 3 layers is pretrained on skills, a base model for every third seed, and tuned for a task by each method:
AdamW, the same data, order and learning rate, adapters on every linear layer. Accuracy is that of whole answers: every
token the likeliest after the right ones before it, which is when greedy decoding makes the whole. A run that
<out>/quality.csv has already, from this commit and these settings, isn't repeated. Plot: <out>/quality.png.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure
import torch
from common.report import Results, finish
from common.run import BENCHMARKS, check_at_least, check_names, exits
from peft import IA3Config, LoraConfig, get_peft_model
from quality_tasks import OPERATIONS, SKILLS, TASKS, VOCAB, Batch, joined, samples
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from bitune_kernels import BituneConfig, get_bitune_model
from bitune_kernels.env import cache_folder
from bitune_kernels.testing.timing import provenance

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4)
SIZES |= dict(max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=3)
PRETRAINING = dict(steps=2000, samples_per_skill=16, lr=3e-3)
TUNING = dict(batch=64, lr=5e-3, warmup=0.1, clip=1.0)
TEST = dict(task=2048, skill=256)
BASES = 3  # seed s tunes the base of seed s % BASES


class Method(NamedTuple):
    """How a model is tuned.

    Attributes:
        config: fields of ``BituneConfig``; None: plain PEFT.
        r: rank of LoRA.
        tuner: "lora", "dora" or "ia3".
        lr: factor of the learning rate.
    """

    config: dict | None
    r: int = 8
    tuner: str = "lora"
    lr: float = 1.0


METHODS = {
    "LoRA r8": Method(None),
    "LoRA r10": Method(None, r=10),
    "LoRA r16": Method(None, r=16),
    "DoRA r8": Method(None, tuner="dora"),
    "IA3": Method(None, tuner="ia3", lr=4.0),
    "Bitune": Method({}),
    "Bitune DoRA": Method({}, tuner="dora"),
    "Bitune IA3": Method({}, tuner="ia3", lr=4.0),
    "theta_init 0.1": Method(dict(theta_init=0.1)),
    "theta_init 0.001": Method(dict(theta_init=0.001)),
    "dynamic mixing": Method(dict(dynamic_mixing=True)),
    "No Mixing": Method(dict(variant="no_mixing")),
    "Naive Bidir": Method(dict(variant="naive_bidir")),
    "Shared Weights": Method(dict(variant="shared_weights")),
    "Only Causal": Method(dict(variant="only_causal")),
    "anti-causal": Method(dict(variant="anti_causal")),
    "single stream": Method(dict(variant="single_stream")),
    "single stream r16": Method(dict(variant="single_stream"), r=16),
    "dual": Method(dict(variant="single_stream_dual")),
    "dual beta 0.1": Method(dict(variant="single_stream_dual", beta_init=0.1)),
    "dual beta 0.9": Method(dict(variant="single_stream_dual", beta_init=0.9)),
    "dual per head": Method(dict(variant="single_stream_dual", mixing_granularity="head")),
}
# Low-rank adapters whose prompt is read causally alone, and those that read it in both directions.
CAUSAL = ["LoRA r8", "LoRA r10", "LoRA r16", "DoRA r8", "Only Causal"]
BOTH = ["Bitune", "theta_init 0.1", "theta_init 0.001", "dynamic mixing", "No Mixing", "Naive Bidir", "Shared Weights"]
BOTH += ["Bitune DoRA", "anti-causal"]
BOTH += ["single stream", "single stream r16", "dual", "dual beta 0.1", "dual beta 0.9", "dual per head"]
MAIN = ["LoRA r8", "LoRA r16", "Bitune", "No Mixing", "Naive Bidir", "Only Causal", "single stream", "dual"]
FIELDS = ("task", "method", "seed", "base", "settings", "parameters", "accuracy", "skills_before", "skills_after")
FIELDS += ("final_loss", "seconds")


def settings(task: str, method: str) -> str:
    """A digest of all that a run depends on besides its seed and the code."""
    everything = [SIZES, PRETRAINING, TUNING, TEST, BASES, OPERATIONS, SKILLS, TASKS[task], METHODS[method]]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:12]


def _warmed_up(steps: int):
    """Linear warm-up, then linearly to zero: factor of the learning rate at each step."""
    warmup = TUNING["warmup"] * steps
    return lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))


def _train(model: torch.nn.Module, next_batch, steps: int, lr: float) -> float:
    """Returns the loss of the last step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmed_up(steps))
    model.train()
    for _ in range(steps):
        batch = next_batch()
        loss = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, TUNING["clip"])
        optimizer.step()
        schedule.step()
    model.eval()
    return loss.item()


@torch.no_grad()
def accuracy(model: torch.nn.Module, batch: Batch) -> float:
    """The share of samples all of whose answer tokens are the likeliest ones."""
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels, use_cache=False).logits
    found, expected = logits[:, :-1].argmax(-1), batch.labels[:, 1:]
    return float(((found == expected) | (expected == -100)).all(1).float().mean())


def skills(model: torch.nn.Module) -> float:
    """Mean accuracy on what the base has learned (LOOK, of which it learns little, aside)."""
    generator = torch.Generator().manual_seed(2**20)
    known = [name for name in SKILLS if name != "LOOK"]
    return statistics.mean(accuracy(model, samples(name, TEST["skill"], generator)) for name in known)


def pretrained(seed: int, cache: Path) -> LlamaForCausalLM:
    """The base model of a seed, trained unless ``cache`` has it."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    key = json.dumps([SIZES, PRETRAINING, OPERATIONS, SKILLS, seed, torch.__version__])
    path = cache / f"base-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    generator = torch.Generator().manual_seed(seed)

    def next_batch() -> Batch:
        batch = joined([samples(name, PRETRAINING["samples_per_skill"], generator) for name in SKILLS])
        return batch._replace(labels=batch.ids.masked_fill(batch.mask == 0, -100))  # the whole text

    _train(model, next_batch, PRETRAINING["steps"], PRETRAINING["lr"])
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    torch.save(model.state_dict(), unfinished)
    os.replace(unfinished, path)
    return model


def adapted(base: LlamaForCausalLM, method: Method) -> torch.nn.Module:
    """``base`` with untrained adapters."""
    if method.tuner == "ia3":
        peft = IA3Config(target_modules=LINEARS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    else:
        options = dict(target_modules=LINEARS, use_dora=method.tuner == "dora", task_type="CAUSAL_LM")
        peft = LoraConfig(r=method.r, lora_alpha=method.r, **options)
    if method.config is None:
        return get_peft_model(base, peft)
    return get_bitune_model(base, BituneConfig(peft=peft, **method.config))


def run(task_name: str, method_name: str, seed: int, cache: Path) -> dict:
    """One row: a base tuned by a method for a task."""
    torch.set_num_threads(1)  # beside other runs
    warnings.simplefilter("ignore", FutureWarning)  # names in transformers that PEFT still asks for
    task, method, base = TASKS[task_name], METHODS[method_name], seed % BASES
    model = pretrained(base, cache)
    torch.manual_seed(seed)
    model = adapted(model, method).eval()
    before = skills(model)
    generator = torch.Generator().manual_seed(seed)
    examples = None if task.examples is None else samples(task.operation, task.examples, generator)

    def next_batch() -> Batch:
        if examples is None:
            return samples(task.operation, TUNING["batch"], generator)
        return examples.at(torch.randint(task.examples, (TUNING["batch"],), generator=generator))

    start = time.perf_counter()
    loss = _train(model, next_batch, task.steps, TUNING["lr"] * method.lr)
    seconds = time.perf_counter() - start
    test = samples(task.operation, TEST["task"], torch.Generator().manual_seed(2**20 + seed))
    found = (
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        round(accuracy(model, test), 5),
        round(before, 4),
        round(skills(model), 4),
        round(loss, 5),
        round(seconds, 2),
    )
    values = (task_name, method_name, seed, base, settings(task_name, method_name), *found)
    return dict(zip(FIELDS, values, strict=True))


class Estimate(NamedTuple):
    """A mean over seeds and its standard error, None for one seed."""

    mean: float
    error: float | None

    def __format__(self, sign: str) -> str:
        return f"{self.mean:{sign}.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")

    @property
    def is_clear(self) -> bool:
        """Whether it is more than two standard errors from zero."""
        return self.error is not None and abs(self.mean) > 2 * self.error


def estimate(values: Sequence[float]) -> Estimate:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.mean(values), error)


def difference(rows: Sequence[dict], method: str, other: str) -> Estimate | None:
    """Accuracy of ``method`` less that of ``other``, paired by seed."""
    found, expected = ({r["seed"]: r["accuracy"] for r in rows if r["method"] == name} for name in (method, other))
    both = sorted(found.keys() & expected.keys())
    return estimate([found[seed] - expected[seed] for seed in both]) if both and method != other else None


def gap(rows: Sequence[dict], methods: Sequence[str], others: Sequence[str]) -> Estimate:
    """The mean accuracy of some methods less that of others, by seed."""

    def mean(names: Sequence[str], seed: int) -> float:
        return statistics.mean(r["accuracy"] for r in rows if r["method"] in names and r["seed"] == seed)

    return estimate([mean(methods, seed) - mean(others, seed) for seed in sorted({r["seed"] for r in rows})])


def table(rows: Sequence[dict]) -> str:
    """Markdown: each task's methods, the best first."""
    lines = []
    for task in dict.fromkeys(r["task"] for r in rows):
        of_task = [r for r in rows if r["task"] == task]
        lines += [f"\n{task}, differences paired by seed, * where they exceed two standard errors:\n"]
        lines += ["| method | parameters | seeds | accuracy | less Bitune's | less LoRA r8's | skills before | after |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        by_method = {name: [r for r in of_task if r["method"] == name] for name in METHODS}
        means = {name: statistics.mean(r["accuracy"] for r in own) for name, own in by_method.items() if own}
        for name in sorted(means, key=means.get, reverse=True):
            own = by_method[name]
            cells = [name, f"{own[0]['parameters']:,}", str(len(own)), f"{estimate([r['accuracy'] for r in own])}"]
            for other in ("Bitune", "LoRA r8"):
                d = difference(of_task, name, other)
                cells.append("" if d is None else f"{d:+}{' *' * d.is_clear}")
            cells += [f"{statistics.mean(r[field] for r in own):.2f}" for field in ("skills_before", "skills_after")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, rows: Sequence[dict], title: str) -> None:
    """Accuracy of each method with its standard error, a panel for each task."""
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    names = [name for name in METHODS if any(r["method"] == name for r in rows)]
    figure = matplotlib.figure.Figure(figsize=(1 + 4.5 * len(tasks), 1.5 + 0.25 * len(names)), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks, strict=True):
        for i, name in enumerate(names):
            values = [r["accuracy"] for r in rows if (r["task"], r["method"]) == (task, name)]
            if values:
                mean, error = estimate(values)
                axes.barh(i, mean, xerr=error or 0, color="C0" if METHODS[name].config is None else "C1", height=0.7)
                axes.plot(values, [i] * len(values), ".", color="black", markersize=3)
        axes.set(title=task, xlabel="accuracy of whole answers")
        axes.set_yticks(range(len(names)), names)
        axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None):
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--methods", nargs="+", metavar="NAME", default=MAIN, help=f"all, or of: {', '.join(METHODS)}")
    p.add_argument("--tasks", nargs="+", metavar="NAME", default=list(TASKS), help=f"of {', '.join(TASKS)}")
    p.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, 2, ... (default: 3)")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, of one thread each (default: cores)")
    p.add_argument("--cache", type=Path, default=cache_folder() / "quality", help="folder of the base models")
    p.add_argument("--out", type=Path, default=BENCHMARKS / "results", help="folder of CSV file and plot")
    args = p.parse_args(argv)
    if args.methods == ["all"]:
        args.methods = list(METHODS)
    args.methods = check_names(p, "methods", args.methods, METHODS)
    args.tasks = check_names(p, "tasks", args.tasks, TASKS)
    check_at_least(p, args, seeds=1, workers=1)
    for name in ("cache", "out"):
        if getattr(args, name).is_file():
            p.error(f"--{name}: expected a folder, got the file {getattr(args, name)}")
    return args


def read(path: Path) -> list[dict]:
    """The rows of ``path``, numbers as numbers."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    whole, real = ("seed", "base", "parameters"), FIELDS[6:]
    return [r | {n: float(r[n]) for n in real} | {n: int(r[n]) for n in whole} for r in rows]


def finished(path: Path, facts: dict) -> list[dict]:
    """The rows of ``path`` that this commit, unchanged, has written by these settings."""
    if facts["git_dirty"] or not path.is_file():
        return []

    def same(row: dict) -> bool:
        if row["task"] not in TASKS or row["method"] not in METHODS:
            return False
        here = all(row[name] == str(facts[name]) for name in ("git_sha", "git_dirty", "torch", "cpu"))
        return here and row["settings"] == settings(row["task"], row["method"])

    return [row for row in read(path) if same(row)]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    facts = provenance("cpu") | {"threads": 1, "benchmark": "quality"}
    with exits("quality"):
        results = Results(args.out / "quality.csv", [*facts, *FIELDS])
    jobs = [(task, method, seed) for seed in range(args.seeds) for task in args.tasks for method in args.methods]
    before = [r for r in finished(results.path, facts) if (r["task"], r["method"], r["seed"]) in set(jobs)]
    left = [job for job in jobs if job not in {(r["task"], r["method"], r["seed"]) for r in before}]
    print(f"{len(jobs)} runs, of which {len(before)} are there already; base models in {args.cache}")
    pool = ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        if left:
            bases = sorted({seed % BASES for _, _, seed in left})
            with tqdm(total=len(bases), desc="pretraining", unit="base", disable=None) as bar:
                for future in as_completed([pool.submit(_pretrain, base, args.cache) for base in bases]):
                    future.result()
                    bar.update()
        with tqdm(total=len(left), desc="tuning", unit="run", disable=None) as bar:
            for future in as_completed([pool.submit(run, *job, args.cache) for job in left]):
                results.append([facts | future.result()])
                bar.update()
    except KeyboardInterrupt:
        print("interrupted: runs that were done are kept")
    finally:
        pool.shutdown(cancel_futures=True)
    print(table([*before, *results.rows]))
    names = f"Llama of 3 x 64, tuned by {TUNING['batch']} samples a step; bars: standard error over seeds"
    finish(results, names, draw, before)
    return 0


def _pretrain(seed: int, cache: Path) -> None:
    torch.set_num_threads(1)
    pretrained(seed, cache)


if __name__ == "__main__":
    sys.exit(main())
