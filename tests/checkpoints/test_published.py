from __future__ import annotations

import hashlib
import os

import pytest

from mfmjt.checkpoints import PublishedFile, find
from mfmjt.errors import InputError

FILE = PublishedFile("weights.pth", "https://publisher.example", "2M")


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


def test_the_digest_is_compared_when_asked(tmp_path):
    content = os.urandom(1000)
    (tmp_path / FILE.name).write_bytes(content)
    right = hashlib.md5(content, usedforsecurity=False).hexdigest()
    wrong = right[::-1]
    find(tmp_path, PublishedFile(FILE.name, "", md5=right), check="md5")
    find(tmp_path, PublishedFile(FILE.name, "", md5=wrong))
    with pytest.raises(InputError, match=right):
        find(tmp_path, PublishedFile(FILE.name, "", md5=wrong), check="md5")
