"""Everything that only a CUDA GPU can show, in one command: make gpu, or with ARGS="--stages tests,large" parts of it

    build      the native extension, as users have it and with an error in place of endless waits (BITUNE_DEBUG)
    first      forward of a few cases: what hangs ends here
    tests      the table of cases, a CUDA graph and the list of known bugs on the GPU (tests/test_ops.py,
               tests/test_kernel_bugs.py)
    operators  bitune_prefill, torch.compile and torch.library.opcheck
    repeats    250 runs of forward and backward give the same bits, and the right ones
    sanitizer  compute-sanitizer's memcheck, racecheck, initcheck and synccheck on a few small cases. By its release
               notes it gives false alarms over what these kernels do: before CUDA 13.5 over cp.async with zeros
               (memcheck, initcheck), before 13.4 over mbarriers (racecheck). The first on PATH is taken
    large      tensors of more than 2^31 elements: samples at both ends against the same samples alone
    attention, prefill, train_step, generate, lora
               the benchmarks of these names, of whole models at full depth, without the backends that are at fault
    brief      the least of them, only where --stages has it: attention at three lengths, a prompt of 128 and of 2,000
               tokens and the paper's update of gemma-2b; without the peers flex, which compiles for minutes, and flash
    tune       the fastest tiles of the Triton kernels (python -m bitune_kernels.tune), only where --stages has it: they
               stay in the user's cache, and all that runs from then on has them

All of it takes up to 4 hours. On a GPU that is there for 30 minutes run --stages build,first,repeats,brief, which
takes up to 25. Where a call must end within ten minutes, --minutes 9 ends it, and the same command goes on from
there. One line per stage, backend and tool, none of which takes longer than 9 minutes; a failed one does not stop the
others. Logs go to <out>/gpu_check/, the lines with the commit, the versions and the machine to <out>/gpu_check.csv.
What has passed there by the same commit on the same machine isn't run again without --again. Nothing is installed:
build/gpu_check/ has the builds, named by their sources, and bitune_kernels/ the one that a stage uses, in the end the
one that users have.
BITUNE_CUDA_ARCHS=90 gives a Hopper GPU the kernels for Ampere and later.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

from common.report import Results  # noqa: E402
from common.run import check_minutes, relative_error  # noqa: E402

from bitune_kernels import SegmentPlan, backends, bitune_attention, bitune_prefill, custom_ops  # noqa: E402
from bitune_kernels.backends import OWN  # noqa: E402
from bitune_kernels.testing import DTYPES, Case, assert_backend_within_budget, assert_prefilled, leaves, run_case  # noqa: E402
from bitune_kernels.testing.timing import provenance  # noqa: E402

# Seconds that each command of a stage may take.
SECONDS = {
    "build": 180,
    "first": 120,
    "tests": 400,
    "operators": 240,
    "repeats": 180,
    "sanitizer": 300,
    "large": 240,
    "brief": 240,
    "attention": 540,
    "prefill": 540,
    "train_step": 540,
    "generate": 240,
    "lora": 120,
    "tune": 540,
}
DEFAULT_STAGES = ",".join(stage for stage in SECONDS if stage not in ("brief", "tune"))
ENDED = "ended at its limit"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TIMED = ("brief", "attention", "prefill", "train_step", "generate", "lora")
# The others run on the debug build.
ON_RELEASE = ("repeats", "large", *TIMED)
# The longest prompt of each model: phi-2 has learned no more positions.
MODELS = {"gemma-2b": 8192, "llama3-8b": 8192, "phi-2": 2048}
PROMPTS = (128, 512, 2048, 8192)

# Several tiles and none, grouped heads, every kind of gradient that sums over rows or heads.
REPEATED = (
    Case(prompts=(300, 1, 0, 129), answers=(1, 40, 65, 0), heads=(8, 2), head_dim=64, alpha="head"),
    Case(prompts=(500, 133), answers=(1, 150), heads=(8, 1), head_dim=128),
    Case(prompts=(65, 130), answers=(31, 63), heads=(4, 2), head_dim=256, window=40, softcap=2.0),
    Case(prompts=(300, 65), answers=(63, 5), heads=(4, 4), head_dim=128, num_streams=1, shared_qkv=True, beta="head"),
    Case(prompts=(127, 65), answers=(9, 127), heads=(6, 2), head_dim=80, sinks=True, prefix=(65, 3)),
)
# Small, since a sanitizer is slow, but with empty segments, partial tiles and strides.
SMALL = (
    Case(prompts=(0, 1, 63, 65), answers=(65, 63, 1, 0), head_dim=64, strided=True),
    Case(prompts=(130, 7), answers=(1, 66), heads=(4, 1), head_dim=128, window=40, sinks=True, prefix=(3, 65)),
    Case(prompts=(65, 20), answers=(31, 0), heads=(4, 4), num_streams=1, shared_qkv=True, beta="scalar", softcap=2.0),
)


# the native extension


def builds() -> Path:
    """The folder of the builds of these sources, for the architectures that the environment asks for."""
    digest = hashlib.sha256(os.environ.get("BITUNE_CUDA_ARCHS", "").encode())
    files = [*ROOT.glob("csrc/**/*"), *ROOT.glob("python/*"), ROOT / "CMakeLists.txt", ROOT / "setup.py"]
    for path in sorted(path for path in files if path.is_file()):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return ROOT / "build" / "gpu_check" / digest.hexdigest()[:12]


def built(kind: str) -> Path:
    """Where the extension lies once it is built: "debug" or "release"."""
    return builds() / kind / "lib" / "bitune_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def use(kind: str) -> None:
    """Make this build the one that the package loads."""
    new = ROOT / "bitune_kernels" / f"_C.{os.getpid()}.so"
    shutil.copy(built(kind), new)
    os.replace(new, new.with_name(built(kind).name))  # a process that has loaded the other one keeps it


def build() -> int:
    """Both builds at once, by setup.py: each takes as long as its largest file. Returns the exit code."""
    running = {}
    for kind in ("debug", "release"):
        if built(kind).is_file():
            continue
        folder = builds() / kind
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"BITUNE_BUILD_CUDA": "1", "BITUNE_DEBUG": str(int(kind == "debug"))}
        # cmake and ninja may be installed beside an interpreter that was called by its path; make may be missing
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        if shutil.which("ninja", path=environment["PATH"]):
            environment.setdefault("CMAKE_GENERATOR", "Ninja")
        # Run from elsewhere: older setuptools refuse pyproject.toml, which says nothing about the extension.
        command = [sys.executable, str(ROOT / "setup.py"), "build_ext", "--build-lib", "lib", "--build-temp", "tmp"]
        with (folder / "log").open("w") as log:
            running[kind] = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    failed = [kind for kind, process in running.items() if process.wait()]
    for kind in running:
        print((builds() / kind / "log").read_text(errors="replace"))
    print(f"failed: {', '.join(failed)}" if failed else f"debug and release in {builds()}")
    return int(bool(failed))


def search_path() -> str:
    """PATH, and where NVIDIA's installer puts nvcc and compute-sanitizer without adding it there."""
    places = os.environ.get("PATH"), os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return os.pathsep.join(filter(None, places))


def no_compiler() -> str | None:
    """Why the extension can't be built here, or None."""
    try:
        spec = importlib.util.spec_from_file_location("bitune_setup", ROOT / "setup.py")
        spec.loader.exec_module(setup := importlib.util.module_from_spec(spec))
    except ImportError as e:
        return f"setup.py can't be loaded: {e}"
    nvcc, looked = setup.find_nvcc(os.environ | {"PATH": search_path()})
    return None if nvcc else f"nvcc was not found; looked at {looked}"


# what the stages run, each in its own process


def dtypes_of(backend: str, device: str) -> list[torch.dtype]:
    """The first two dtypes that a backend computes. ValueError, with its reason, where it can't run at all."""
    where = torch.device(device)
    able = [x for x in DTYPES if backends.load(backend).unsupported(device=where, dtype=x) is None]
    if not able:
        backends.resolve(backend, device=where, dtype=torch.bfloat16)
    return able[:2]


def report(backend: str, total: int, failures: list[str], what: str) -> int:
    """Print how many of ``total`` did ``what``, and the first that did not. Returns the exit code."""
    print(f"{backend}: {total - len(failures)} of {total} {what}" + (f"; {failures[0]}" if failures else ""))
    return int(bool(failures))


def _text_of(e: Exception, case: Case, dtype: torch.dtype) -> str:
    return f"{case.id} {dtype}: {type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"


def first(backend: str, device: str, cases: tuple[Case, ...] = SMALL + REPEATED) -> int:
    """Outputs against the budget. The log ends with the case that hangs. Returns the exit code."""
    todo = [(case, dtype) for case in cases for dtype in dtypes_of(backend, device)]
    failures = []
    for case, dtype in todo:
        print(f"{case.id} {dtype}", flush=True)
        try:
            assert_backend_within_budget(backend, case, dtype, device, backward=False)
        except Exception as e:  # one case that doesn't compile says nothing about the next
            failures.append(_text_of(e, case, dtype))
            print(failures[-1])
    return report(backend, len(todo), failures, "cases are within the budget")


def operators(backend: str, device: str, cases: tuple[Case, ...] = SMALL) -> int:
    """bitune_prefill against bitune_attention, compiled calls against plain ones, opcheck. Returns the exit code."""
    checks = (_check_prefill, _check_compiled, _check_registered)
    todo = [(c, case, dtype) for c in checks for case in cases for dtype in dtypes_of(backend, device)]
    failures = []
    for check, case, dtype in todo:
        print(f"{check.__name__} {case.id} {dtype}", flush=True)
        try:
            check(case, backend, dtype, device)
        except Exception as e:  # compilers of graphs and kernels raise exceptions of their own
            failures.append(f"{check.__name__} {_text_of(e, case, dtype)}")
            print(failures[-1])
    return report(backend, len(todo), failures, "checks of the operators passed")


def _check_prefill(case: Case, backend: str, dtype: torch.dtype, device: str) -> None:
    call = case.make_prefill(dtype, device)
    out = bitune_prefill(**call, backend=backend)
    expected, *mixed = bitune_attention(**case.make(dtype, device), backend=backend)
    assert torch.equal(out, expected), "out differs from bitune_attention's"
    assert_prefilled(call, mixed)


def _check_compiled(case: Case, backend: str, dtype: torch.dtype, device: str) -> None:
    def twice(**inputs):
        out, k_mixed, v_mixed = bitune_attention(**inputs | {"q": inputs["q"] * 2}, backend=backend)
        return out * 2, k_mixed + 1, v_mixed * 2

    inputs = case.make(dtype, device, requires_grad=True)
    torch._dynamo.reset()
    compiled = _outputs_and_gradients(torch.compile(twice, fullgraph=True, backend="aot_eager"), inputs)
    for name, plain in _outputs_and_gradients(twice, inputs).items():
        assert torch.equal(plain, compiled[name]), f"{name} differs"


def _outputs_and_gradients(function, inputs: dict) -> dict[str, torch.Tensor]:
    # By name: what the function returns, and the gradients of the sum of its squares.
    outputs, given = function(**inputs), leaves(inputs)
    grads = torch.autograd.grad([x.square().sum() for x in outputs], given.values())
    names = ("out", "k_mixed", "v_mixed", *(f"d_{name}" for name in given))
    return dict(zip(names, (*(x.detach() for x in outputs), *grads), strict=True))


def _check_registered(case: Case, backend: str, dtype: torch.dtype, device: str) -> None:
    def arguments(requires_grad):
        args, options = case.call(dtype, device, requires_grad)
        return custom_ops._flatten(*args, options, requires_grad, backend)

    torch.library.opcheck(torch.ops.bitune.attention.default, tuple(arguments(True)))
    call, filling = case.make_prefill(dtype, device), arguments(False)
    caches = [call[name] for name in ("k_cache", "v_cache", "cache_positions")]
    torch.library.opcheck(torch.ops.bitune.prefill.default, (*filling.tensors, *caches, *filling.rest))


def repeats(backend: str, device: str, times: int = 250, cases: tuple[Case, ...] = REPEATED) -> int:
    """Outputs and gradients of each case: within the budget, and bit by bit the same ``times`` times.

    Returns the exit code.
    """
    todo = [(case, dtype) for case in cases for dtype in dtypes_of(backend, device)]
    failures = []
    for case, dtype in todo:
        print(f"{case.id} {dtype}", flush=True)
        wrong = []
        try:
            assert_backend_within_budget(backend, case, dtype, device)
        except AssertionError as e:
            wrong.append(_text_of(e, case, dtype))
        except Exception as e:  # as in ``first``, and nothing to repeat
            failures.append(_text_of(e, case, dtype))
            print(failures[-1])
            continue
        # The same tensors again and again: random numbers for new ones would take most of the time.
        run = partial(_outputs_and_gradients, partial(bitune_attention, backend=backend))
        inputs, differing = case.make(dtype, device, requires_grad=True), set()
        once = run(inputs)
        for _ in range(times - 1):
            again = run(inputs)
            # bytes, since NaN is not equal to itself
            differing |= {n for n, x in once.items() if not torch.equal(_bytes(x), _bytes(again[n]))}
        if differing:
            wrong.append(f"{case.id} {dtype}: {', '.join(sorted(differing))} changed between runs")
        if wrong:
            failures.append("; ".join(wrong))
            print(failures[-1])
    return report(backend, len(todo), failures, f"cases gave the same bits {times} times, within the budget")


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def small(backend: str, device: str) -> int:
    """What the sanitizer watches: its report is the result."""
    todo = [(case, dtype) for case in SMALL for dtype in dtypes_of(backend, device)]
    for case, dtype in todo:
        print(f"{case.id} {dtype}", flush=True)
        if backend == "cuda":  # forward as training has it; backward is Triton's, which is watched by itself
            bitune_attention(**case.make(dtype, device, requires_grad=True), backend=backend)
        else:
            run_case(case, backend, dtype, device)
        bitune_prefill(**case.make_prefill(dtype, device), backend=backend)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{backend}: {len(todo)} small cases ran")
    return 0


def large(backend: str, device: str, elements: int = 2**31, sample: tuple[int, int] = (1024, 256)) -> int:
    """More than ``elements`` values in q and out, once in k and v too: first and last sample against them alone.

    Samples don't see each other, so each must get what it gets in a batch of its own. An offset that overflows int32
    reads or writes other rows, which differ by far more than rounding. Returns the exit code.
    """
    n, a = sample
    worst = 0.0
    for heads_q, heads_kv, backward in ((32, 8, True), (16, 16, False)):
        rows = 2 * n + a
        batch = elements // (rows * heads_q * 128) + 1
        plan = SegmentPlan.from_lengths([n] * batch, [a] * batch, device=device)
        generator = torch.Generator(device).manual_seed(0)

        def normal(heads, rows=plan.num_rows, generator=generator):
            return torch.randn(rows, heads, 128, generator=generator, device=device, dtype=torch.bfloat16)

        tensors = [normal(h) for h in (heads_q, heads_kv, heads_kv)]
        d_out = normal(heads_q) if backward else None
        found = _attend(tensors, d_out, plan, backend)
        alone = SegmentPlan.from_lengths([n], [a], device=device)
        for b in (0, batch // 2, batch - 1):
            starts = (b * n, (batch + b) * n, 2 * batch * n + b * a)
            places = torch.cat([torch.arange(s, s + m, device=device) for s, m in zip(starts, (n, n, a), strict=True)])
            expected = _attend([x[places] for x in tensors], None if d_out is None else d_out[places], alone, backend)
            errors = {name: relative_error(found[name][places], e) for name, e in expected.items()}
            worst = max(worst, *errors.values())
            for name, error in errors.items():
                if not error <= 1e-2:
                    print(f"heads {heads_q}/{heads_kv}, sample {b} of {batch}: {name} is off by {error:.1e}, relative")
        del found, tensors, d_out
    print(f"{backend}: each sample of {elements} elements and more as alone, within {worst:.1e} (bound 1e-2)")
    return int(not worst <= 1e-2)


def _attend(tensors, d_out, plan: SegmentPlan, backend: str) -> dict[str, torch.Tensor]:
    """out [T, Hq, D] by name, and with its gradient ``d_out`` the gradients of q, k, v."""
    leaves = [x.detach().requires_grad_(d_out is not None) for x in tensors]
    alphas = (torch.tensor(x, device=leaves[0].device) for x in (0.3, 0.6))
    out, _, _ = bitune_attention(*leaves, *alphas, plan, backend=backend)
    found = {"out": out.detach()}
    if d_out is not None:
        found |= dict(zip(("d_q", "d_k", "d_v"), torch.autograd.grad(out, leaves, d_out), strict=True))
    return found


RUNS = {"first": first, "operators": operators, "repeats": repeats, "small": small, "large": large}


# the stages


class Command(NamedTuple):
    """What a stage runs for a backend ("": for none in particular); a text in its place says why it is skipped."""

    backend: str
    name: str
    command: list[str] | str


def _kind(stage: str) -> str:
    return "release" if stage in ON_RELEASE else "debug"


def commands_of(stage: str, args, failed: dict[str, str], seconds: float) -> list[Command]:
    """What a stage runs. ``failed``: what went wrong first with a backend; ``seconds``: what a command has."""
    python = sys.executable
    this = [python, str(ROOT / "benchmarks" / "gpu_check.py")]
    skipped = {}
    if "cuda" in args.backends:
        if not built(_kind(stage)).is_file():
            skipped["cuda"] = "the extension was not built from these sources: see the stage build"
        elif failed.get("cuda", "").startswith("first-") and (stage in ON_RELEASE or ENDED in failed["cuda"]):
            skipped["cuda"] = f"what hangs would hang here too: {failed['cuda']}"
    if stage == "build":
        if "cuda" not in args.backends:
            return []
        return [Command("cuda", "", no_compiler() or [*this, "--run", "build"])]
    if stage == "tune":
        missing = None if importlib.util.find_spec("triton") else "triton is not installed"
        tune = missing or [python, "-m", "bitune_kernels.tune"]
        return [Command("triton", "", failed.get("triton", tune))] if "triton" in args.backends else []
    if stage in TIMED:
        without = [x for x in OWN if x not in args.backends or x in skipped or x in failed]
        if stage == "attention" and set(OWN) == set(without):
            why = "; ".join(f"{x}: {failed.get(x) or skipped.get(x) or 'not among --backends'}" for x in OWN)
            return [Command("", "", f"no kernel to time: {why}")]
        found = _benchmarks(stage, args.out.resolve(), without, seconds)
        # without one of them it is another measurement
        return [c._replace(name="-".join([c.name, *(f"without-{x}" for x in without)]).strip("-")) for c in found]
    if stage == "tests":
        commands = _pytest(args.backends)
    elif stage == "sanitizer":
        missing = None if shutil.which("compute-sanitizer", path=search_path()) else "compute-sanitizer is not on PATH"
        # Failing calls of the driver are other libraries' questions to it. Of a block's barriers, 10 in dynamic shared
        # memory, the tools may count too few.
        options = ["--error-exitcode", "1", "--report-api-errors", "no", "--num-cuda-barriers", "16"]
        watch = ["compute-sanitizer", *options, "--tool"]
        commands = [
            Command(x, tool, missing or [*watch, tool, *this, "--backends", x, "--run", "small"])
            for x in args.backends
            for tool in TOOLS
        ]
    else:
        commands = [Command(x, "", [*this, "--backends", x, "--run", stage]) for x in args.backends]
    return [c._replace(command=skipped.get(c.backend, c.command)) for c in commands]


def _benchmarks(stage: str, out: Path, without: list[str], seconds: float) -> list[Command]:
    def script(name: str) -> list[str]:
        return [sys.executable, f"benchmarks/{name}.py", "--out", str(out)]

    command = script(stage)
    sweep = ["--minutes", str(max(0.5, seconds / 60 - 1))]  # ends by itself before it is ended
    if stage == "brief":
        sweep += ["--without", "flex", "flash", *without]
        shapes = {
            "attention": "--lengths 512 4096 16384 --only equal",
            "prefill": "--model gemma-2b --seconds 3 --lengths 128 2000 --batch-sizes 1",
            "train_step": "--model gemma-2b --seconds 3 --samples 10 --max-lengths 512",
        }
        return [Command("", name, [*script(name), *sweep, *shape.split()]) for name, shape in shapes.items()]
    sweep += ["--without", *without] if without else []
    if stage == "attention":
        return [Command("", "", [*command, *sweep])]
    if stage == "lora":
        return [Command("", "", [*command, "--features", "2048", "4096", "--rows", "128", "1024", "8192"])]
    if stage == "generate":
        return [Command("", "gemma-2b", [*command, "--model", "gemma-2b", "--lengths", "128", "2000"])]
    sweep += ["--seconds", "3"]
    lengths = {model: [str(n) for n in PROMPTS if n <= longest] for model, longest in MODELS.items()}
    if stage == "train_step":  # the paper's update, and single samples where ten would be too much
        kinds = (("", slice(0, 2), ["--samples", "10"]), ("-long", slice(2, None), ["--samples", "1", "--fill"]))
        return [
            Command(
                "", model + kind, [*command, "--model", model, *sweep, *more, "--max-lengths", *lengths[model][part]]
            )
            for kind, part, more in kinds
            for model in MODELS
        ]
    return [Command("", model, [*command, "--model", model, *sweep, "--lengths", *lengths[model]]) for model in MODELS]


def _pytest(names: list[str]) -> list[Command]:
    # A process for each backend: a kernel that ends with an error takes the CUDA context of its process with it.
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    table, graph = (f"tests/test_ops.py::{name}" for name in ("test_backend_against_oracle", "test_cuda_graph"))
    parallel = importlib.util.find_spec("xdist") is not None  # Triton's compiler takes most of the time

    def processes(most):
        return ["-n", str(min(most, os.cpu_count() or 1))] if parallel else []

    commands = [Command(x, "", [*pytest, *processes(12), table, graph, "-k", f"{x}- or {x}]"]) for x in names]
    if "triton" in names:
        # some of these have tensors of many gigabytes
        commands.append(
            Command("triton", "bugs", [*pytest, *processes(3), "tests/test_kernel_bugs.py", "-k", "not flex"])
        )
    # flex is a peer that compiles a graph for every kind of case, which takes longer than all the rest
    peers = " and ".join(f"not {x}-" for x in dict.fromkeys((*names, *OWN, "flex")))
    return [*commands, Command("", "peers", [*pytest, *processes(12), table, "-k", peers])]


def execute(command: list[str], log: Path, seconds: float) -> str | None:
    """Run a command into a log. Returns what went wrong, or None."""
    # An allocation per tensor: inside PyTorch's pool an access out of bounds hits other tensors and goes unnoticed.
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if command[0] == "compute-sanitizer" else {})
    environment["PYTHONUNBUFFERED"] = "1"  # what a process said before it was ended
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment["PATH"] = search_path()
    with log.open("w") as file:
        options = {"stdout": file, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **options)
        try:
            code = process.wait(seconds)
        except BaseException as e:  # the processes that it started end with it
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(e, subprocess.TimeoutExpired):
                raise
            return f"{ENDED} of {seconds:.0f} s"
    return None if code == 0 else f"exit code {code}"


def perform(command: list[str] | str, log: Path, seconds: float, enough: float) -> tuple[str, str]:
    """State and summary of one command of a stage. What is ended before ``enough`` seconds is no failure."""
    if isinstance(command, str):
        return "skipped", command
    if seconds < 1:
        return "skipped", "--minutes are over"
    problem = execute(command, log, seconds)
    state = "passed" if problem is None else "FAILED"
    if problem and problem.startswith(ENDED) and seconds < enough:
        state, problem = "skipped", f"--minutes were over after {seconds:.0f} s"
    return state, "; ".join(filter(None, [problem, _last_line(log)]))


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip(" =\t")]
    return lines[-1] if lines else ""


def earlier(path: Path, facts: dict) -> tuple[set[str], dict[str, str]]:
    """What has passed in ``path`` by this commit on this machine, builds apart; and what failed there, by backend."""
    last = {}
    if path.is_file() and not facts["git_dirty"]:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if all(row[name] == str(value) for name, value in facts.items() if name != "timestamp_utc"):
                    last[row["stage"]] = row
    passed = {label for label, row in last.items() if row["state"] == "passed" and not label.startswith("build")}
    failures = [row for row in last.values() if row["state"] == "FAILED"]
    return passed, {row["backend"]: f"{row['stage']}: {row['summary']}" for row in reversed(failures)}


def main(argv: list[str] | None = None) -> int:
    start = time.perf_counter()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stages", default=DEFAULT_STAGES, help=f"default: {DEFAULT_STAGES}; or brief, tune")
    p.add_argument("--backends", default=",".join(OWN), help=f"default: {','.join(OWN)}")
    p.add_argument("--again", action="store_true", help="run what has passed already, too")
    p.add_argument("--minutes", type=float, help="of all stages together: what runs then is ended, the rest skipped")
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of results and logs")
    p.add_argument("--run", choices=("build", *RUNS), help=argparse.SUPPRESS)  # a stage's own process
    args = p.parse_args(argv)
    stages, args.backends = args.stages.split(","), args.backends.split(",")
    for option, names, known in (("stages", stages, SECONDS), ("backends", args.backends, backends.BACKENDS)):
        if unknown := [x for x in names if x not in known]:
            p.error(f"--{option}: expected some of {','.join(known)}, got {unknown[0]!r}")
    check_minutes(p, args)
    if not torch.cuda.is_available():
        print(
            "gpu_check.py needs a CUDA GPU, and torch sees none here; make test runs what a CPU can show",
            file=sys.stderr,
        )
        return 2
    if args.run == "build":
        return build()
    if args.run:
        return max(RUNS[args.run](backend, "cuda") for backend in args.backends)

    facts = provenance("cuda")
    if not facts["git_sha"]:
        print(
            "gpu_check.py: git finds no commit here, so no row could say what was run. In a copy without .git set "
            "BITUNE_COMMIT to the hash of its commit, or to the hash and -dirty if something is changed",
            file=sys.stderr,
        )
        return 2
    logs = args.out / "gpu_check"
    logs.mkdir(parents=True, exist_ok=True)
    results = Results(args.out / "gpu_check.csv", [*facts, "backend", "stage", "state", "seconds", "summary"])
    end = start + 60 * args.minutes if args.minutes else float("inf")

    def limit(stage: str) -> float:
        return min(SECONDS[stage], end - time.perf_counter())

    done, failed = earlier(results.path, facts)
    right = True
    try:
        for stage in stages:
            if "cuda" in args.backends and built(_kind(stage)).is_file():
                use(_kind(stage))
            for backend, name, command in commands_of(stage, args, failed, limit(stage)):
                label = "-".join(filter(None, (stage, backend, name)))
                if label in done and not args.again:
                    print(f"{label:<26}  passed     earlier", flush=True)
                    continue
                begin = time.perf_counter()
                state, summary = perform(command, logs / f"{label}.log", limit(stage), SECONDS[stage])
                seconds = round(time.perf_counter() - begin, 1)
                if stage == "tune" and state != "skipped":  # its row, and what is behind it, is of the tiles it found
                    from bitune_kernels.backends.triton import tiles

                    tiles.tuned.cache_clear()
                    facts = provenance("cuda")
                    done, _ = earlier(results.path, facts)
                if state == "passed" and failed.get(backend, "").startswith(f"{label}: "):
                    del failed[backend]  # of an earlier run
                if state == "FAILED":
                    right = False
                    failed.setdefault(backend, f"{label}: {summary}")
                print(f"{label:<26}  {state:<7}  {seconds:>6} s  {summary}", flush=True)
                row = {"backend": backend, "stage": label, "state": state, "seconds": seconds, "summary": summary}
                results.append([facts | row])
    finally:
        if "cuda" in args.backends and built("release").is_file():
            use("release")
    print(f"{round(time.perf_counter() - start, 1)} s in all")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
