"""Text of models, data and paths on a terminal: shown as it is, and without power over it."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.table import Table

from mopd_nemo.terminal import Terminal, in_words, plain, shortened, visible

PACKAGE = Path(__file__).parents[1] / "mopd_nemo"
HOSTILE = "[/] [bold]b[/bold] \\left[a,b\\right] :smile: \x1b]0;title\x07 \x1b[2J \x9b31m \u202e"
SHOWN = "[/] [bold]b[/bold] \\left[a,b\\right] :smile: ␛]0;title␇ ␛[2J \\x9b31m \\u202e"


def printed(*objects: object, terminal: bool = True) -> str:
    console = Terminal(file=io.StringIO(), width=200, force_terminal=terminal, color_system=None)
    console.print(*objects)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_text_is_neither_markup_nor_an_escape_sequence(terminal: bool) -> None:
    table = Table(HOSTILE, title=HOSTILE, box=None)
    table.add_row(HOSTILE)
    for shown, times in ((HOSTILE, 1), (plain(HOSTILE), 1), (table, 3)):
        assert printed(shown, terminal=terminal).count(SHOWN) == times
    assert printed(Panel(plain(HOSTILE), title=plain(HOSTILE))).count(SHOWN) == 2
    assert visible("a\tb\n") == "a\tb\n"


def test_long_values_lose_their_middle() -> None:
    assert shortened("abc") == "abc" and shortened(12) == "12"
    assert shortened("a" * 500 + "b" * 600, 20) == "aaaaaaaaaa [... 1080 characters ...] bbbbbbbbbb"


def test_sentences_break_between_words_on_a_terminal_alone() -> None:
    narrow = Terminal(file=io.StringIO(), width=24, force_terminal=True)
    assert in_words("WARNING: other programs have the cores", narrow) == "WARNING: other programs\nhave the cores"
    assert in_words("problems    512 of the 4096 there", narrow) == "problems    512 of the\n            4096 there"
    assert in_words("see `mopd train --resume runs/a` or", narrow) == "see\n`mopd train --resume runs/a`\nor"
    assert in_words(f"at {'/deep' * 9} it is", narrow) == f"at\n{'/deep' * 9}\nit is"
    assert in_words("日本語 " * 6, narrow) == "\n".join(["日本語 日本語 日本語"] * 2)
    assert in_words("", narrow) == ""
    assert in_words("x " * 50_000, Terminal(file=io.StringIO(), width=24)) == "x " * 50_000


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_other_console_is_made(file: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "Console"]
