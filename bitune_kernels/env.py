"""What is installed and what can run here: python -m bitune_kernels.env [--json]. Ends up in bug reports."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from ._version import __version__

_PACKAGES = ("triton", "transformers", "peft", "flash-attn", "flash-attn-3")


def cache_folder() -> Path:
    """Where this machine keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitune_kernels"


def collect() -> dict[str, Any]:
    """Returns the report as plain data that json can write. Missing things are None, never an exception."""
    return {
        "bitune_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": _torch(),
        "packages": {name: version(name) for name in _PACKAGES},
        "native_extension": native_extension(),
    }


def version(distribution: str) -> str | None:
    """Of an installed package, from its metadata: importing transformers takes seconds."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_properties(index) for index in range(count)]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [f"{gpu.name} (sm_{gpu.major}{gpu.minor})" for gpu in gpus],
    }


def native_extension() -> dict[str, Any]:
    """built: by the installation (None: unknown). importable, runnable: here. reason: why so, in words."""
    report: dict[str, Any] = dict(built=None, importable=False, runnable=False, reason=None, device=None)
    try:
        record = importlib.import_module("bitune_kernels._build_info")
        report["built"], report["reason"] = record.BUILT, record.REASON
    except ModuleNotFoundError:
        report["reason"] = "no build record: the package runs from a source tree that was not installed"
    try:
        native = importlib.import_module("bitune_kernels._C")
    except ImportError as error:
        if report["built"]:
            report["reason"] = str(error)
        return report
    report["importable"] = True
    report["device"] = device = native.device_info()
    report["runnable"], report["reason"] = _runnable(device)
    return report


def _runnable(device: dict[str, Any]) -> tuple[bool, str]:
    if device["error"]:
        return False, device["error"]
    if not device["devices"]:
        return False, "the driver shows no GPU"
    runs = [gpu["name"] for gpu in device["devices"] if not gpu["error"]]
    if runs:
        return True, f"runs on {', '.join(runs)}"
    return False, "; ".join(f"{gpu['name']}: {gpu['error']}" for gpu in device["devices"])


def _cuda(encoded: int) -> str:
    return f"{encoded // 1000}.{encoded % 1000 // 10}"


def _format(report: dict[str, Any]) -> str:
    native, torch = report["native_extension"], report["torch"]
    states = ("built", "importable", "runnable")
    answer = {True: "yes", False: "no", None: "unknown"}
    lines = [
        ("bitune_kernels", report["bitune_kernels"]),
        ("python", report["python"]),
        ("platform", report["platform"]),
        ("torch", f"{torch['version']} (CUDA {torch['cuda'] or 'none'})"),
        ("GPUs", ", ".join(torch["gpus"]) or "none"),
        *((name, found or "not installed") for name, found in report["packages"].items()),
        ("native extension", ", ".join(f"{key}: {answer[native[key]]}" for key in states)),
        ("", native["reason"]),
    ]
    if device := native["device"]:
        driver = f"CUDA {_cuda(device['driver_cuda'])}" if device["driver_cuda"] else "none"
        compiled = f"CUDA {_cuda(device['compiled_cuda'])} for {device['archs']}"
        lines.append(("", f"compiled with {compiled}; driver: {driver}"))
    return "\n".join(f"{name:<18}{text}" for name, text in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bitune_kernels.env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    report = collect()
    print(json.dumps(report, indent=2) if parser.parse_args(argv).json else _format(report))


if __name__ == "__main__":
    main()
