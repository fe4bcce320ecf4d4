from __future__ import annotations

import ast
from pathlib import Path

import torch

from mfmjt.meanflow import capture

PACKAGE = Path(capture.__file__).parents[1]


def test_no_recording_fails_because_of_another_thread():
    """By default CUDA lets any thread that allocates pinned memory end all recordings."""
    calls = [
        (path.name, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.cuda.graph"
    ]
    assert [name for name, _ in calls] == ["capture.py"]
    for _, options in calls:
        assert options["capture_error_mode"] == "'thread_local'"
        assert "stream" in options  # PyTorch's own is on the device that it was first asked for


def test_one_graph_serves_all_guidance_scales():
    z, text = torch.zeros(2, 3), torch.ones(2)
    keys = []
    for guidance in (1.5, 4.3, 1.0):
        given = {"text": text, "guidance": guidance, "mode": "cfg"}
        given = capture._floats_as_tensors(given, z.device)
        tensors, key = capture._tensors_and_key(z, given)
        assert tensors[:2] == [z, text]
        assert float(given["guidance"]) == guidance
        assert len(tensors) == (2 if guidance == 1 else 3)
        keys.append(key)
    assert keys[0] == keys[1] != keys[2]
    hash(keys[0])
