import json

import pytest

from seal_jax.errors import SealError
from seal_jax.rest_em.general import texts


def test_our_own():
    own = texts("general")
    assert len(own) == len(set(own)) == 16
    assert all(50 <= len(text.split()) <= 80 and text == text.strip() and "\n" not in text for text in own)


def test_paragraphs_of_a_text_file(tmp_path):
    path = tmp_path / "held.txt"
    path.write_text("\ufeffOne line,\nand its next.\n \n\n\tTwo.  \r\n\r\nThree.", encoding="utf-8")
    assert texts(str(path)) == ["One line,\nand its next.", "Two.", "Three."]


def test_strings_of_a_json_file(tmp_path):
    path = tmp_path / "held.json"
    path.write_text(json.dumps(["One.\n\nStill one.", " ", "Two. "]))
    assert texts(str(path)) == ["One.\n\nStill one.", "Two."]


def test_half_a_surrogate_pair_is_no_character(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('["a \\ud800 b"]')
    assert texts(str(path)) == ["a ? b"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", None, "cannot read: no such file"),
        ("a.txt", b" \n\n\t", "no text in it"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.json", b"[]", "no text in it"),
        ("a.json", b'["a", 1]', "expected a JSON list of strings"),
        ("a.json", b'{"a": "b"}', "expected a JSON list of strings"),
        ("a.json", b"[", "not readable as JSON"),
        ("a.json", b"[" * 100_000, "not readable as JSON"),
        ("a.csv", b"a", "expected 'general', or a .txt or .json file"),
        ("generall", None, "expected 'general', or a .txt or .json file"),
    ],
)
def test_files_that_will_not_do(tmp_path, name, content, problem):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SealError, match=problem) as told:
        texts(str(path))
    assert "\n" not in str(told.value) and str(path) in str(told.value)
