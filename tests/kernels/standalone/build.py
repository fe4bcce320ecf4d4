"""The C++ kernels as a program of their own, without PyTorch: built, run and judged.

So a sanitizer sees everything that runs, threads included, and another processor can be built for
and emulated. Results are judged as those of the extension are, against PyTorch's formulas.

    python -m tests.kernels.standalone.build address thread clang aarch64
"""

from __future__ import annotations

import functools
import os
import runpy
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests import oracle
from tests.kernels import native
from tests.kernels.inputs import Arguments

__all__ = ["BUILDS", "Build", "check_faults_are_found", "judge", "make", "missing"]

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
ISAS = ("portable", "avx2", "avx512")
DTYPES = {torch.float32: 6, torch.bfloat16: 15, torch.int64: 4}  # PyTorch's numbers for them


class Build(NamedTuple):
    """One way to compile and run the program.

    Attributes:
        compiler: Command.
        flags: For compiling and linking.
        emulator: Command that runs the program, or none.
        fault: What the program can be made to do wrong, or nothing.
        report: What must then be reported.
    """

    compiler: str
    flags: tuple[str, ...]
    emulator: tuple[str, ...] = ()
    fault: str = ""
    report: str = ""


BUILDS = {
    "address": Build(
        "g++",
        ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        fault="overrun",
        report="heap-buffer-overflow",
    ),
    "thread": Build("g++", ("-O1", "-g1", "-fsanitize=thread"), fault="race", report="data race"),
    # Clang leaves a maximum of floats scalar, and says so: NaN would have to be ruled out
    "clang": Build("clang++", ("-O2", "-Wno-pass-failed")),
    "aarch64": Build("aarch64-linux-gnu-g++", ("-O2", "-static"), ("qemu-aarch64-static",)),
}


def missing(build: Build) -> str:
    """Which command is not on this machine, or nothing."""
    return " and ".join(c for c in (build.compiler, *build.emulator[:1]) if not shutil.which(c))


def make(build: Build, folder: Path) -> Path:
    """Compile the program; warnings are errors.

    Raises:
        subprocess.CalledProcessError: A source does not compile; the compiler has said why.
    """
    extension = runpy.run_path(str(ROOT / "setup.py"), run_name="flags")["extension"]()
    options = [f for f in extension.extra_compile_args if not f.startswith(("-O", "-g"))]
    options += [f"-D{name}={value}" for name, value in extension.define_macros]
    options += ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", f"-I{HERE}", "-Icsrc"]
    options += ["-DMFMJT_GRAIN=1"]  # so that small cases have threads too
    options += [part for path in extension.include_dirs for part in ("-isystem", path)]
    sources = [*extension.sources, str(HERE / "program.cpp")]
    objects = [str(folder / f"{Path(source).stem}.o") for source in sources]

    def compile_one(source: str, target: str) -> None:
        command = [build.compiler, *options, *build.flags, "-c", source, "-o", target]
        subprocess.run(command, cwd=ROOT, check=True)

    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(compile_one, sources, objects))
    program = folder / "kernels"
    subprocess.run([build.compiler, *build.flags, *objects, "-pthread", "-o", program], check=True)
    return program


def _execute(
    build: Build, program: Path, *arguments: str | Path
) -> subprocess.CompletedProcess[str]:
    """Reports of a sanitizer end the program with status 66."""
    options = "exitcode=66:detect_leaks=1"
    environment = {**os.environ, "ASAN_OPTIONS": options, "TSAN_OPTIONS": options}
    command = [*build.emulator, program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def check_faults_are_found(build: Build, program: Path) -> None:
    """Make the program do what the sanitizer is there for.

    Raises:
        AssertionError: It was not reported.
    """
    if build.fault:
        done = _execute(build, program, build.fault)
        assert done.returncode == 66, f"not noticed: {build.fault}"
        assert build.report in done.stderr


def judge(build: Build, program: Path, folder: Path) -> int:
    """Run all cases on every instruction set and hold their results to PyTorch's formulas.

    Returns:
        How many results were judged.

    Raises:
        AssertionError: A sanitizer reported something, or a result is wrong.
    """
    torch.manual_seed(0)
    cases = list(native.cases())
    (folder / "cases").write_bytes(b"".join(_packed(cases)))
    done = _execute(build, program, folder / "cases", folder / "results")
    assert done.returncode == 0, done.stderr
    count = 0
    truths = [_truth(name, given) for name, given in cases]
    for isa, results in _unpacked((folder / "results").read_bytes(), len(cases)):
        for (name, given), (truth, limits), found in zip(cases, truths, results, strict=True):
            if name == "conv1d_toom" and isa == "portable":
                assert "without AVX2" in found  # left to PyTorch there
                continue
            if "rows" in name and not (isa == "avx512" and torch.cpu._is_avx512_bf16_supported()):
                assert "bfloat16 pairs" in found  # so do CPUs that do not multiply them
                continue
            assert not isinstance(found, str), found
            shapes = {k: tuple(t.shape) for k, t in given.items() if isinstance(t, Tensor)}
            for i, (y, exact, limit) in enumerate(zip(found, truth, limits, strict=True)):
                got = oracle.error(y, exact)
                what = f"{name} on {isa}, result {i} of {shapes}: error {got:.3g} > {limit:.3g}"
                assert got <= limit, what
                count += 1
    return count


def _truth(name: str, given: Arguments) -> tuple[tuple[Tensor, ...], list[float]]:
    """Exact results, and how much each may be off: the oracle's rule."""
    wide = {
        k: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
        for k, t in given.items()
    }
    truth, plain = native.formula(name, wide), native.formula(name, given)
    everything = torch.cat([t.flatten() for t in truth])
    terms = max(t.numel() for t in given.values() if isinstance(t, Tensor))
    # Attention's logs of sums serve its powers alone, which are as good as what they are rounded to
    of_powers = next(iter(given.values())).dtype if name.startswith("joint_attention") else None
    return truth, [
        2 * oracle.error(y, exact) + oracle.allowance(everything, of_powers or y.dtype, terms)
        for y, exact in zip(plain, truth, strict=True)
    ]


def _numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def _packed(cases: Sequence[tuple[str, Arguments]]) -> Iterator[bytes]:
    """The file that program.cpp reads: integers of 8 bytes, and what they count."""
    yield _numbers(len(cases))
    for name, given in cases:
        yield _numbers(len(name)) + name.encode() + _numbers(len(given))
        for value in given.values():
            if isinstance(value, Tensor):
                yield _numbers(1, DTYPES[value.dtype])
                for numbers in (value.shape, value.stride()):
                    yield _numbers(len(numbers), *numbers)
                # From its first element to its last, so that what lies beyond is not there
                span = 1 + sum(
                    (n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)
                )
                memory = value.as_strided((span,), (1,), value.storage_offset())
                content = memory.contiguous().view(torch.uint8).numpy().tobytes()
                yield _numbers(0, len(content)) + content
            elif isinstance(value, float):
                yield _numbers(2) + struct.pack("<d", value)
            else:
                yield _numbers(0) if value is None else _numbers(3, value)


def _unpacked(content: bytes, count: int) -> Iterator[tuple[str, list[Any]]]:
    """For each instruction set the results of all cases: tensors, or the text of an error."""
    at = 0

    def numbers(n: int) -> tuple[int, ...]:
        nonlocal at
        at += 8 * n
        return struct.unpack(f"<{n}q", content[at - 8 * n : at])

    def piece() -> bytes:
        nonlocal at
        (size,) = numbers(1)
        at += size
        return content[at - size : at]

    dtypes = {number: dtype for dtype, number in DTYPES.items()}

    def tensor() -> Tensor:
        code, rank = numbers(2)
        shape = numbers(rank)
        data = bytearray(piece())
        flat = torch.frombuffer(data, dtype=dtypes[code]) if data else torch.empty(0)
        return flat.to(dtypes[code]).view(shape)

    def results() -> Any:
        (n,) = numbers(1)
        return piece().decode() if n < 0 else [tensor() for _ in range(n)]

    (levels,) = numbers(1)
    for isa in ISAS[:levels]:
        yield isa, [results() for _ in range(count)]
    assert at == len(content)


def main(names: Sequence[str]) -> None:
    """Build and judge each way named, and say how long it took."""
    for name in names:
        build, start = BUILDS[name], time.perf_counter()
        clock = functools.partial(lambda since: f"{time.perf_counter() - since:.1f} s", start)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            program = make(build, folder)
            built = clock()
            count = judge(build, program, folder)
            check_faults_are_found(build, program)
        print(f"{name}: {count} results right; built in {built}, all in {clock()}")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
