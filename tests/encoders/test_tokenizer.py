from __future__ import annotations

import gzip
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfmjt.encoders.tokenizer import Tokenizer
from mfmjt.errors import InputError

FIRST_MERGE, START, END = 512, 49406, 49407


@pytest.fixture(scope="module")
def tokenizer(merges):
    return Tokenizer(merges)


def byte_id(character: str, last: bool = False) -> int:
    """Ids of printable ASCII characters are their codes less 33, plus 256 at the end of a word."""
    return ord(character) - 33 + 256 * last


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("dog", [FIRST_MERGE + 1]),
        ("  A DOG\n barks ", [byte_id("a", last=True), FIRST_MERGE + 1, FIRST_MERGE + 5]),
        ("bark", [FIRST_MERGE + 2, byte_id("r"), byte_id("k", last=True)]),
        ("dog's", [FIRST_MERGE + 1, byte_id("'"), byte_id("s", last=True)]),
        ("dog\u2019s", [FIRST_MERGE + 1, byte_id("'"), byte_id("s", last=True)]),
        ("42!?", [byte_id("4", True), byte_id("2", True), byte_id("!"), byte_id("?", last=True)]),
        ("a&amp;amp;b", [byte_id("a", True), byte_id("&", True), byte_id("b", True)]),
        ("\u00e9", [FIRST_MERGE + 6]),
        ("e\u0301", [FIRST_MERGE + 6]),
        ("\uff44\uff4f\uff47", [FIRST_MERGE + 1]),
        ("\ufeffdo\x07g", [FIRST_MERGE + 1]),
        ("dog\x1b[31m", [FIRST_MERGE + 1]),
        ("\u00c3\u00a9", [FIRST_MERGE + 6]),
        (
            "&eacute; < \u201cdog",
            [FIRST_MERGE + 6, byte_id("<", True), byte_id('"', True), FIRST_MERGE + 1],
        ),
        ("<end_of_text>", [END]),
        ("dog<end_of_text>", [FIRST_MERGE + 1, END]),
    ],
)
def test_words_become_the_expected_tokens(tokenizer, text, expected):
    assert tokenizer.encode(text) == expected
    row = tokenizer([text])[0].tolist()
    assert row == [START, *expected, END, *[0] * (75 - len(expected))]


def test_long_texts_are_cut_and_still_end(tokenizer):
    rows = tokenizer(["dog " * 200, "\U0001f436" * 100, "\ud800 lone"])
    assert rows.shape == (3, 77)
    assert rows[0].tolist() == [START, *[FIRST_MERGE + 1] * 75, END]
    assert rows[1, -1] == END
    assert int(rows.min()) >= 0
    assert int(rows.max()) <= END


def test_both_published_forms_of_the_list_are_read(merges, tmp_path, tokenizer):
    plain = tmp_path / "merges.txt"
    plain.write_bytes(gzip.decompress(merges.read_bytes()))
    assert Tokenizer(plain).encode("a dog barks \u00e9") == tokenizer.encode("a dog barks \u00e9")


def test_what_is_no_list_of_merges_is_refused(tmp_path):
    wrong = tmp_path / "merges.txt"
    for content in (b"short", b"\x1f\x8bdamaged", b"\xff\xfe", b"x\n" * 60000):
        wrong.write_bytes(content)
        with pytest.raises(InputError, match=re.escape(str(wrong))):
            Tokenizer(wrong)
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        Tokenizer(tmp_path / "nowhere.txt")


@pytest.mark.parametrize("package", ["ftfy", "tokenizers"])
def test_without_the_packages_it_says_what_to_install(merges, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"pip install 'mfmjt\[mmaudio\]'"):
        Tokenizer(merges)


@given(st.text())
def test_any_text_has_tokens_of_clean_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 <= i <= END for i in ids)
    assert ids == tokenizer.encode(f" \n{text}\t")
