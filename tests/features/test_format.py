from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mfmjt.errors import InputError, RunError
from mfmjt.features.format import Part, will_need, write_part

TENSORS = {
    "half": torch.randn(3, 5).half(),
    "wide": torch.arange(7),
    "none": torch.zeros(0, 4),
    "brain": torch.randn(1, 2, 3).bfloat16(),
    "single": torch.randn(2, 2),
}


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path):
    path = tmp_path / "x.safetensors"
    write_part(path, TENSORS, {"b": "2", "a": "ü"})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["a"], metadata["b"]) == ("ü", "2")
    for found in (load_file(path), Part(path).tensors):
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[key], value) for key, value in TENSORS.items())
    Part(path).check()
    save_file(TENSORS, path, {"a": "1"})
    part = Part(path)
    assert part.metadata == {"a": "1"}
    assert all(torch.equal(part.tensors[key], value) for key, value in TENSORS.items())
    with pytest.raises(InputError, match="has no checksum"):
        part.check()


def test_the_same_content_is_the_same_file(tmp_path):
    ways = (TENSORS, {"b": "2", "a": "1"}), (dict(reversed(TENSORS.items())), {"a": "1", "b": "2"})
    for name, (tensors, metadata) in zip("xy", ways, strict=True):
        write_part(tmp_path / name, tensors, metadata)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_any_changed_byte_is_found(tmp_path):
    path = tmp_path / "x.safetensors"
    write_part(path, {"x": torch.ones(3)}, {"a": "1"})
    content = path.read_bytes()
    for place in range(len(content)):
        spoiled = bytearray(content)
        spoiled[place] ^= 1
        path.write_bytes(bytes(spoiled))
        # A name or number of the header that still can be read is another name or number.
        with pytest.raises(InputError, match=r"damaged|no checksum"):
            Part(path).check()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="is damaged"):
            Part(path)


def test_offsets_beyond_the_file_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [-8, 8]}
    header = json.dumps({"x": entry, "y": entry | {"data_offsets": [0, 16]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(InputError, match="is damaged"):
        Part(path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="is missing"):
        Part(tmp_path / "none" / "x.safetensors")
    with pytest.raises(RunError, match="Cannot write"):
        write_part(tmp_path / "none" / "x.safetensors", TENSORS, {})


def test_advice_changes_nothing(tmp_path):
    path = tmp_path / "x.safetensors"
    write_part(path, TENSORS, {})
    tensors = Part(path).tensors
    will_need(*tensors.values(), torch.ones(3))
    assert all(torch.equal(tensors[key], value) for key, value in TENSORS.items())
