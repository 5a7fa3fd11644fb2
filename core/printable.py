"""Text from files that may come from a stranger, made fit for a terminal, a log and a table."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

LONG = 500
"""Characters of a name or a reason that are shown."""


def printable(text: object, limit: int | None = LONG) -> str:
    """Return the text as one line that a terminal only shows, and never obeys.

    Whatever Python does not call printable is written as its escape, as `repr` would: control characters (colours,
    cursor movements, window titles, line ends), characters that turn the direction of what follows, surrogates that no
    encoding takes. Text without any comes back as it is.

    Args:
        text: what is to be shown.
        limit: of its characters; what is cut off is replaced by an ellipsis. None: all of them.
    """
    whole = str(text)
    shown = whole if limit is None else whole[:limit]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
    return shown if len(whole) == len(whole[:limit]) else f"{shown}…"


def cell(text: object, limit: int | None = LONG) -> "Text":
    """Return `printable(text)` for one of rich's tables, in which square brackets are no markup."""
    from rich.text import Text

    return Text(printable(text, limit))
