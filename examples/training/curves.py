"""A page with the curves of several runs side by side, all on one scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from peft_input_tuning.output.html import html_page, table

WIDTH, HEIGHT, MARGIN = 230, 150, 34  # of one panel, in pixels
STYLE = """
.runs { display: flex; flex-wrap: wrap; gap: .5rem } polyline { fill: none; stroke-width: 1.5; stroke: var(--line) }
polyline.validation { stroke: var(--bar); stroke-width: 2 } circle { fill: var(--bar) }
.axis { stroke: var(--line); stroke-width: 1 }
"""
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curves:
    """Losses of one run: `(step, loss)` pairs."""

    training: Points
    validation: Points

    @property
    def best(self) -> tuple[int, float]:
        """Step and loss of the lowest validation loss."""
        return min(self.validation, key=lambda point: point[1])


def curves_page(title: str, runs: Mapping[str, Curves], patience: int) -> str:
    """The whole page, HTML."""
    points = [point for curves in runs.values() for point in (*curves.training, *curves.validation)]
    scale = max(step for step, _ in points), max(loss for _, loss in points)
    best = min(runs, key=lambda name: runs[name].best[1])
    last = max(step for curves in runs.values() for step, _ in curves.training)
    rows = [
        [escape(name), f"{curves.best[1]:.3f}", str(curves.best[0]), _stopped(curves, last)]
        for name, curves in runs.items()
    ]
    return html_page(
        title,
        [
            f"<p>The lowest validation loss is {runs[best].best[1]:.3f}, of <b>{escape(best)}</b>. Blue is the "
            f"validation loss and grey the training loss, each panel from 0 to {scale[1]:.2f} over {scale[0]} steps. "
            f"A dot is the best step, whose weights were kept. A run stops after {patience} evaluations that are no "
            "better, and leaves the batch.</p>",
            '<div class="runs">' + "".join(_panel(name, curves, scale) for name, curves in runs.items()) + "</div>",
            table(["run", "lowest validation loss", "at step", "stopped at step"], rows),
        ],
        STYLE,
    )


def _stopped(curves: Curves, last: int) -> str:
    step = curves.training[-1][0]
    return str(step) if step < last else "trained to the end"


def _panel(name: str, curves: Curves, scale: tuple[int, float]) -> str:
    def place(point: tuple[int, float]) -> str:
        x = MARGIN + (WIDTH - MARGIN - 8) * point[0] / scale[0]
        y = HEIGHT - MARGIN + (MARGIN + 24 - HEIGHT) * point[1] / scale[1]
        return f"{x:.1f},{y:.1f}"

    lines = "".join(
        f'<polyline class="{kind}" points="{" ".join(map(place, points))}"/>'
        for kind, points in (("training", curves.training), ("validation", curves.validation))
    )
    x, y = place(curves.best).split(",")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{escape(name, quote=True)}">'
        f'<text x="{MARGIN}" y="14">{escape(name)}</text>'
        f'<path class="axis" d="M{MARGIN} 24 V{HEIGHT - MARGIN} H{WIDTH - 8}" fill="none"/>'
        f'<text x="2" y="30">{scale[1]:.1f}</text><text x="20" y="{HEIGHT - MARGIN}">0</text>'
        f'<text x="{WIDTH - 30}" y="{HEIGHT - MARGIN + 16}">{scale[0]}</text>'
        f'{lines}<circle cx="{x}" cy="{y}" r="3.5"/>'
        f'<text x="{MARGIN}" y="{HEIGHT - MARGIN + 16}">best {curves.best[1]:.3f}</text></svg>'
    )
