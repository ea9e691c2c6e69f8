from __future__ import annotations

import pytest

from mopd_nemo.peers.contrast import difference


def program(*lines: str) -> str:
    return "Here it is:\n```python\n" + "\n".join(lines) + "\n```\nDone."


RIGHT = program("def mean(x):", "    # over all", "    total = sum(x)", "    return total / len(x)")


@pytest.mark.parametrize(
    ("lines", "different"),
    [
        (["def mean(x):", "    total=sum( x )", "    return total//len(x)"], "return total // len(x)"),
        (["def mean( x ):", "    total = sum(x)", "    return (total / len(x))  # same"], ""),
        (["def mean(x, y):", "    total = sum(x)", "    return total / len(x)"], "def mean(x, y):"),
        (["def mean(x):", "    if not x:", "        return 0", "    return 1"], "if not x:\nreturn 0\nreturn 1"),
        (["for i in x:", "    pass", "else:", "    i = 2"], "for i in x:\npass\ni = 2"),
        (["try:", "    a = 1", "except E:", "    a = 2"], "try:\n    a = 1\nexcept E:\n    a = 2"),
        (["return_ = 1", "return_ = 1"], "return_ = 1"),
    ],
)
def test_programs_differ_by_statements(lines: list[str], different: str) -> None:
    assert difference(program(*lines), [RIGHT]) == different


def test_what_any_success_has_is_no_difference() -> None:
    other = program("def mean(x):", "    return sum(x) / max(len(x), 1)")
    failed = program("def mean(x):", "    total = sum(x)", "    return sum(x) / max(len(x), 1)", "    return 0")
    assert difference(failed, [RIGHT, other]) == "return 0"


@pytest.mark.parametrize(
    "broken", ["```python\ndef mean(x)\n    return 1\n```", "no block: def mean(x): return 1", "```\n\x00\n```"]
)
def test_what_does_not_parse_is_compared_as_text(broken: str) -> None:
    shown = difference(broken, [RIGHT])
    assert shown and "```" not in shown and all(line in broken for line in shown.splitlines())


def test_text_differs_by_sentences_and_lines() -> None:
    right = "First 7+5 is 12.  Then 12 modulo 10 is 2.\n\n\\boxed{2}"
    assert difference("First 7+5\tis 12. Then 12 modulo 10 is 1.\n\\boxed{1}", [right]) == (
        "Then 12 modulo 10 is 1.\n\\boxed{1}"
    )
    assert difference("Then 12 modulo 10 is 2.", [right]) == ""
    assert difference("It is 3.5 at most.", [right]) == "It is 3.5 at most.", "a point inside a number ends nothing"


def test_deeply_nested_programs_are_compared_as_text() -> None:
    deep = "```python\nx = " + "(" * 3000 + ")" * 3000 + "\n```"
    assert difference(deep, [RIGHT]).startswith("x = (((")
