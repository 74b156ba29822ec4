"""The comparison as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from ..output.html import code, render
from .read import Points, TrainingRun, best, differing_settings, figure, names_of_figures, scale

STYLE = """
.runs { display: flex; flex-wrap: wrap; gap: .5rem } polyline { fill: none; stroke-width: 1.5; stroke: var(--line) }
polyline.validation { stroke: var(--bar); stroke-width: 2 } circle { fill: var(--bar) }
.axis { stroke: var(--line); stroke-width: 1 }
"""


@dataclass(frozen=True)
class Panel:
    """The curves of one run: where things stand in the picture, in pixels.

    Args:
        name: of the run.
        lines: kind of loss, and its points as SVG wants them.
        dot: the lowest validation loss.
    """

    name: str
    lines: Sequence[tuple[str, str]]
    dot: tuple[str, str] | None
    width: int = field(default=290, init=False)
    height: int = field(default=190, init=False)
    left: int = field(default=44, init=False)
    right: int = field(default=282, init=False)
    top: int = field(default=26, init=False)
    bottom: int = field(default=166, init=False)


def comparison_page(runs: Sequence[TrainingRun]) -> str:
    """The whole page, HTML; names and settings are escaped."""
    shared = scale(runs)
    names = ", ".join(run.name for run in runs)
    last, low, high = shared or (0.0, 0.0, 0.0)
    return render(
        "comparison",
        f"{len(runs)} training runs",
        f"{names}: what came out, what was set differently, and how the losses went. The best of a row is bold.",
        style=Markup(STYLE),
        head=["", *(run.name for run in runs)],
        figures=[_figures(runs, name) for name in names_of_figures(runs)],
        settings=[
            [name, *("–" if value is None else code(value) for value in values)]
            for name, values in differing_settings(runs).items()
        ],
        panels=[] if shared is None else [_panel(run, shared) for run in runs],
        last=f"{last:g}",
        low=f"{low:.3g}",
        high=f"{high:.3g}",
    )


def _figures(runs: Sequence[TrainingRun], name: str) -> list[str]:
    winners = best(name, runs)
    values = [figure(run, name) for run in runs]
    return [name, *(Markup("<b>{}</b>").format(v) if n in winners else v for n, v in enumerate(values))]


def _panel(run: TrainingRun, shared: tuple[float, float, float]) -> Panel:
    last, low, high = shared

    def place(point: tuple[float, float]) -> tuple[str, str]:
        x = Panel.left + (Panel.right - Panel.left) * point[0] / (last or 1)
        y = Panel.top + (Panel.bottom - Panel.top) * (high - point[1]) / ((high - low) or 1)
        return f"{x:.1f}", f"{y:.1f}"

    def points(curve: Points) -> str:
        return " ".join(",".join(place(point)) for point in curve)

    curves = (("training", run.training), ("validation", run.validation))
    lowest = min(run.validation, key=lambda point: point[1], default=None)
    return Panel(
        run.name,
        [(kind, points(curve)) for kind, curve in curves if curve],
        None if lowest is None else place(lowest),
    )
