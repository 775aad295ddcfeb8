"""Everything that only a CUDA GPU can show, in one command: python benchmarks/gpu_check.py [--stages tests,large]

    tests      the table of cases and the list of known bugs on the GPU (tests/test_ops.py, tests/test_kernel_bugs.py)
    repeats    250 runs of forward and backward give the same bits
    sanitizer  compute-sanitizer's memcheck, racecheck and initcheck on a few small cases
    large      tensors of more than 2^31 elements: samples at both ends against the same samples alone
    attention  benchmarks/attention.py

One line per stage; a failed stage does not stop the others. Logs go to <out>/gpu_check/, the lines with the commit, the
versions and the machine to <out>/gpu_check.csv.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

from common.report import Results  # noqa: E402
from common.run import relative_error  # noqa: E402

from bitune_kernels import SegmentPlan, bitune_attention  # noqa: E402
from bitune_kernels.testing import Case, run_case  # noqa: E402
from bitune_kernels.testing.timing import provenance  # noqa: E402

# Seconds that each command of a stage may take.
SECONDS = {"tests": 540, "repeats": 240, "sanitizer": 300, "large": 240, "attention": 560}
TOOLS = ("memcheck", "racecheck", "initcheck")

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


def repeats(backend: str, device: str, times: int = 250, cases: tuple[Case, ...] = REPEATED) -> int:
    """Outputs and gradients of each case, bit by bit, ``times`` times. Returns the exit code."""
    bad = 0
    for case in cases:
        for dtype in (torch.float32, torch.bfloat16):
            first = run_case(case, backend, dtype, device)
            differing = set()
            for _ in range(times - 1):
                again = run_case(case, backend, dtype, device)
                # bytes, since NaN is not equal to itself
                differing |= {n for n, x in first.items() if not torch.equal(_bytes(x), _bytes(again[n]))}
            bad += bool(differing)
            if differing:
                print(f"{case.id} {dtype}: {', '.join(sorted(differing))} changed between runs")
    print(f"{backend}: {2 * len(cases) - bad} of {2 * len(cases)} cases gave the same bits {times} times")
    return int(bad > 0)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def small(backend: str, device: str) -> int:
    """What the sanitizer watches: its report is the result."""
    for case in SMALL:
        for dtype in (torch.float32, torch.bfloat16):
            run_case(case, backend, dtype, device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{backend}: {2 * len(SMALL)} small cases ran")
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


RUNS = {"repeats": repeats, "small": small, "large": large}


def commands_of(stage: str, args) -> list[tuple[str, list[str] | str]]:
    """What a stage runs, with a name for each command; a text instead of a command says why it is skipped."""
    python, this = (
        sys.executable,
        [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--backend", args.backend],
    )
    if stage == "tests":
        files = ["tests/test_ops.py", "tests/test_kernel_bugs.py"]
        # flex is a peer that compiles a graph for every kind of case, which takes longer than all the rest
        return [("", [python, "-m", "pytest", "-p", "no:cacheprovider", *files, "-k", "not flex"])]
    if stage == "sanitizer":
        if shutil.which("compute-sanitizer") is None:
            return [("", "compute-sanitizer is not on PATH")]
        return [
            (t, ["compute-sanitizer", "--tool", t, "--error-exitcode", "1", *this, "--run", "small"]) for t in TOOLS
        ]
    if stage == "attention":
        minutes = str(SECONDS[stage] / 60 - 1)  # ends by itself before it is ended
        return [("", [python, "benchmarks/attention.py", "--out", str(args.out.resolve()), "--minutes", minutes])]
    return [("", [*this, "--run", stage])]


def execute(command: list[str], log: Path, seconds: float) -> str | None:
    """Run a command into a log. Returns what went wrong, or None."""
    # An allocation per tensor: inside PyTorch's pool an access out of bounds hits other tensors and goes unnoticed.
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if command[0] == "compute-sanitizer" else {})
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
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
            return f"ended at its limit of {seconds} s"
    return None if code == 0 else f"exit code {code}"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip(" =\t")]
    return lines[-1] if lines else ""


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stages", default=",".join(SECONDS), help=f"default: {','.join(SECONDS)}")
    p.add_argument("--backend", default="triton", help="of repeats, sanitizer and large (default: triton)")
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of results and logs")
    p.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)  # a stage's own process
    args = p.parse_args(argv)
    stages = args.stages.split(",")
    if unknown := [s for s in stages if s not in SECONDS]:
        p.error(f"--stages: expected some of {','.join(SECONDS)}, got {unknown[0]!r}")
    if not torch.cuda.is_available():
        print(
            "gpu_check.py needs a CUDA GPU, and torch sees none here; make test runs what a CPU can show",
            file=sys.stderr,
        )
        return 2
    if args.run:
        return RUNS[args.run](args.backend, "cuda")

    facts = provenance("cuda")
    logs = args.out / "gpu_check"
    logs.mkdir(parents=True, exist_ok=True)
    results = Results(args.out / "gpu_check.csv", [*facts, "backend", "stage", "state", "seconds", "summary"])
    failed = False
    for stage in stages:
        for name, command in commands_of(stage, args):
            label = f"{stage}-{name}" if name else stage
            log, start = logs / f"{label}.log", time.perf_counter()
            if isinstance(command, str):
                state, summary = "skipped", command
            else:
                problem = execute(command, log, SECONDS[stage])
                state = "passed" if problem is None else "FAILED"
                summary = "; ".join(filter(None, [problem, _last_line(log)]))
            seconds = round(time.perf_counter() - start, 1)
            failed |= state == "FAILED"
            print(f"{label:<19}  {state:<7}  {seconds:>6} s  {summary}", flush=True)
            row = {"backend": args.backend, "stage": label, "state": state, "seconds": seconds, "summary": summary}
            results.append([facts | row])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
