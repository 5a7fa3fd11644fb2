"""A report as data, and its two forms: Markdown, and one HTML page that loads and runs nothing.

What a report says comes from records and a study's file, which may come from anywhere. Both forms take it as text: none
of it can become a heading, a link, a picture or a script.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from core.errors import UserError
from core.printable import printable
from core.untrusted import is_within


@dataclass(frozen=True)
class Link:
    """Words that lead to a file near the report, or to a heading of it (`#runs`)."""

    text: str
    target: str

    @property
    def address(self) -> str:
        """The target as a relative address: a colon is escaped, so it never names a scheme as `javascript:` does."""
        return quote(self.target, safe="/#")


@dataclass(frozen=True)
class Code:
    """Words as they would be typed."""

    text: str


@dataclass(frozen=True)
class Strong:
    """Words that are to be seen."""

    text: str


Inline = str | Link | Code | Strong
Words = Inline | Sequence[Inline]
"""A run of text: what a paragraph or a table's cell holds."""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2

    @property
    def anchor(self) -> str:
        """The name that links to it use."""
        return re.sub(r"[^a-z0-9]+", "-", self.text.lower()).strip("-")


@dataclass(frozen=True)
class Paragraph:
    words: Words


@dataclass(frozen=True)
class Bullets:
    items: Sequence[Words]


@dataclass(frozen=True)
class Table:
    header: Sequence[Words]
    rows: Sequence[Sequence[Words]]


@dataclass(frozen=True)
class Picture:
    """A PNG file in the report's own folder."""

    title: str
    file: str


Block = Heading | Paragraph | Bullets | Table | Picture


def inlines(words: Words) -> Sequence[Inline]:
    """Return the parts of a text, also where it is a single one."""
    return [words] if isinstance(words, str | Link | Code | Strong) else words


def markdown(blocks: Iterable[Block]) -> str:
    """Return the report as Markdown, in which foreign text has nothing that Markdown or HTML would act on."""
    return "\n\n".join(_block(block) for block in blocks) + "\n"


def _block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_escape(text)}"
        case Paragraph(words):
            return _line_start(_words(words))
        case Bullets(items):
            return "\n".join(f"- {_words(item)}" for item in items)
        case Picture(title, file):
            return f"![{_escape(title)}]({quote(file)})"
        case Table(header, rows):
            lines = [f"| {' | '.join(map(_words, header))} |", f"|{'---|' * len(header)}"]
            return "\n".join([*lines, *(f"| {' | '.join(map(_words, row))} |" for row in rows)])


def _words(words: Words) -> str:
    return "".join(_inline(part) for part in inlines(words))


def _inline(part: Inline) -> str:
    match part:
        case Link(text):
            return f"[{_escape(text)}]({part.address})"
        case Strong(text):
            return f"**{_escape(text)}**"
        case Code(text):
            shown = printable(text, limit=None).replace("|", r"\|")
            fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
            pad = " " if "`" in shown else ""
            return f"{fence}{pad}{shown}{pad}{fence}"
        case str():
            return _escape(part)


def _escape(text: str) -> str:
    """Return the text as Markdown that shows it; an underscore within a word is no emphasis and stays."""
    shown = printable(text, limit=None)
    shown = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]{}|~$]|(?<!\w)_|_(?!\w))", r"\\\1", shown)


def _line_start(text: str) -> str:
    """Return a paragraph that does not begin as a heading, a list, a quotation or a rule does."""
    return re.sub(r"^(\s*)([#+=:-]|\d+[.)])", r"\1\\\2", text)


STYLE = (
    "body{font-family:sans-serif;max-width:72em;margin:2em auto;padding:0 1em}"
    "img{max-width:100%}td,th{padding:.2em .8em;text-align:left}"
)
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<title>{{ title }}</title>
<style>{{ style }}</style>
{% macro text(words) -%}
{% for part in inlines(words) -%}
{% if kind(part) == "Link" %}<a href="{{ part.address }}">{{ printable(part.text) }}</a>
{%- elif kind(part) == "Code" %}<code>{{ printable(part.text) }}</code>
{%- elif kind(part) == "Strong" %}<strong>{{ printable(part.text) }}</strong>
{%- else %}{{ printable(part) }}{% endif -%}
{% endfor %}
{%- endmacro %}
{% for block in blocks %}
{% if kind(block) == "Heading" %}
<h{{ block.level }} id="{{ block.anchor }}">{{ printable(block.text) }}</h{{ block.level }}>
{% elif kind(block) == "Paragraph" %}<p>{{ text(block.words) }}</p>
{% elif kind(block) == "Bullets" %}<ul>{% for item in block["items"] %}<li>{{ text(item) }}</li>{% endfor %}</ul>
{% elif kind(block) == "Picture" %}<p><img alt="{{ printable(block.title) }}" src="{{ picture(block.file) }}"></p>
{% else %}<table>
<thead><tr>{% for words in block.header %}<th>{{ text(words) }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in block.rows %}<tr>{% for words in row %}<td>{{ text(words) }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table>
{% endif %}
{% endfor %}
</html>
"""


def html(blocks: Sequence[Block], folder: Path) -> str:
    """Return the report as one page with its pictures inside.

    Its Content-Security-Policy lets a browser load and run nothing: no script, no file, no address; only the pictures
    inside and the style of just these letters.

    Args:
        blocks: of the report.
        folder: of the pictures; one that lies elsewhere is refused.

    Raises:
        UserError: a picture is no file below the folder.
    """
    from jinja2 import Environment

    def picture(name: str) -> str:
        path = folder / name
        if not path.is_file() or not is_within(folder, path):
            raise UserError(f"{path} is no picture in the report's own folder")
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()

    style = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    return page.render(
        blocks=blocks,
        title=next((printable(block.text) for block in blocks if isinstance(block, Heading)), ""),
        policy=policy,
        style=STYLE,
        inlines=inlines,
        kind=lambda part: type(part).__name__,
        printable=lambda text: printable(text, limit=None),
        picture=picture,
    )
