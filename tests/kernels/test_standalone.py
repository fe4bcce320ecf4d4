"""The C++ kernels under sanitizers, by another compiler and on another processor."""

from __future__ import annotations

import sys

import pytest

from tests.kernels.standalone import build as standalone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GNU toolchains and sanitizers")


@pytest.mark.parametrize("name", standalone.BUILDS)
def test_kernels_without_pytorch(name, tmp_path):
    build = standalone.BUILDS[name]
    if standalone.missing(build):
        pytest.skip(f"no {standalone.missing(build)} on this machine")
    program = standalone.make(build, tmp_path)
    assert standalone.judge(build, program, tmp_path) > 0
    standalone.check_faults_are_found(build, program)
