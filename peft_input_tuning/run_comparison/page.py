"""The comparison as one HTML page, which needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..output.html import html_page, table
from .read import Points, TrainingRun, best, differing_settings, figure, names_of_figures, scale

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 290, 190, 44, 26, 24  # of one panel, in pixels
STYLE = """
.runs { display: flex; flex-wrap: wrap; gap: .5rem } .scroll { overflow-x: auto } td { overflow-wrap: anywhere }
polyline { fill: none; stroke-width: 1.5; stroke: var(--line) }
polyline.validation { stroke: var(--bar); stroke-width: 2 } circle { fill: var(--bar) }
.axis { stroke: var(--line); stroke-width: 1 }
"""


def comparison_page(runs: Sequence[TrainingRun]) -> str:
    """The whole page, HTML."""
    sections = [f"<p>{escape(_first_words(runs))}</p>", "<h2>Figures</h2>", _figures(runs)]
    sections += ["<h2>Settings that differ</h2>", _settings(runs)]
    if (shared := scale(runs)) is not None:
        sections += [
            "<h2>Losses</h2><p>Blue is the validation loss and grey the training loss, all on one scale: "
            f"{shared[1]:.3g} to {shared[2]:.3g}, over {shared[0]:g} steps. A dot is the lowest validation loss.</p>",
            '<div class="runs">' + "".join(_panel(run, shared) for run in runs) + "</div>",
        ]
    return html_page(f"{len(runs)} training runs", sections, STYLE)


def _first_words(runs: Sequence[TrainingRun]) -> str:
    names = ", ".join(run.name for run in runs)
    return f"{names}: what came out, what was set differently, and how the losses went. The best of a row is bold."


def _figures(runs: Sequence[TrainingRun]) -> str:
    rows = []
    for name in names_of_figures(runs):
        winners = best(name, runs)
        cells = [figure(run, name) for run in runs]
        rows.append([escape(name), *(f"<b>{c}</b>" if n in winners else c for n, c in enumerate(cells))])
    return _table(runs, rows) if rows else "<p>None was written.</p>"


def _settings(runs: Sequence[TrainingRun]) -> str:
    rows = [
        [escape(name), *("–" if value is None else f"<code>{escape(value)}</code>" for value in values)]
        for name, values in differing_settings(runs).items()
    ]
    return _table(runs, rows) if rows else "<p>None of those that the folders tell.</p>"


def _table(runs: Sequence[TrainingRun], rows: list[list[str]]) -> str:
    return f'<div class="scroll">{table(["", *(escape(run.name) for run in runs)], rows)}</div>'


def _panel(run: TrainingRun, shared: tuple[float, float, float]) -> str:
    last, low, high = shared

    def place(point: tuple[float, float]) -> str:
        x = LEFT + (WIDTH - LEFT - 8) * point[0] / (last or 1)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - point[1]) / ((high - low) or 1)
        return f"{x:.1f},{y:.1f}"

    def line(kind: str, points: Points) -> str:
        return f'<polyline class="{kind}" points="{" ".join(map(place, points))}"/>' if points else ""

    dot = ""
    if run.validation:
        x, y = place(min(run.validation, key=lambda point: point[1])).split(",")
        dot = f'<circle cx="{x}" cy="{y}" r="3.5"/>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="losses of {escape(run.name)}">'
        f'<text x="{LEFT}" y="14">{escape(run.name)}</text>'
        f'<path class="axis" d="M{LEFT} {TOP} V{HEIGHT - BOTTOM} H{WIDTH - 8}" fill="none"/>'
        f'<text x="{LEFT - 4}" y="{TOP + 8}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{LEFT - 4}" y="{HEIGHT - BOTTOM}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">0</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">{last:g} steps</text>'
        f"{line('training', run.training)}{line('validation', run.validation)}{dot}</svg>"
    )
