"""Everything about the package stands in pyproject.toml; this file is for the compiled part.

`MFMJT_EXT=0` leaves the C++ kernels out, `MFMJT_EXT=1` fails without a compiler, and unset builds
them where there is one. They use nothing of PyTorch but its stable ABI, so that one build serves
every PyTorch from 2.10 and every Python from 3.10, whatever stands in the build environment.
"""

import importlib.util
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]


def why_not() -> str:
    """Why the extension is not built, or nothing."""
    if os.environ.get("MFMJT_EXT") == "0":
        return "MFMJT_EXT=0"
    if sys.platform == "win32":
        return "Windows is not supported by them"
    if not any(shutil.which(c.split()[0]) for c in (os.environ.get("CXX", "c++"), "g++")):
        return "no C++ compiler; install g++ or clang"
    if importlib.util.find_spec("torch") is None:
        return "no PyTorch to build against"
    return ""


def extension() -> Extension:
    torch = Path(importlib.util.find_spec("torch").origin).parent
    return Extension(
        "mfmjt._C",
        sources=sorted(str(p) for p in Path("csrc").glob("*.cpp")),
        depends=sorted(str(p) for p in Path("csrc").glob("*.h")),
        language="c++",
        py_limited_api=True,
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),
            ("Py_LIMITED_API", "0x030A0000"),
        ],
        include_dirs=[str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu", "torch", "c10"],
        extra_compile_args=FLAGS,
        extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
    )


class Build(build_ext):
    """Compiles sources side by side, and says what to do when the compiler fails.

    PyTorch's BuildExtension would do so by ninja, for an import of PyTorch in every build.
    """

    def build_extensions(self) -> None:
        compile_in_turn = self.compiler.compile

        def compile_at_once(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_in_turn([source], **options), sources)
                return [path for paths in objects for path in paths]

        self.compiler.compile = compile_at_once
        try:
            super().build_extensions()
        except Exception as error:
            raise SystemExit(
                f"The C++ kernels of mfmjt could not be built: {error}\n"
                "Set MFMJT_EXT=0 to install without them; PyTorch then does their work."
            ) from error


def main() -> None:
    reason = why_not()
    if reason and os.environ.get("MFMJT_EXT") == "1":
        raise SystemExit(f"MFMJT_EXT=1, but the C++ kernels cannot be built: {reason}.")
    if reason:
        sys.stderr.write(f"mfmjt is installed without its C++ kernels: {reason}.\n")
        setup()
    else:
        setup(
            ext_modules=[extension()],
            cmdclass={"build_ext": Build},
            options={"bdist_wheel": {"py_limited_api": "cp310"}},
        )


if __name__ == "__main__":
    main()
