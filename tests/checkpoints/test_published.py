from __future__ import annotations

import dataclasses
import hashlib
import os

import pytest

from mfmjt.checkpoints import PublishedFile, find_all
from mfmjt.errors import InputError

FILE = PublishedFile("weights.pth", "https://publisher.example", "2M")


def find(folder, file, check="size"):
    return find_all(folder, [file], check)[0]


def write(path, size):
    with path.open("wb") as stream:
        stream.truncate(size)


@pytest.mark.parametrize("where", ["", "weights", "deeper"])
def test_a_file_is_found_in_the_folder_or_in_one_inside_it(tmp_path, where):
    (tmp_path / where).mkdir(exist_ok=True)
    write(tmp_path / where / FILE.name, 2**21)
    assert find(tmp_path, FILE) == tmp_path / where / FILE.name


def test_a_missing_file_is_named_with_its_publisher(tmp_path):
    (tmp_path / FILE.name).mkdir()
    with pytest.raises(InputError, match=r"weights\.pth.*publisher\.example"):
        find(tmp_path, FILE)


@pytest.mark.parametrize(
    ("stated", "size", "fits"),
    [
        ("2M", 2**21, True),
        ("2M", 2**20 + 1, True),
        ("2M", 2**20, False),
        ("2M", 2**21 + 1, False),
        ("0.1G", 2**30 // 10, True),
        ("0.1G", 2**30 // 9, False),
    ],
)
def test_sizes_are_compared_as_they_are_stated_rounded_up(tmp_path, stated, size, fits):
    write(tmp_path / FILE.name, size)
    file = PublishedFile(FILE.name, FILE.publisher, stated)
    if fits:
        assert find(tmp_path, file).name == FILE.name
    else:
        with pytest.raises(InputError, match="cut short"):
            find(tmp_path, file)


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_the_digest_is_compared_when_asked(tmp_path, kind):
    content = os.urandom(1000)
    (tmp_path / FILE.name).write_bytes(content)
    right = hashlib.new(kind, content, usedforsecurity=False).hexdigest()
    wrong = right[::-1]
    find(tmp_path, PublishedFile(FILE.name, "", **{kind: right}), check="md5")
    find(tmp_path, PublishedFile(FILE.name, "", **{kind: wrong}))
    with pytest.raises(InputError, match=right):
        find(tmp_path, PublishedFile(FILE.name, "", **{kind: wrong}), check="md5")


def test_the_first_digits_of_a_digest_suffice_and_a_license_is_named(tmp_path):
    content = os.urandom(1000)
    file = PublishedFile(FILE.name, "https://a.example", sha256="0" * 8, license="CC-BY-4.0")
    with pytest.raises(InputError, match=r"no file weights\.pth .*a\.example, license CC-BY-4\.0"):
        find(tmp_path, file)
    (tmp_path / FILE.name).write_bytes(content)
    begins = hashlib.sha256(content).hexdigest()[:8]
    find(tmp_path, dataclasses.replace(file, sha256=begins), check="md5")
    with pytest.raises(InputError, match=f"SHA-256 {begins}.*, not 0{{8}}"):
        find(tmp_path, file, check="md5")


# --- other names -------------------------------------------------------------------------------

KEPT = PublishedFile("v1.pth", "https://one.example", "2M", also=("comfy_v1",))


@pytest.mark.parametrize(
    "name", ["v1.safetensors", "v1_fp16.safetensors", "comfy_v1_bf16.safetensors", "a/b/v1.pth"]
)
def test_a_file_is_found_under_its_other_names(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, 2**21 if name.endswith("pth") else 100)  # whose size is another
    assert find(tmp_path, KEPT) == path


def test_the_name_of_its_publisher_goes_first(tmp_path):
    (tmp_path / "inner").mkdir()
    write(tmp_path / "inner" / "v1.pth", 2**21)
    write(tmp_path / "comfy_v1.safetensors", 100)
    assert find(tmp_path, KEPT) == tmp_path / "inner" / "v1.pth"


@pytest.mark.parametrize("name", ["v1_fp8.safetensors", "comfy_v1.pth", "a/b/c/v1.pth"])
def test_other_files_are_not_taken_for_it(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, 2**21)
    with pytest.raises(InputError, match=r"no file v1\.pth \(get it from https://one\.example\)"):
        find(tmp_path, KEPT)


def test_all_that_is_wrong_is_told_by_publisher(tmp_path):
    files = [PublishedFile(f"{i}.pth", f"https://{i % 2}.example", "2M") for i in range(4)]
    write(tmp_path / "0.pth", 10)
    (tmp_path / "1.pth").write_text("<html>")
    with pytest.raises(InputError) as caught:
        find_all(tmp_path, files)
    told = str(caught.value)
    assert "0.pth has 1M bytes, not 2M: cut short?, no file 2.pth (get it from https://0." in told
    assert "1.pth cannot be read: it is a web page (HTML)" in told
    assert "no file 3.pth (get it from https://1.example)" in told
