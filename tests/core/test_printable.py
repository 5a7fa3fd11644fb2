"""What reaches a terminal, whatever a file says."""

import io
import unicodedata

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from core.printable import cell, printable

HOSTILE = {
    "colour": "\x1b[31mred\x1b[0m",
    "clear the screen": "\x1b[2J\x1b[H",
    "window title": "\x1b]0;title\x07",
    "one byte CSI": "\x9b31m",
    "overwrite the line": "done\rfailed",
    "more lines": "a\nError: b\u2028c\x85d",
    "turned round": "a\u202egpj.exe\u2066",
    "no character at all": "\ud800\udcff",
    "nothing to see": "\u200b\ufeff\U000e0041",
    "bell and backspace": "\x07\x08\x7f\0",
}


@given(st.text(st.characters(exclude_categories=())))
def test_nothing_but_what_is_shown_comes_out(text: str) -> None:
    shown = printable(text, limit=None)
    kinds = {unicodedata.category(character) for character in shown.replace(" ", "")}
    assert not kinds & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}
    shown.encode()
    assert not text.isprintable() or shown == text, "what is harmless comes back as it is"


def test_hostile_text_is_shown_by_its_escapes() -> None:
    assert {name: printable(text) for name, text in HOSTILE.items()} == {
        "colour": r"\x1b[31mred\x1b[0m",
        "clear the screen": r"\x1b[2J\x1b[H",
        "window title": r"\x1b]0;title\x07",
        "one byte CSI": r"\x9b31m",
        "overwrite the line": r"done\rfailed",
        "more lines": r"a\nError: b\u2028c\x85d",
        "turned round": r"a\u202egpj.exe\u2066",
        "no character at all": r"\ud800\udcff",
        "nothing to see": r"\u200b\ufeff\U000e0041",
        "bell and backspace": r"\x07\x08\x7f\x00",
    }


def test_long_text_is_cut_and_says_so() -> None:
    assert printable("a" * 10**6) == "a" * 500 + "…"
    assert printable("a" * 500) == "a" * 500


def test_a_cell_is_no_markup() -> None:
    out = io.StringIO()
    table = Table("")
    for text in ("[red]x[/red]", "[/x]", "[link=file:///etc/passwd]y[/link]", ":smile:", "\x1b[31mz"):
        table.add_row(cell(text))
    Console(file=out, force_terminal=True, width=80, color_system="truecolor").print(table)
    for text in ("[red]x[/red]", "[/x]", "[link=file:///etc/passwd]y[/link]", ":smile:", r"\x1b[31mz"):
        assert text in out.getvalue()
    assert "\x1b[31m" not in out.getvalue()
