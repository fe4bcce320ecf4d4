from __future__ import annotations

import argparse
import collections
import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mfmjt.checkpoints import PublishedFile, find_all, read_content, read_own
from mfmjt.codec import NanoCodec
from mfmjt.encoders import NanoEncoders
from mfmjt.errors import InputError
from mfmjt.model import MFMJT, load_mmaudio
from mfmjt.model.lora import merge_adapter

STATE = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.tensor(1.5)}


def saved(content: object, old: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not old)
    return stream.getvalue()


def tensors(state: dict[str, torch.Tensor], folder: Path) -> bytes:
    save_file(state, folder / "made.safetensors")
    return (folder / "made.safetensors").read_bytes()


def same(found: dict, state: dict[str, torch.Tensor]) -> bool:
    return found.keys() == state.keys() and all(torch.equal(found[k], v) for k, v in state.items())


def test_a_format_is_told_by_content_whatever_the_suffix(tmp_path: Path) -> None:
    contents = (saved(STATE), saved(STATE, old=True), tensors(STATE, tmp_path))
    for content in contents:
        for suffix in (".pth", ".safetensors", ".bin", ".ckpt"):
            path = tmp_path / f"weights{suffix}"
            path.write_bytes(content)
            assert same(read_content(path), STATE)


@pytest.mark.parametrize("old", [False, True])
def test_scalars_and_arrays_of_numpy_may_stand_beside_weights(tmp_path: Path, old: bool) -> None:
    beside = {"loss": np.float64(0.25), "step": np.int32(3), "done": np.bool_(True), "lr": 1e-4}
    beside["sampler"] = {"order": np.arange(9), "names": np.array(["a", "b"])}
    (tmp_path / "w.pth").write_bytes(saved({"model": STATE, **beside}, old))
    assert same(read_content(tmp_path / "w.pth")["model"], STATE)


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        (argparse.Namespace(a=1), r"argparse\.Namespace"),
        (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        (collections.deque([1]), r"collections\.deque"),
        (Path("a"), "PosixPath"),
    ],
)
def test_what_stood_in_the_way_is_named(tmp_path: Path, beside: object, told: str) -> None:
    (tmp_path / "w.pth").write_bytes(saved({"model": STATE, "beside": beside}))
    with pytest.raises(InputError, match=rf"w\.pth cannot be read as weights: .*{told}") as caught:
        read_content(tmp_path / "w.pth")
    # What PyTorch advises runs what is in the file.
    for advice in ("weights_only", "safe_globals", "trust"):
        assert advice not in str(caught.value)
    assert "network.state_dict()" in str(caught.value)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_no_code_is_run_on_any_path(tmp_path: Path, old: bool, inside: bool) -> None:
    ran = tmp_path / "ran"

    class Surprise:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(ran),)

    # Once as a value, and once as the contents of what stands for a scalar of NumPy.
    class Scalar:
        def __reduce__(self) -> tuple:
            return np.float64(1).__reduce__()[0], (Surprise(),)

    for content in (Surprise(), {"state_dict": STATE, "loss": Surprise()}, {"loss": Scalar()}):
        path = tmp_path / "evil.safetensors"
        path.write_bytes(saved([content] if inside else content, old))
        (tmp_path / "w.index.json").write_text(json.dumps({"weight_map": {"a": path.name}}))
        loads = (read_content, load_mmaudio, MFMJT.load, NanoCodec.load, NanoEncoders.load)
        for load in loads:
            with pytest.raises(InputError):
                load(path)
        with pytest.raises(InputError):
            merge_adapter(torch.nn.Linear(1, 1), path)  # type: ignore[arg-type]
        with pytest.raises(InputError):
            read_content(tmp_path / "w.index.json")
        assert not ran.exists()


def archive(kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=stream, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("w.pth"))
    else:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
            if kind == "zip":
                new.writestr("w.pth", saved(STATE))
            else:  # what PyTorch made, unpacked and packed again
                with zipfile.ZipFile(io.BytesIO(saved(STATE))) as whole:
                    for name in whole.namelist():
                        new.writestr(name, whole.read(name))
    return stream.getvalue()


def script() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as new:
        for name in ("data.pkl", "constants.pkl", "code/a.py", "version"):
            new.writestr(f"w/{name}", b"")
    return stream.getvalue()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 629145600\n"
HUGE = (2**40).to_bytes(8, "little") + b'{"a":{"dtype":"F32"}}'


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><head>", "a web page"),
        (b"\n\n <HTML>\n", "a web page"),
        ("\ufeff<html lang='de'>Größe".encode(), "a web page"),
        (POINTER.encode(), "Git LFS pointer"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML.*AccessDenied"),
        (b'{"error":"Repository not found"}', "JSON.*Repository not found"),
        (b'{"code": {"message": "Not found"}}', "JSON.*Not found"),
        (b'{"err": {"message": "Not found"}}', "JSON.*Not found"),
        (b"Entry not found", "text.*Entry not found"),
        (gzip.compress(b"weights"), "gzip"),
        (archive("tar"), "tar archive"),
        (archive("zip"), "zip archive of other files"),
        (archive("again"), "packed again"),
        (script(), "TorchScript"),
        (saved(STATE)[:-30], "zip archive without its end"),
        (saved(STATE)[:40], "zip archive without its end"),
        (HUGE, "header"),
        (b"GGUF\3\0\0\0", "GGUF"),
        (bytes(5000), "no format of weights"),
        (b"\x80\x02nothing", "damaged or cut short"),
        (saved([1, 2]), "holds a list"),
        (saved(torch.zeros(2)), "holds a Tensor"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_file_of_weights_is_told_what_it_is(
    tmp_path: Path, content: bytes, told: str, suffix: str
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"w\.\w+ .*{told}"):
        read_content(path)
    with pytest.raises(InputError, match=r"w\.\w+ is no such thing"):
        read_own(path, "no such thing")


def test_a_safetensors_file_that_is_cut_is_told(tmp_path: Path) -> None:
    whole = tensors(STATE, tmp_path)
    path = tmp_path / "w.safetensors"
    for length in (20, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        for load in (read_content, lambda path: read_own(path, "not it")):
            with pytest.raises(InputError, match="cut short"):
                load(path)


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    for load in (read_content, lambda path: read_own(path, "not it")):
        with pytest.raises(InputError, match="No file"):
            load(tmp_path / "none.pth")
        with pytest.raises(InputError, match="is a folder"):
            load(tmp_path)


def test_before_anything_is_read_a_page_is_told_with_where_the_file_is(tmp_path: Path) -> None:
    files = [PublishedFile(f"{name}.pth", f"https://{name}.example") for name in ("one", "two")]
    (tmp_path / "one.pth").write_text("<!doctype html>")
    (tmp_path / "two.pth").write_text(POINTER)
    with pytest.raises(InputError, match=r"one\.pth .*web page.*one\.example.*LFS.*two\.example"):
        find_all(tmp_path, files)


# --- parts -------------------------------------------------------------------------------------


def index(folder: Path, where: dict[str, str], name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return folder / name


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_parts_are_read_together_by_their_index(tmp_path: Path, kind: str) -> None:
    names = {"a": f"1.{kind}", "b.c": f"2.{kind}"}
    for key, name in names.items():
        content = {key: STATE[key], "beside": torch.zeros(1)}  # which the index does not name
        (tmp_path / name).write_bytes(
            saved(content) if kind.endswith("bin") else tensors(content, tmp_path)
        )
    assert same(read_content(index(tmp_path, names, f"{kind}.index.json")), STATE)


def test_an_index_that_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "w.pth").write_bytes(saved(STATE))
    (inner / "w.pth").write_bytes(saved({"a": STATE["a"]}))
    for where, told in (
        ({"a": "../w.pth"}, "other folders"),
        ({"a": str(tmp_path / "w.pth")}, "other folders"),
        ({"a": "w.pth", "b.c": "w.pth"}, r"1 tensors .* such as b\.c"),
        ({f"a{i}": f"w{i}.pth" for i in range(9)}, r"not beside it: w0\.pth.* and 4 more"),
        ({"a": "model.safetensors.index.json"}, "it names an index"),
        ({"a": 3}, "is no index"),
        ([], "is no index"),
    ):
        with pytest.raises(InputError, match=told):
            read_content(index(inner, where))  # type: ignore[arg-type]
    (inner / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="is no index"):
        read_content(inner / "model.safetensors.index.json")
