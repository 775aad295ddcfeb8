"""Builds the optional native extension; everything else stands in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;90a"


def find_nvcc(env):
    """Returns the compiler's path or None, and where it was looked for."""
    home = env.get("CUDA_HOME")
    looked = f"CUDACXX ({env.get('CUDACXX') or 'unset'}), CUDA_HOME ({home or 'unset'}), nvcc on PATH"
    places = [env.get("CUDACXX"), home and os.path.join(home, "bin", "nvcc"), "nvcc"]
    found = (shutil.which(place, path=env.get("PATH", "")) for place in places if place)
    return next(filter(None, found), None), looked


def decide(env):
    """What BITUNE_BUILD_CUDA asks for: (nvcc to build with or None, the reason in words).

    The toolkit decides, not the GPU: wheels are often built on machines that have none.
    """
    switch = env.get("BITUNE_BUILD_CUDA", "auto")
    if switch not in ("auto", "0", "1"):
        raise SystemExit(f"BITUNE_BUILD_CUDA must be auto, 0 or 1, got {switch!r}")
    if switch == "0":
        return None, "switched off by BITUNE_BUILD_CUDA=0"
    nvcc, looked = find_nvcc(env)
    if nvcc:
        return nvcc, f"nvcc found: {nvcc}, architectures {env.get('BITUNE_CUDA_ARCHS', DEFAULT_ARCHS)}"
    if switch == "1":
        raise SystemExit(f"BITUNE_BUILD_CUDA=1 but nvcc was not found; looked at {looked}")
    return None, f"nvcc was not found at build time; looked at {looked}"


class BuildPy(build_py):
    """Adds _build_info.py to the build tree: pip hides build output, so the package carries the reason."""

    def run(self):
        super().run()
        built = bool(self.distribution.ext_modules)
        package = Path(self.build_lib, "bitune_kernels")
        if self.editable_mode:
            # The sources are what runs, so the generated files (ignored by git) lie among them.
            package = ROOT / "bitune_kernels"
            if not built:
                for stale in (*package.glob("_C.*.so"), *package.glob("_C.*.pyd")):
                    stale.unlink()
        (package / "_build_info.py").write_text(f"BUILT = {built}\nREASON = {self.reason!r}\n")


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        # A cache of an earlier isolated build names tools that are gone.
        shutil.rmtree(build, ignore_errors=True)
        configure = [
            f"-DCMAKE_CUDA_COMPILER={ext.nvcc}",
            f"-DBITUNE_CUDA_ARCHS={os.environ.get('BITUNE_CUDA_ARCHS', DEFAULT_ARCHS)}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DBITUNE_DEBUG={os.environ.get('BITUNE_DEBUG', '0')}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        env = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()), **os.environ}
        try:
            for command in (
                [ext.nvcc, "--version"],  # CMake hides the message of a compiler that does not even start
                ["cmake", "-S", str(ROOT), "-B", str(build), *configure],
                ["cmake", "--build", str(build), "--config", "Release"],
                ["cmake", "--install", str(build), "--config", "Release", "--prefix", str(target)],
            ):
                subprocess.run(command, check=True, env=env)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"The native extension could not be built with {ext.nvcc}: {error}\n"
                "The tool's own message stands above. BITUNE_BUILD_CUDA=0 installs without the extension."
            ) from error


if __name__ == "__main__":
    nvcc, reason = decide(os.environ)
    extension = Extension("bitune_kernels._C", sources=[])
    extension.nvcc = nvcc
    BuildPy.reason = reason
    setup(
        ext_modules=[extension] if nvcc else [],
        cmdclass={"build_py": BuildPy, "build_ext": CMakeBuild},
        # The build front end installs these beside the requirements of pyproject.toml.
        setup_requires=["cmake>=3.20"] if nvcc and not shutil.which("cmake") else [],
    )
