"""What is built and installed, and what the package tells about it afterwards."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import distributions, version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from bitune_kernels import env
from bitune_kernels._version import __version__

ROOT = Path(__file__).resolve().parents[1]
NVCC = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["find_nvcc"](os.environ)[0]


@pytest.fixture(scope="module")
def decide():
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["decide"]


@pytest.fixture
def fake_nvcc(tmp_path):
    """An nvcc that is there and always fails."""
    path = tmp_path / "toolkit" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\necho 'nvcc is broken' >&2\nexit 1\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("value", ["", "2", "yes", "AUTO"])
def test_switch_refuses_unknown_values(decide, value):
    with pytest.raises(SystemExit, match=f"auto, 0 or 1, got '{value}'"):
        decide({"BITUNE_BUILD_CUDA": value})


@pytest.mark.parametrize("switch", [{}, {"BITUNE_BUILD_CUDA": "auto"}, {"BITUNE_BUILD_CUDA": "1"}])
def test_nvcc_is_found_in_each_place(decide, fake_nvcc, switch):
    home = fake_nvcc.parents[1]
    for place in ({"CUDACXX": str(fake_nvcc)}, {"CUDA_HOME": str(home)}, {"PATH": str(fake_nvcc.parent)}):
        nvcc, reason = decide(switch | place)
        assert nvcc == str(fake_nvcc)
        assert nvcc in reason


def test_named_compiler_goes_before_path(decide, fake_nvcc, tmp_path):
    other = shutil.copy(fake_nvcc, tmp_path / "nvcc")
    assert decide({"CUDACXX": str(other), "PATH": str(fake_nvcc.parent)})[0] == str(other)


def test_switch_0_ignores_the_toolkit(decide, fake_nvcc):
    nvcc, reason = decide({"BITUNE_BUILD_CUDA": "0", "CUDACXX": str(fake_nvcc)})
    assert nvcc is None
    assert "BITUNE_BUILD_CUDA=0" in reason


def test_without_nvcc_auto_says_why_and_1_fails(decide, tmp_path):
    nowhere = {"PATH": str(tmp_path), "CUDA_HOME": "/nowhere"}
    looked = r"nvcc was not found.*CUDACXX \(unset\), CUDA_HOME \(/nowhere\), nvcc on PATH"
    nvcc, reason = decide(nowhere)
    assert nvcc is None
    assert re.search(looked, reason)
    with pytest.raises(SystemExit, match=looked):
        decide(nowhere | {"BITUNE_BUILD_CUDA": "1"})


@pytest.fixture
def pins():
    """Name -> line of constraints.txt, as ``packaging`` reads it."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {pin.name: pin for pin in map(Requirement, filter(None, lines))}


@pytest.fixture
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_requirement_is_pinned(pins, project):
    named = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    for requirement in map(Requirement, named):
        if requirement.name != project["name"]:
            assert requirement.name in pins, f"{requirement.name} has no line in constraints.txt"
            pin = str(pins[requirement.name].specifier).removeprefix("==")
            assert requirement.specifier.contains(pin), f"constraints.txt breaks {requirement}"


def test_every_pin_can_be_installed_on_the_oldest_python(pins, project):
    """Or pip looks through all versions of all packages for minutes, and finds none."""
    found = {canonicalize_name(d.name): d.metadata for d in distributions()}
    same = [found[name] for name, pin in pins.items() if name in found and found[name]["Version"] in pin.specifier]
    if not same:
        pytest.skip("needs one of the versions of constraints.txt")
    oldest = project["requires-python"].removeprefix(">=") + ".0"
    for package in same:
        pythons = SpecifierSet(package["Requires-Python"] or "")
        assert oldest in pythons, f"{package['Name']} {package['Version']} needs Python {pythons}"


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip


def run_env(folder, *arguments):
    return run(folder, "-m", "bitune_kernels.env", *arguments)


def test_env_report():
    report = env.collect()
    assert report["bitune_kernels"] == __version__
    assert report["python"] == sys.version.split()[0]
    assert report["torch"]["version"] == torch.__version__
    assert report["torch"]["cuda"] == torch.version.cuda
    assert len(report["torch"]["gpus"]) == torch.cuda.device_count()
    for name in ("transformers", "peft"):
        assert report["packages"][name] == version(name)
    assert "flash-attn" in report["packages"]
    assert report["native_extension"]["reason"]


def test_env_prints_what_it_collects():
    report = json.loads(run_env(ROOT, "--json"))
    assert report == json.loads(json.dumps(env.collect()))
    text = run_env(ROOT)
    for part in (__version__, torch.__version__, version("peft"), report["native_extension"]["reason"]):
        assert part in text


def test_env_imports_no_heavy_package():
    code = "import sys, bitune_kernels.env as e; e.collect(); print({'transformers', 'peft'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "set()"


GPU = {"name": "GPU 0", "capability": (9, 0), "error": ""}
DEVICE = {"compiled_cuda": 13000, "archs": "80 90a", "driver_cuda": 13000, "devices": [GPU], "error": ""}


@pytest.mark.parametrize(
    "built, device, runnable, reason",
    [
        (None, None, False, "not installed"),
        (False, None, False, "switched off"),
        (True, None, False, "bitune_kernels._C"),
        (True, DEVICE | {"error": "no NVIDIA driver", "devices": []}, False, "no NVIDIA driver"),
        (True, DEVICE | {"devices": []}, False, "no GPU"),
        (True, DEVICE | {"devices": [GPU | {"error": "no kernel image"}]}, False, "GPU 0: no kernel image"),
        (True, DEVICE, True, "runs on GPU 0"),
    ],
)
def test_native_extension_says_what_hinders_it(monkeypatch, built, device, runnable, reason):
    record = None if built is None else SimpleNamespace(BUILT=built, REASON="switched off")
    native = device and SimpleNamespace(device_info=lambda: device)
    monkeypatch.setitem(sys.modules, "bitune_kernels._build_info", record)
    monkeypatch.setitem(sys.modules, "bitune_kernels._C", native)
    report = env.collect()
    state = report["native_extension"]
    assert (state["built"], state["importable"], state["runnable"]) == (built, device is not None, runnable)
    assert reason in state["reason"]
    assert state["reason"] in env._format(report)


def build(hook, source, output, **variables):
    """Calls a build hook as pip does, with the packages that are installed here: no isolation, no network."""
    output.mkdir(exist_ok=True)
    hidden = ("CUDACXX", "CUDA_HOME", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if k not in hidden and not k.startswith("BITUNE_")}
    code = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
    return subprocess.run(
        [sys.executable, "-c", code, str(output)],
        cwd=source, env=environment | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked sdist: what is built from it below proves that it is complete."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools >= 77")
    pytest.importorskip("pybind11", reason="building the extension needs pybind11")
    folder = tmp_path_factory.mktemp("sdist")
    clutter = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.so")
    shutil.copytree(ROOT, folder / "tree", ignore=clutter)
    # What an editable install leaves behind belongs in no archive.
    (folder / "tree/bitune_kernels/_build_info.py").write_text("BUILT = True\nREASON = 'left behind'\n")
    (folder / "tree/bitune_kernels/_C.left.so").touch()
    result = build("build_sdist", folder / "tree", folder, BITUNE_BUILD_CUDA="0")
    assert result.returncode == 0, result.stdout
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture
def source(sdist, tmp_path):
    return shutil.copytree(sdist, tmp_path / "source")


def unpacked_wheel(source, output, **variables):
    result = build("build_wheel", source, output, **variables)
    assert result.returncode == 0, result.stdout
    (wheel,) = output.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(output / "unpacked")
    return wheel, output / "unpacked", result.stdout


needs_cmake = pytest.mark.skipif(not shutil.which("cmake"), reason="building the extension needs cmake")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="building the extension needs nvcc")


def test_sdist_has_the_sources_and_nothing_generated(sdist):
    for name in (
        "LICENSE",
        "CMakeLists.txt",
        "csrc/attention.h",
        "csrc/device/ptx.cuh",
        "python/bindings.cpp",
        "Makefile",
    ):
        assert (sdist / name).is_file(), name
    assert not (sdist / "bitune_kernels/_build_info.py").exists()
    assert not list(sdist.rglob("*.so"))


@pytest.mark.parametrize(
    ("variables", "reason"),
    [({"BITUNE_BUILD_CUDA": "0"}, "BITUNE_BUILD_CUDA=0"), ({"PATH": ""}, "nvcc was not found at build time")],
    ids=["off", "hidden"],
)
def test_wheel_without_cuda(source, tmp_path, variables, reason):
    wheel, content, _ = unpacked_wheel(source, tmp_path / "out", **variables)
    assert wheel.name == f"bitune_kernels-{__version__}-py3-none-any.whl"
    assert not list(content.glob("bitune_kernels/_C*"))
    state = json.loads(run_env(content, "--json"))["native_extension"]
    assert (state["built"], state["importable"]) == (False, False)
    assert reason in state["reason"]


def test_required_extension_without_nvcc_fails(source, tmp_path):
    result = build("build_wheel", source, tmp_path / "out", BITUNE_BUILD_CUDA="1", PATH=str(tmp_path))
    assert result.returncode != 0
    assert "nvcc was not found" in result.stdout


@needs_cmake
@pytest.mark.parametrize("switch", ["auto", "1"])
def test_broken_toolkit_fails_with_its_reason(source, tmp_path, fake_nvcc, switch):
    result = build("build_wheel", source, tmp_path / "out", BITUNE_BUILD_CUDA=switch, CUDACXX=str(fake_nvcc))
    assert result.returncode != 0
    assert f"could not be built with {fake_nvcc}" in result.stdout
    assert "nvcc is broken" in result.stdout


# Of the wheel that was built: in a process of its own.
USES_THE_EXTENSION = """
import torch
from bitune_kernels import SegmentPlan, _C, bitune_attention
from bitune_kernels.backends import schedule

assert _C.DEVICE_TYPE == "cuda" and _C.ITEM_COLUMNS == schedule.FORWARD
assert all(_C.forward_tile(c, 128, 128)[0] for c in (80, 86, 90, 100, 120)), "kernels are missing"
assert _C.forward_tile(75, 64, 64)[0] == _C.forward_tile(90, 264, 64)[0] == 0

rows = (4096, 64, 64, 1)
launch = dict.fromkeys("k_prefix v_prefix streams k_written v_written alpha_k alpha_v beta".split())
launch |= dict.fromkeys("num_prompt slots lse sinks softcap window device stream".split(), 0)
launch |= dict(items=4096, num_items=1, num_heads_kv=1, group_size=1, head_dim=64, head_dim_v=64, softmax_scale=1.0)
launch |= dict(bf16=True, q=rows, k=rows, v=rows, out=rows, two_parts=False, goes_on=False)
for name, value in (
    ("items", 0), ("q", None), ("k", (0, 64, 64, 1)), ("v", (4096, 64, 60, 1)), ("out", (4096, 64, 64, 2**31)),
    ("k_prefix", rows), ("slots", 8), ("head_dim", 20), ("window", -1),
):
    try:
        _C.forward(**launch | {name: value})
    except ValueError as e:
        assert name in str(e), (name, e)
    else:
        raise AssertionError(f"{name} = {value} was launched")

if not _C.device_info()["devices"]:
    code, text = _C.forward(**launch)
    assert code and "CUDA driver" in text, (code, text)
    try:
        _C.capability(0)
    except RuntimeError as e:
        assert "CUDA driver" in str(e), e
x = torch.zeros(3, 1, 64, dtype=torch.bfloat16)
try:
    bitune_attention(x, x, x, 0.5, 0.5, SegmentPlan.from_lengths([1], [1]), backend="cuda")
except ValueError as e:
    print(e)
"""


@needs_cmake
@needs_nvcc
def test_wheel_with_cuda(source, tmp_path):
    variables = {"BITUNE_BUILD_CUDA": "1", "CUDACXX": NVCC, "BITUNE_CUDA_ARCHS": "80;90a"}
    # Spills are errors here. That products of wgmma wait for each other is told in a remark (C75..) alone.
    variables["CUDAFLAGS"] = "-Xptxas=-v,--warn-on-spills,--warning-as-error"
    wheel, content, log = unpacked_wheel(source, tmp_path / "out", **variables)
    assert "registers" in log and "C75" not in log, log
    assert "none-any" not in wheel.name
    state = json.loads(run_env(content, "--json"))["native_extension"]
    assert (state["built"], state["importable"]) == (True, True)
    assert state["device"]["archs"] == "80 90a"
    assert state["device"]["compiled_cuda"] >= 12000
    if not torch.cuda.is_available():
        assert not state["runnable"]
        assert re.search("driver|GPU|device", state["reason"]), state["reason"]
    (library,) = content.glob("bitune_kernels/_C*.so")
    needed = subprocess.check_output(["readelf", "-d", library], text=True)
    assert "libc.so" in needed and "libcuda" not in needed
    if find_spec("triton"):
        table = run(content, "-m", "bitune_kernels.testing.native")  # every rule holds, or it fails
        for arch in ("sm_80 ", "sm_90a"):
            for dim in (64, 96, 128, 256):
                found = re.findall(rf"^{arch} (?:Bf16|Fp16) +{dim} .*$", table, re.M)
                assert len(found) == 4, table  # each type, with and without scaling first
    refused = run(content, "-c", USES_THE_EXTENSION)
    assert refused.strip() == ("backend: 'cuda' can't run this call: the native extension needs a cuda device, got cpu")


@needs_nvcc
def test_an_endless_wait_is_an_error_in_a_debug_build(tmp_path):
    source = tmp_path / "waits.cu"
    source.write_text(
        "#include <device/ptx.cuh>\n"
        "__global__ void waits(uint32_t barrier) { bitune::ptx::mbarrier_wait(barrier, 0); }\n"
    )
    options = ["-std=c++17", "-arch=sm_90a", "-cubin", "--keep", f"-I{ROOT / 'csrc'}", source.name]
    for define, traps in ((), False), (("-DBITUNE_DEBUG",), True):
        subprocess.run([NVCC, *options, *define], cwd=tmp_path, check=True)
        assert ("trap;" in source.with_suffix(".ptx").read_text()) == traps


@needs_cmake
@needs_nvcc
@pytest.mark.parametrize("archs", ["sm_80", "75", "80;100a", ""])
def test_architectures_are_checked(source, tmp_path, archs):
    result = build("build_wheel", source, tmp_path / "out", CUDACXX=NVCC, BITUNE_CUDA_ARCHS=archs)
    assert result.returncode != 0
    assert "BITUNE_CUDA_ARCHS must be a list like 80;90a" in result.stdout
    assert "Building CUDA" not in result.stdout


def test_editable_install_without_cuda_removes_an_old_extension(source, tmp_path):
    old = source / "bitune_kernels/_C.cpython-311-x86_64-linux-gnu.so"
    old.touch()
    result = build("build_editable", source, tmp_path / "out", BITUNE_BUILD_CUDA="0")
    assert result.returncode == 0, result.stdout
    assert not old.exists()
    record = runpy.run_path(str(source / "bitune_kernels/_build_info.py"))
    assert record["BUILT"] is False


def test_ci_runs_the_documented_tests():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "make test" in (ROOT / ".ci/run").read_text()
    dry_run = ["make", "--no-print-directory", "-n", "test", "PYTHON=my-python", "ARGS=-k plan"]
    assert subprocess.check_output(dry_run, cwd=ROOT, text=True).strip() == "my-python -m pytest -n 2 -k plan"
