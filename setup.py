"""Builds the libraries with CMake; all metadata is in pyproject.toml.

`pip install --no-build-isolation .` and `-e .` both work. Environment: TOKENCOMP_CUDA=0|1|auto,
TORCH_CUDA_ARCH_LIST, MAX_JOBS.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NATIVE = "_native.abi3.so"


def tool(name: str) -> str:
    """The pip-installed tool beside this Python if there is one, else the one on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


class CMakeBuild(build_ext):  # type: ignore[misc]  # setuptools is untyped
    def run(self) -> None:
        package, folder = ROOT / "python/tokencomp", ROOT / "build/cmake"
        options = {
            "TOKENCOMP_PYTHON": sys.executable,
            "Python_EXECUTABLE": sys.executable,
            "TOKENCOMP_CUDA": os.environ.get("TOKENCOMP_CUDA", "auto"),
            "TOKENCOMP_OUTPUT": str(package),
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
        }
        configure = [tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
        configure += [f"-D{key}={value}" for key, value in options.items()]
        # Configuring costs seconds: only if it would be told something else. Ninja sees changed CMake files.
        told = "\n".join([*configure, os.environ.get("TORCH_CUDA_ARCH_LIST", "")])
        stamp = folder / "configured"
        if not stamp.exists() or stamp.read_text() != told:
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(configure, check=True)
            stamp.write_text(told)
        if options["TOKENCOMP_CUDA"] == "0":  # one from an earlier build would be packaged, and loaded
            (package / "lib/libtokencomp_cuda.so").unlink(missing_ok=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 2))
        subprocess.run([tool("cmake"), "--build", str(folder), "--target", "package", "-j", jobs], check=True)
        if not self.inplace:  # a wheel holds what was built in place, so that nothing is compiled twice
            self.copy_into(Path(self.build_lib).resolve() / "tokencomp", package)

    def copy_into(self, target: Path, package: Path) -> None:
        """The libraries, and the native module."""
        shutil.rmtree(target / "lib", ignore_errors=True)
        shutil.copytree(package / "lib", target / "lib")
        shutil.copy2(package / NATIVE, target / NATIVE)


# Operators use LibTorch's stable ABI, the native module Python's limited API: one wheel for all versions.
setup(
    ext_modules=[Extension("tokencomp._native", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
