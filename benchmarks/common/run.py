"""From the arguments to the measurements: what can run, whether it is right, how long it takes."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from pathlib import Path

import torch
import torch._dynamo.config
from tqdm import tqdm

from bitune_kernels import backends
from bitune_kernels.backends import OWN
from bitune_kernels.testing.timing import interleaved, provenance

from .floor import PEAK_FIELDS, Floor, dims_of, head_dim_of, measured_peaks
from .memory import Memory, memory_of
from .models import (
    DEFAULT_MODEL,
    MODELS,
    TWINS,
    Machine,
    Setup,
    attach,
    default_dtype,
    find_device,
    load_base,
    model_config,
)
from .report import CASE_FIELDS, THREE_PASS, TIME_FIELDS, Results, Table, finish, whole_model
from .text import Text

BENCHMARKS = Path(__file__).resolve().parents[1]
DTYPES = ("bfloat16", "float16", "float32")
# A provider may be off by twice the error of the reference backend in the same dtype, or by this much: relative,
# norm of the difference over norm. A mask that is wrong in one layer of many shows as several percent.
SMALLEST_BOUND = {"bfloat16": 2 * 2**-7, "float16": 2 * 2**-10, "float32": 1e-4}
INTERRUPTED = "interrupted: shapes that were done are kept"
PER_BACKEND = ("one-pass", "one-pass+peft", *TWINS)  # providers with an attention backend in brackets


def parser(description: str, providers: str, *, timed: bool = True) -> argparse.ArgumentParser:
    """The options that all benchmarks of whole models have; those of timing only where it is ``timed``."""
    p = argparse.ArgumentParser(description=description)
    kinds = f"{', '.join(MODELS)} (random weights) or a model's folder"
    p.add_argument("--model", default=DEFAULT_MODEL, help=f"{kinds}; plots are named by it but for the default")
    p.add_argument("--layers", type=int, help="cut the model to its first layers (default: all)")
    p.add_argument("--instructions", type=Path, default=BENCHMARKS / "instructions.jsonl", help='lines of {"prompt"}')
    if timed:
        add_run_options(p, providers, seconds=10.0, min_rounds=3, warmup=1)
    else:
        add_machine_options(p, providers)
    return p


def add_machine_options(p: argparse.ArgumentParser, providers: str):
    """The options that every benchmark has."""
    default = "default: bfloat16; on a CPU float32 where that is faster, and always in bilevel.py"
    p.add_argument("--dtype", choices=DTYPES, help=default)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    p.add_argument("--providers", nargs="+", metavar="NAME", help=providers)
    p.add_argument("--out", type=Path, default=BENCHMARKS / "results", help="folder of CSV file and plot")


def add_run_options(p: argparse.ArgumentParser, providers: str, *, seconds: float, min_rounds: int, warmup: int):
    """Those, and the ones of benchmarks that time, with these defaults."""
    add_machine_options(p, providers)
    p.add_argument("--seconds", type=float, default=seconds, help=f"of timing per shape (default: {seconds:g})")
    p.add_argument("--min-rounds", type=int, default=min_rounds, help=f"at least (default: {min_rounds})")
    p.add_argument("--warmup", type=int, default=warmup, help=f"rounds before that (default: {warmup})")


def add_sweep_options(p: argparse.ArgumentParser, minutes: str):
    """Those of benchmarks that walk through shapes with every backend; ``minutes``: the default of their limit."""
    p.add_argument(
        "--without", nargs="+", choices=backends.BACKENDS, default=[], help="not timed although it could run"
    )
    p.add_argument(
        "--minutes",
        type=float,
        help=f"leave out shapes that would end later, and fail where most are (default: {minutes})",
    )


def check_minutes(p: argparse.ArgumentParser, args) -> None:
    if args.minutes is not None and not args.minutes > 0:
        p.error(f"--minutes: expected a number > 0, got {args.minutes}")


def check_at_least(p: argparse.ArgumentParser, args, **smallest: float) -> None:
    """Refuse an option whose number, or one of whose numbers, is below its smallest or not finite; None is none."""
    for name, least in smallest.items():
        given = getattr(args, name, None)
        values, kind = (given, "numbers") if isinstance(given, list) else ([given], "a number")
        if bad := [x for x in values if x is not None and not least <= x < math.inf]:
            p.error(f"--{name.replace('_', '-')}: expected {kind} >= {least}, got {bad[0]}")


def check_names(p: argparse.ArgumentParser, option: str, given: Sequence[str], known: Collection[str]) -> list[str]:
    """The names, once each; unknown ones are refused."""
    if unknown := [x for x in given if x not in known]:
        p.error(f"--{option}: expected names of {', '.join(known)}; got {unknown[0]!r}")
    return list(dict.fromkeys(given))


def check_machine(p: argparse.ArgumentParser, args) -> Machine:
    """Everything about these options that can be wrong, before any work."""
    check_at_least(p, args, threads=1, min_rounds=1, warmup=0, seconds=0)
    if args.out.exists() and not args.out.is_dir():
        p.error(f"--out: expected a folder, got the file {args.out}")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = find_device(p, args.device)
    return Machine(device, getattr(torch, args.dtype) if args.dtype else default_dtype(device))


def check_setup(p: argparse.ArgumentParser, args) -> Setup:
    """Everything about the arguments of ``parser`` that can be wrong, before any work."""
    check_at_least(p, args, layers=1)
    machine = check_machine(p, args)
    folder, config = model_config(p, args.model)
    text_config = config.get_text_config()
    layers = args.layers or text_config.num_hidden_layers
    if layers > text_config.num_hidden_layers:
        p.error(f"--layers: expected at most {text_config.num_hidden_layers} ({args.model}), got {layers}")
    text_config.num_hidden_layers = layers
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:layers]
    if not args.instructions.is_file():
        p.error(f"--instructions: {args.instructions} is not a file")
    name = args.model if folder is None else folder.resolve().name
    return Setup(machine.device, machine.dtype, name, config, folder, layers)


def backend_reasons(setup: Setup, *, training: bool) -> dict[str, str | None]:
    """Each backend of the package, and why it can't run this model here, or None."""
    c = setup.text_config
    return reasons_against(
        device=setup.device,
        dtype=setup.dtype,
        head_dim=head_dim_of(c),
        head_dim_v=head_dim_of(c),
        window=getattr(c, "sliding_window", None),
        softcap=getattr(c, "attn_logit_softcapping", None),
        requires_grad=training,
    )


def reasons_against(**call) -> dict[str, str | None]:
    """Each backend of the package, and why it can't run a call here (facts as in ``backends.resolve``), or None."""
    reasons = {}
    for name in backends.BACKENDS:
        try:
            reasons[name] = backends.load(name).unsupported(**call)
        except (ImportError, RuntimeError) as e:
            reasons[name] = f"{type(e).__name__}: {_first_line(e)}"
    return reasons


def _first_line(e: Exception) -> str:
    return str(e).strip().partition("\n")[0]


def not_usual(name: str, device: torch.device) -> str | None:
    """Why a backend that can run is timed only where it is asked for by name, or None."""
    if name == "reference":
        return "the oracle, written to be read; ask for it by name"
    if device.type == "cpu" and name not in backends.AUTO:
        return "compiles for minutes on a CPU; ask for it by name"
    return None


def _usual_backends(reasons: dict[str, str | None], device: torch.device) -> tuple[list[str], list[str]]:
    """Those of a name of ``PER_BACKEND`` without one, and a note on each backend that it leaves out."""
    chosen, notes = [], []
    for backend, reason in reasons.items():
        reason = reason or not_usual(backend, device)
        if reason is None:
            chosen.append(backend)
        else:
            notes.append(f"left out: {backend}: {reason}")
    return chosen, notes


def choose_providers(
    p: argparse.ArgumentParser,
    setup: Setup,
    names: Sequence[str],
    *,
    without: Sequence[str] = (),
    training: bool,
) -> tuple[list[str], list[str]]:
    """The providers behind the names of the command line, and a note on each backend that can't run."""
    reasons = backend_reasons(setup, training=training) | dict.fromkeys(without, "--without")
    single = (*THREE_PASS, "lora")
    chosen, notes = [], []
    for name in names:
        provider, _, backend = name.partition("[")
        backend = backend.removesuffix("]")
        if name in PER_BACKEND:
            usual, notes = _usual_backends(reasons, setup.device)
            chosen += [f"{name}[{backend}]" for backend in usual]
        elif provider in PER_BACKEND and name == f"{provider}[{backend}]" and backend in reasons:
            if reasons[backend] is not None:
                p.error(f"--providers: {name} can't run here: {reasons[backend]}")
            chosen.append(name)
        elif name in single:
            chosen.append(name)
        else:
            known = ", ".join([*single, *PER_BACKEND])
            p.error(f"--providers: expected names of {known}, or one with [{'], ['.join(reasons)}]; got {name!r}")
    return list(dict.fromkeys(chosen)), notes


def begin(benchmark: str, args, setup: Setup, fields: Sequence[str]) -> tuple[Results, dict, Text]:
    """The file of the results, with the columns of the facts and ``fields``; the facts; the text of the prompts."""
    facts = provenance(setup.device) | {"benchmark": benchmark, "model": setup.name, "layers": setup.layers}
    facts |= {"dtype": setup.dtype_name}
    if hasattr(args, "warmup"):  # it times
        facts["warmup"] = args.warmup
    with exits(benchmark):
        results = Results(args.out / f"{benchmark}.csv", [*facts, *fields])
        return results, facts, Text(args.instructions, setup.text_config.vocab_size, setup.folder)


@contextmanager
def exits(benchmark: str):
    """Inside, what is wrong with a file ends the benchmark in one line."""
    try:
        yield
    except (OSError, ValueError, KeyError) as e:
        raise SystemExit(f"{benchmark}.py: error: {type(e).__name__}: {e}") from None


def prepare(benchmark: str, args, setup: Setup, notes: Sequence[str], outputs: Sequence[str]):
    """Everything between the arguments and the first measurement, with what it says on the terminal."""
    fields = ["text", *PEAK_FIELDS, *CASE_FIELDS, *TIME_FIELDS]
    fields += [f"{kind}_{name}" for kind in ("error", "bound") for name in outputs]
    results, facts, text = begin(benchmark, args, setup, fields)
    facts |= {"text": text.source} | measured_peaks(setup.device, setup.dtype)
    print(f"model: {title(setup, facts)}, LoRA r=8 on every linear")
    print(f"text: {len(text.ids)} instructions, token ids of {text.source}")
    for note in notes:
        print(note)
    with exits(benchmark):
        base = load_base(setup)
        dims = dims_of(base)
        models = attach(base, args.providers)
    return results, facts, text, models, dims


def title(setup: Setup, facts: dict) -> str:
    """Model and machine in one line."""
    return f"{setup.name}, {setup.layers} layers, {setup.dtype_name}, {machine_name(facts)}"


def machine_name(facts: dict) -> str:
    return facts["gpu"] or f"{facts['cpu']}, {facts['threads']} threads"


def oracle_of(provider: str) -> str:
    """The provider that computes the same in float32 by the formula; for plain LoRA PEFT's own."""
    if provider.startswith("lora"):
        return "lora"
    name = provider.partition("[")[0]
    return f"{name if name in TWINS else 'one-pass'}[reference]"


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| in float32; infinite where ``found`` is not finite."""
    if not bool(torch.isfinite(found).all()):
        return math.inf
    expected = expected.float()
    return float((found.float() - expected).norm() / expected.norm().clamp_min(1e-30))


class Wrong(Exception):
    """A provider computes something else than the oracle."""


def check_errors(provider: str, errors: dict[str, float], bounds: dict[str, float]) -> None:
    """Refuse a provider that is off by more than rounding explains."""
    bad = [f"{e:.1e} (bound {bounds[name]:.1e}) in {name}" for name, e in errors.items() if not e <= bounds[name]]
    if bad:
        raise Wrong(f"{provider} differs from the oracle by {', '.join(bad)}")


def timed(calls: dict, args, device: torch.device, **options) -> dict:
    """``interleaved`` with the options of the command line."""
    given = dict(seconds=args.seconds, min_rounds=args.min_rounds, warmup=args.warmup)
    return interleaved(calls, **given, device=device, **options)


def measure_each(
    shapes: Sequence[tuple], measure: Callable[..., list[dict]], results: Results, facts: dict, line: Callable
) -> bool:
    """Measure shape after shape: rows to ``results``, a line of each to the terminal. What was done is kept when it is
    interrupted.

    Args:
        measure: (*shape) -> rows of the CSV file without ``facts``. It may raise ``Wrong``.
        line: row -> line of the table.

    Returns:
        whether all providers computed what they should.
    """
    right = True
    with tqdm(total=len(shapes), unit="shape", leave=False, disable=None) as bar:
        try:
            for shape in shapes:
                try:
                    rows = measure(*shape)
                except Wrong as e:
                    right = False
                    tqdm.write(f"{shape}: not measured: {e}")
                else:
                    results.append([facts | row for row in rows])
                    for row in rows:
                        tqdm.write(line(row))
                bar.update()
        except KeyboardInterrupt:
            tqdm.write(INTERRUPTED)
    return right


def sweep(
    benchmark: str,
    args,
    setup: Setup,
    fields: Sequence[str],
    shapes: Sequence[tuple],
    measure: Callable[..., list[dict]],
    line: Callable[[dict], str],
    draw: Callable[..., str | None],
    columns: str,
    heading: str | None = None,
) -> int:
    """A whole benchmark of one model by ``measure_each``, behind its arguments. Returns the exit code.

    Args:
        fields: columns of the CSV file, behind those of the facts.
        measure: (models, text, args, setup, *shape) -> rows.
        line, draw: as in ``measure_each``, and as ``report.plot``.
        columns: what a line of the table has.
        heading: of the plot; None: the benchmark's name.
    """
    results, facts, text = begin(benchmark, args, setup, fields)
    with exits(benchmark):
        models = attach(load_base(setup), args.providers)
    print(f"{title(setup, facts)}\n{columns}")
    right = measure_each(shapes, partial(measure, models, text, args, setup), results, facts, line)
    finish(results, f"{heading or benchmark}: {title(setup, facts)}", draw)
    return 0 if right else 1


class Case:
    """One shape of a benchmark: its inputs, one call per provider, and what the oracle says.

    Attributes:
        batch, length: the shape.
        tokens: real tokens of the batch.
        padding: share of the padded batch's places that hold none.
        floor: what one pass must cost.
        outputs: names of what is compared with the oracle.
        yardstick: the provider that is the oracle in the dtype of the run; others may be twice as far off.
        device_alone: whether a GPU's own time is what is asked for (``interleaved``), and not that of a call.
    """

    batch: int
    length: int
    tokens: int
    padding: float
    floor: Floor
    outputs: tuple[str, ...]
    yardstick = "one-pass[reference]"
    device_alone = False

    @property
    def label(self) -> str:
        """The shape on the terminal."""
        return f"batch {self.batch}, length {self.length}"

    def facts(self) -> dict:
        """The columns ``CASE_FIELDS``."""
        floors = (round(x, 4) for x in astuple(self.floor))
        values = (self.batch, self.length, self.tokens, round(self.padding, 4), *floors)
        return dict(zip(CASE_FIELDS, values, strict=True))

    def providers(self, names: Sequence[str]) -> list[str]:
        """What is timed here where these were chosen."""
        return list(names)

    def run(self, provider: str) -> object:
        """One call, the one that is timed."""
        raise NotImplementedError

    def memory(self, device: torch.device, provider: str) -> Memory | float | None:
        """What one call needs at its peak, as the table of the benchmark takes it."""
        return memory_of(device, partial(self.run, provider))

    def errors(self, provider: str) -> dict[str, float]:
        """Run a provider and compare each of its outputs with the oracle."""
        raise NotImplementedError

    def forget_oracle(self) -> None:
        """Free what is needed for ``errors`` only."""


def measure(
    shapes: Sequence[tuple],
    make_case: Callable[..., Case],
    setup: Machine,
    args,
    results: Results,
    facts: dict,
    start: float,
    heading: str,
    table: Table | None = None,
) -> bool:
    """Check, time and report each shape (batch, length, ...), smallest first; an interrupted run keeps what is done.

    Args:
        start: when ``args.minutes``, if it is a number, began (``time.perf_counter``).
        heading: of the plot.
        table: default: that of whole models.

    Returns:
        whether nothing failed (``_check``), and ``args.minutes`` left out no more than half of the shapes.
    """
    # FlexAttention is compiled for each kind of heads and masks, for single rows and samples, with and without
    # gradients, and runs in no more forms than this: 8 before.
    torch._dynamo.config.recompile_limit = 64
    table = whole_model(args.providers, setup.device) if table is None else table
    print(table.head())
    deadline = None if args.minutes is None else start + 60 * args.minutes
    right, left_out, round_per_token = True, 0, 0.0
    bar = tqdm(total=len(shapes), unit="shape", leave=False, disable=None)
    try:
        for done, shape in enumerate(sorted(shapes, key=lambda shape: shape[0] * shape[1])):
            batch, length = shape[:2]
            # Of timed rounds alone, since the first checks compile kernels; a check takes about three rounds.
            expected = round_per_token * batch * length
            expected = (3 + args.warmup) * expected + max(args.seconds, args.min_rounds * expected)
            if deadline is not None and done and time.perf_counter() + expected > deadline:
                tqdm.write(f"batch {batch}, length {length}: left out: it would pass --minutes")
                left_out += 1
                continue
            case = make_case(*shape)
            bar.set_description(f"{case.label}: checking")
            checks, failed = _check(case, args.providers, setup)
            right = right and not failed
            if checks:
                memory = {n: case.memory(setup.device, n) for n in checks}
                bar.set_description(f"{case.label}: timing")
                times = timed(
                    {name: partial(case.run, name) for name in checks},
                    args,
                    setup.device,
                    device_alone=case.device_alone,
                    progress=lambda share, done=done: _advance(bar, done + share),
                )
                rows = table.rows(facts | case.facts(), case, times, checks, memory)
                results.append(rows)
                for line in table.lines(rows):
                    tqdm.write(line)
                round_per_token = sum(t.quantile(0.5) for t in times.values()) / (batch * length)
            _advance(bar, done + 1)
    except KeyboardInterrupt:
        tqdm.write(INTERRUPTED)
    finally:
        bar.close()
    finish(results, heading, table.draw)
    if left_out:
        print(f"{len(shapes) - left_out} of {len(shapes)} shapes, as many as --minutes allow")
    return right and 2 * left_out <= len(shapes)


def _advance(bar, position: float) -> None:
    bar.n = round(position, 2)
    bar.refresh()


def _check(case: Case, providers: Sequence[str], setup: Machine) -> tuple[dict[str, dict[str, float]], bool]:
    """Errors and bounds of each provider that may be timed, and whether something failed.

    A provider that is wrong has failed, and so has a kernel of the package that raised anything but a lack of memory.
    Peers may not be able to run a shape; but where nothing is left to time, that has failed too.
    """
    checks, failed = {}, False
    try:
        bounds = _bounds(case, setup)
    except RuntimeError as e:
        tqdm.write(f"{case.label}: not timed: the oracle failed: {_first_line(e)}")
        return {}, True
    for name in case.providers(providers):
        try:
            errors = case.errors(name)
            check_errors(name, errors, bounds)
            checks[name] = {f"error_{what}": e for what, e in errors.items()}
            checks[name] |= {f"bound_{what}": bound for what, bound in bounds.items()}
        except Wrong as e:
            failed = True
            tqdm.write(f"{case.label}: not timed: {e}")
        except Exception as e:  # compilers of kernels raise exceptions of their own
            own = name.removesuffix("]").rpartition("[")[2] in OWN
            failed |= own and not isinstance(e, torch.OutOfMemoryError)
            tqdm.write(f"{case.label}: not timed: {name}: {type(e).__name__}: {_first_line(e)}")
    case.forget_oracle()
    return checks, failed or not checks


def _bounds(case: Case, setup: Machine) -> dict[str, float]:
    smallest = SMALLEST_BOUND[setup.dtype_name]
    if setup.dtype == torch.float32:  # the oracle itself
        return dict.fromkeys(case.outputs, smallest)
    return {name: max(2 * error, smallest) for name, error in case.errors(case.yardstick).items()}
