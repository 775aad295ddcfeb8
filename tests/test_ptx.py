"""What the compilers make of the kernels, run on a CPU (tests/ptx). Nothing here needs a GPU."""

import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch

from bitune_kernels.backends import cuda
from bitune_kernels.testing import Case, assert_backend_within_budget
from tests import ptx
from tests.test_cuda_kernels import emulated_library

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="compiling for the CPU needs g++"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the machine's code is x86-64's"),
]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    return ptx.build(tmp_path_factory.mktemp("ptx"))


@pytest.mark.parametrize("arch", (80, 90))
def test_triton_kernels_and_that_faults_are_noticed(arch, machine, cache):
    # In a process of its own, in which kernels are compiled and not interpreted.
    pytest.importorskip("triton")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache.mkdir("triton_ptx")), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "tests.ptx.triton", str(machine), str(arch)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("right:") == 3 and "not noticed" not in done.stdout, done.stdout


@pytest.fixture(scope="module")
def compiled(machine, tmp_path_factory):
    pytest.importorskip("pybind11", reason="building the emulated extension needs pybind11")
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    from tests.ptx.cuda import Native, compile_ptx

    folder = tmp_path_factory.mktemp("cuda")
    library = shutil.copy(emulated_library(tmp_path_factory), folder)
    return Native(ptx.load(machine), library, [compile_ptx(folder, capability) for capability in (80, 90)])


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize(
    "case",
    [
        Case(prompts=(150, 30), answers=(70, 5), heads=(2, 1), head_dim=64, alpha="head", beta="head", window=100),
        Case(prompts=(200,), answers=(40,), heads=(2, 1), head_dim=128, prefix=(70,), softcap=3.0, sinks=True),
        Case(prompts=(200,), answers=(40,), heads=(2, 1), head_dim=256, num_streams=1, shared_qkv=True),
    ],
    ids=lambda case: case.id,
)
def test_cuda_kernels(case, capability, compiled, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitune_kernels._C", compiled)
    monkeypatch.setattr(cuda, "allocate", compiled.allocate)
    compiled.choose(capability)
    assert_backend_within_budget("cuda", case, torch.bfloat16, backward=False)
    assert compiled.launched.pop()[::2] == (str(capability), str(case.head_dim))
