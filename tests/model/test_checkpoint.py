from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from mfmjt.errors import InputError
from mfmjt.model import MFMJT
from tests.support.networks import network


def test_a_saved_network_comes_back_bit_for_bit(tmp_path):
    net = network(torch.float32, v2=True)
    net.save(tmp_path / "net.safetensors")
    again = MFMJT.load(tmp_path / "net.safetensors")
    assert again.config == net.config
    assert again.state_dict().keys() == net.state_dict().keys()
    for name, parameter in net.named_parameters():
        other = again.get_parameter(name)
        assert torch.equal(parameter, other), name
        assert parameter.requires_grad == other.requires_grad
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def test_half_precision_storage_is_loaded_as_float32(tmp_path):
    net = network(torch.float32)
    net.save(tmp_path / "net.safetensors", dtype=torch.float16)
    net.save(tmp_path / "whole.safetensors")
    half, whole = ((tmp_path / f"{n}.safetensors").stat().st_size for n in ("net", "whole"))
    assert half < 0.6 * whole
    again = MFMJT.load(tmp_path / "net.safetensors")
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter.half().float(), again.get_parameter(name)), name


def test_what_is_no_network_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    with pytest.raises(InputError, match="No file"):
        MFMJT.load(path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(InputError, match="is no mfmjt network"):
        MFMJT.load(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="no 'config' in its metadata"):
        MFMJT.load(path)
    save_file({"weight": torch.zeros(1)}, path, metadata={"config": '{"name": "x"}'})
    with pytest.raises(InputError, match="is no mfmjt network"):
        MFMJT.load(path)


def test_a_damaged_network_is_refused(tmp_path):
    net = network(torch.float32)
    path = tmp_path / "net.safetensors"
    net.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="is no mfmjt network"):
        MFMJT.load(path)
