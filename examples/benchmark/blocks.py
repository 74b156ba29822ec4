"""What a report is made of, and its two forms: Markdown with figures in files, and one HTML page with all in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from peft_input_tuning.output import html

FIGURES = "figures"  # folder beside the Markdown
_STYLE = """
table { display: block; overflow-x: auto; font-size: 13px } td, th { white-space: nowrap; padding: .2rem .6rem }
td code { display: inline-block; min-width: 16rem } .figure svg { fill: #000; background: #fff }
"""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Code:
    """A cell whose text is shown as it is, such as a model's output."""

    text: str


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str | Code]]


@dataclass(frozen=True)
class Figure:
    """`svg` goes into the page, and into FIGURES/`name`.svg beside the Markdown."""

    name: str
    caption: str
    svg: str


Block = Heading | Paragraph | Table | Figure


def markdown(title: str, lead: str, blocks: Iterable[Block]) -> str:
    return "\n\n".join([f"# {_plain(title)}", _plain(lead), *map(block_markdown, blocks)]) + "\n"


def page(title: str, lead: str, blocks: Iterable[Block]) -> str:
    return html.html_page(title, map(_html, blocks), _STYLE, lead)


def block_markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_plain(block.text)}"
    if isinstance(block, Paragraph):
        return _plain(block.text)
    if isinstance(block, Figure):
        return f"![{_plain(block.caption)}]({FIGURES}/{block.name}.svg)"
    lines = [list(map(_cell, block.head)), [":--"] * len(block.head), *(map(_cell, row) for row in block.rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(cell: str | Code) -> str:
    return _code(cell.text) if isinstance(cell, Code) else _plain(cell)


def _plain(text: str) -> str:
    """Text without any meaning for Markdown; underscores within words have none, nor has < before a blank."""
    return re.sub(r"([\\`*\[\]|]|<(?=\S))", r"\\\1", text)


def _code(text: str) -> str:
    """A code span: its fence is longer than any run of backticks in the text."""
    if not text:
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}".replace("|", r"\|")


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Figure):
        return f'<div class="figure">{block.svg}</div>'
    rows = [
        [f"<code>{escape(c.text)}</code>" if isinstance(c, Code) else escape(c) for c in row] for row in block.rows
    ]
    return html.table([escape(name) for name in block.head], rows)
