import pytest

from mopd_nemo.verifiers.code import same_text, same_text_in_paper, same_value, same_value_in_paper


@pytest.mark.parametrize(
    ("printed", "expected", "official", "paper"),
    [
        ("3\n", "3", True, True),
        ("  1 2 \n3 \n\n", "1 2\n3\n", True, False),
        ("1.0", "1", True, False),
        ("0.10 2", "0.1 2.00", True, False),
        ("50000000000000000", "50000000000000001", False, False),
        ("0.3000000001", "0.3", False, False),
        ("1  2", "1 2", True, False),
        ("yes  no", "yes no", False, False),
        ("1\n2", "1 2", False, True),
        ("1\n\n2", "1\n2", False, False),
        ("Yes", "YES", False, False),
        ("nan", "nan", True, True),
        ("sNaN 1", "1 1", False, False),
        ("", "0", False, False),
        ("1e999999999", "2e999999999", False, False),
    ],
)
def test_stdout(printed: str, expected: str, official: bool, paper: bool) -> None:
    assert same_text(printed, expected) is official
    assert same_text_in_paper(printed, expected) is paper


@pytest.mark.parametrize(
    ("value", "expected", "official", "paper"),
    [
        ("[1, 2]", "[1, 2]", True, True),
        ('{"tuple": [1, 2]}', "[1, 2]", True, True),
        ('[{"tuple": [1, 2]}]', "[[1, 2]]", False, True),
        ("3.0", "3", True, False),
        ("true", "true", True, True),
        ('"a"', '"a"', True, True),
        ('{"set": [1]}', "[1]", False, False),
        ('{"dict": [["a", 1]]}', '{"a": 1}', True, True),
        ('{"dict": [[{"tuple": [1]}, 1]]}', '{"a": 1}', False, False),
        ('{"object": "Always"}', "1", False, False),
        ("", "1", False, False),
        ("null", "null", True, True),
        ("[" * 100000, "1", False, False),
        ('{"unknown": 1, "tags": 2}', "1", False, False),
    ],
)
def test_values(value: str, expected: str, official: bool, paper: bool) -> None:
    assert same_value(value, expected) is official
    assert same_value_in_paper(value, expected) is paper
