"""What the HTML pages share: a page that needs nothing but itself (no script, style sheet or network), and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --bar: #4878cf; --text: #222; --page: #fff; --line: #ccc }
@media (prefers-color-scheme: dark) { :root { --bar: #7aa2f7; --text: #ddd; --page: #16161e; --line: #444 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: var(--text); background: var(--page) }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; text-align: left;
       border-bottom: 1px solid var(--line) }
code { white-space: pre-wrap; overflow-wrap: anywhere } svg { max-width: 100%; height: auto; fill: var(--text) }
.bar { fill: var(--bar) } text { font: 12px system-ui, sans-serif }
"""


def html_page(title: str, sections: Iterable[str], style: str = "") -> str:
    """A whole page. The title is escaped; sections are HTML; `style` is added to the style of all pages."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}{style}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; head and cells are HTML."""
    cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return "<table><tr>" + "".join(f"<th>{name}</th>" for name in head) + f"</tr>\n{cells}</table>"
