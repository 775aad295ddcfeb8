"""Runs the CUDA kernels of csrc/ on a CPU: the same sources, with simt.h and device/ in place of the GPU."""

import importlib.util
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
FLAGS = "-x c++ -std=c++17 -O2 -fPIC -fvisibility=hidden -Wall -Wno-unknown-pragmas -Wno-psabi".split()
FLAGS += [f"-DBITUNE_{name}" for name in ("DEBUG", "EMULATED", "SM80", "SM90")]
REPLACED = {"launch.cu", "device_info.cu"}


def compile_objects(sources, folder, flags=(), csrc=CSRC):
    """Compiles on two cores, the largest file first. Every error shows, not only the first file's."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def compile_object(source):
        target = folder / f"{source.name}.o"
        paths = ["-I", str(HERE), "-I", str(csrc), "-include", str(HERE / "simt.h")]
        command = ["g++", *paths, *flags, *FLAGS, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        return target, done.returncode, done.stderr

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(compile_object, sorted(sources, key=lambda source: -source.stat().st_size)))
    errors = [text for _, status, text in results if status]
    if errors:
        raise RuntimeError("g++ failed:\n" + "\n".join(errors))
    return [target for target, _, _ in results]


def own_sources():
    return [source for source in HERE.glob("*.cpp") if not source.name.startswith("test_")]


def link(objects, target):
    done = subprocess.run(["g++", "-shared", "-o", str(target), *map(str, objects)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("g++ failed to link:\n" + done.stderr)
    return Path(target)


def build(folder):
    """Builds _C with every kernel of csrc/; returns its path."""
    import pybind11

    kernels = [source for source in CSRC.glob("*.cu") if source.name not in REPLACED]
    includes = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    objects = compile_objects([*kernels, *own_sources(), ROOT / "python" / "bindings.cpp"], folder, includes)
    return link(objects, Path(folder) / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")


def load(path):
    """The built module. Its settings: ctypes.CDLL(path).emulator_set(capability, multiprocessors, seed)."""
    # pybind11 returns the module that it made for a name before: each path needs its own.
    spec = importlib.util.spec_from_file_location(f"{Path(path).parent.as_posix()}._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
