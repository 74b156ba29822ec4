"""What the HTML pages share: templates that escape what they are given, and plots of bars.

A page needs nothing but itself: no script, style sheet or network. `templates/` has the pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Environment(
    loader=PackageLoader("peft_input_tuning", "output/templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
WIDTH, HEIGHT = 640, 180


@dataclass(frozen=True)
class Bar:
    """One bar: where it begins, how wide and high it is, in pixels, and what it says when it is pointed at."""

    x: float
    width: float
    height: float
    title: str
    css: str = "bar"


@dataclass(frozen=True)
class BarPlot:
    """Bars in one picture.

    Args:
        across: name of what goes from left to right.
        up: name of what goes up.
        bars: the bars.
        marks: figures below them: place in pixels, text.
        legend: kinds of bars: class, name.
        width, height: of the picture, in pixels.
    """

    across: str
    up: str
    bars: Sequence[Bar]
    marks: Sequence[tuple[float, str]] = ()
    legend: Sequence[tuple[str, str]] = ()
    width: int = field(default=WIDTH, init=False)
    height: int = field(default=HEIGHT, init=False)


def bars_of(values: Sequence[float], across: str, up: str) -> BarPlot:
    """A plot with one bar for each value."""
    highest, step = max(values) or 1.0, WIDTH / len(values)
    bars = [Bar(i * step, step * 0.9, value / highest * HEIGHT, f"{value:g}") for i, value in enumerate(values)]
    return BarPlot(across, f"{up}, up to {highest:g}", bars)


def render(template: str, title: str, lead: str, **values: Any) -> str:
    """A page from one of the templates; whatever is no `Markup` is escaped.

    Args:
        template: its name, without `.html.jinja`.
        title: what stands on top.
        lead: one sentence that says what is seen.
        **values: what the template asks for.
    """
    values = {"style": "", "sections": (), **values}
    return _TEMPLATES.get_template(f"{template}.html.jinja").render(title=title, lead=lead, **values)


def html_page(title: str, sections: Iterable[str], style: str = "", lead: str = "") -> str:
    """A whole page. Title and lead are escaped; sections are HTML; `style` is added to the style of all pages."""
    return render("page", title, lead, sections=map(Markup, sections), style=Markup(style))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; head and cells are HTML."""
    parts: Any = _TEMPLATES.get_template("parts.html.jinja").module
    return str(parts.table([Markup(name) for name in head], [[Markup(cell) for cell in row] for row in rows]))


def code(text: str) -> Markup:
    """A text as code, escaped."""
    return Markup("<code>{}</code>").format(text)
