from __future__ import annotations

import ast
from pathlib import Path

import torch

from mfmjt import cuda_graph

PACKAGE = Path(cuda_graph.__file__).parent


def test_no_capture_fails_because_of_another_thread():
    """By default CUDA lets any thread that allocates pinned memory end all captures."""
    calls = [
        (path.name, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.cuda.graph"
    ]
    assert [name for name, _ in calls] == ["cuda_graph.py"]
    for _, options in calls:
        assert options["capture_error_mode"] == "'thread_local'"
        assert "stream" in options  # PyTorch's own is on the device that it was first asked for


def test_one_graph_serves_all_guidance_scales():
    z, text = torch.zeros(2, 3, device="meta"), torch.ones(2, device="meta")
    keys = []
    for guidance in (1.5, 4.3, 1.0):
        given = {"text": text, "guidance": guidance, "mode": "cfg"}
        given = cuda_graph.floats_as_tensors(given, z.device)
        inputs, key = cuda_graph._inputs_and_key([z, *given.values()], tuple(given))
        assert inputs[:2] == [z, text]
        assert isinstance(given["guidance"], float) == (guidance == 1)
        assert len(inputs) == (2 if guidance == 1 else 3)
        keys.append(key)
    assert keys[0] == keys[1] != keys[2]
    assert len({*keys}) == 2
    assert float(cuda_graph.floats_as_tensors({"w": 4.3}, torch.device("cpu"))["w"]) == 4.3


def test_a_graph_depends_on_all_but_values():
    z = torch.zeros(2, 3, device="meta")
    same = [[z, None, "cfg"], [z + 1, None, "cfg"], [z, None, "cfg", torch.zeros(3)]]
    others = [[z[:1], None, "cfg"], [z.double(), None, "cfg"], [z, z, "cfg"], [z, None, "none"]]
    key = cuda_graph._inputs_and_key(same[0], "layout")[1]
    assert cuda_graph._inputs_and_key(same[1], "layout")[1] == key
    assert cuda_graph._inputs_and_key(same[2], "layout")[0] == [z]  # the host's are not replayed
    assert key not in [cuda_graph._inputs_and_key(other, "layout")[1] for other in others]
    assert key != cuda_graph._inputs_and_key(same[0], "another")[1]


def test_off_a_gpu_a_captured_function_is_the_function():
    seen = []

    def function(x, *, factor, y=None):
        seen.append(factor)
        return factor * x if y is None else factor * x + y

    captured = cuda_graph.Captured(function)
    x = torch.randn(3)
    assert torch.equal(captured(x, factor=2.0), 2 * x)
    assert torch.equal(captured(x, factor=3.0, y=x), 3 * x + x)
    assert seen == [2.0, 3.0]
