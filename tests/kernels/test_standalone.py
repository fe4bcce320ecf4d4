"""The C++ kernels under sanitizers, by another compiler and on another processor."""

from __future__ import annotations

import sys

import pytest

from tests.kernels import alone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GNU toolchains and sanitizers")


@pytest.mark.parametrize("name", alone.BUILDS)
def test_kernels_alone(name, tmp_path):
    build = alone.BUILDS[name]
    if alone.missing(build):
        pytest.skip(f"no {alone.missing(build)} on this machine")
    program = alone.make(build, tmp_path)
    assert alone.judge(build, program, tmp_path) > 0
    alone.check_faults_are_found(build, program)
