"""How all benchmarks time and what they say about the machine."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .. import env

FLUSHED = 2**28  # bytes, several times the L2 cache of any GPU
CYCLES_PER_SECOND = 2e9  # of a GPU's clock, at most


@dataclass(frozen=True)
class Timing:
    """Seconds of one provider, one value per round.

    Attributes:
        host: the least that the host took to enqueue a call, where it was measured.
    """

    seconds: tuple[float, ...]
    host: float | None = None

    @property
    def rounds(self) -> int:
        return len(self.seconds)

    def quantile(self, q: float) -> float:
        """The q-quantile, linear between neighbours."""
        return float(np.quantile(self.seconds, q))

    def ratio(self, unit: Timing) -> float:
        """How many times ``unit`` this takes: the median over rounds, where a drifting machine cancels."""
        return statistics.median(a / b for a, b in zip(self.seconds, unit.seconds, strict=True))


def interleaved(
    providers: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    min_rounds: int = 3,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    device_alone: bool = False,
    progress: Callable[[float], object] | None = None,
) -> dict[str, Timing]:
    """Time functions in turns: a round calls each of them once, and each round starts with another one.

    Args:
        providers: name -> function without arguments.
        seconds: rounds go on for this long, warm-up not counted.
        min_rounds: and at least so many.
        warmup: rounds that are not recorded.
        device: "cuda": CUDA events on an idle device, launch gaps included; else the wall clock.
        device_alone: on "cuda": the device's own time from a cold L2 cache, without the host's (``_device_time``).
        progress: called after every round with the share that is done, in [0, 1].

    Returns:
        name -> Timing, all with the same number of rounds.
    """
    if not providers:
        raise ValueError("providers: expected at least one function, got none")
    if min_rounds < 1 or warmup < 0:
        raise ValueError(f"min_rounds, warmup: expected >= 1 and >= 0, got {min_rounds} and {warmup}")
    clock, host = _wall_time, {}
    if torch.device(device).type == "cuda":
        clock = _event_time
        if device_alone:
            clock = partial(_device_time, torch.empty(FLUSHED, dtype=torch.uint8, device=device), host)
    names = list(providers)
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would be charged to whoever happens to run
    try:
        for _ in range(warmup):
            for name in names:
                clock(providers[name])
        start, rounds, elapsed = time.perf_counter(), 0, 0.0
        while rounds < min_rounds or elapsed < seconds:
            first = rounds % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(clock(providers[name]))
            rounds, elapsed = rounds + 1, time.perf_counter() - start
            if progress is not None:
                progress(min(1.0, rounds / min_rounds, elapsed / seconds if seconds > 0 else 1.0))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values), host.get(providers[name])) for name, values in times.items()}


def _wall_time(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _event_time(function) -> float:
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _device_time(buffer: torch.Tensor, host: dict[Callable, float], function) -> float:
    """Seconds that the device needs for what a call enqueues, whoever enqueues it.

    Writing ``buffer``, which is larger than the L2 cache, drops the call's inputs from there. Then the device sleeps
    for twice as long as the host took for an earlier call (the least of them goes to ``host``), so that all kernels
    are enqueued before the first of them starts. The first call of a function has no earlier one: warm up.
    """
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    buffer.zero_()
    torch.cuda._sleep(int(2 * host.get(function, 0.0) * CYCLES_PER_SECOND))
    start.record()
    begin = time.perf_counter()
    function()
    host[function] = min(time.perf_counter() - begin, host.get(function, float("inf")))
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def provenance(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Where, when and with what a number was measured; "" for what this machine doesn't have."""
    from .. import __version__

    sha, dirty = _git()
    return {
        "timestamp_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "bitune_kernels": __version__,
        "git_sha": sha,
        "git_dirty": dirty,
        "torch": torch.__version__,
        "triton": _triton(torch.device(device)),
        "transformers": env.version("transformers") or "",
        "peft": env.version("peft") or "",
        "python": platform.python_version(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        **_gpu(torch.device(device)),
    }


def _triton(device: torch.device) -> str:
    # "3.6.0, 4 tuned tiles": with those that bitune_kernels.tune has left on this machine, which kernels take
    version = env.version("triton") or ""
    if not version or device.type != "cuda":
        return version
    from ..backends.triton import tiles

    begin = tiles.tuned_for(torch.cuda.get_device_name(device))
    count = sum(key.startswith(begin) for key in tiles.tuned())
    return f"{version}, {count} tuned tiles" if count else version


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _git() -> tuple[str, int | str]:
    # Only the repository that this file belongs to: an installed package may lie inside a foreign one.
    root = Path(__file__).resolve().parents[2]
    git = ("git", "-C", str(root))
    if _run(*git, "ls-files", "--error-unmatch", "bitune_kernels/__init__.py") is None:
        # A copy without .git: "<commit>" or "<commit>-dirty", as git describe --dirty says it where the copy is from.
        sha, _, dirty = os.environ.get("BITUNE_COMMIT", "").partition("-")
        return sha, int(bool(dirty)) if sha else ""
    # A benchmark's own results don't change what is measured.
    changed = _run(*git, "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return _run(*git, "rev-parse", "HEAD") or "", "" if changed is None else int(bool(changed))


def _cpu() -> str:
    # "AMD EPYC, AVX512, bfloat16": cloud machines of one name differ in what matters here
    able = ["bfloat16"] if torch.cpu._is_avx512_bf16_supported() else []
    return ", ".join([_cpu_name(), torch.backends.cpu.get_cpu_capability(), *able])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {"gpu": "", "driver": "", "cuda": torch.version.cuda or ""}
    driver = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver.partition("\n")[0],
        "cuda": torch.version.cuda or "",
    }
