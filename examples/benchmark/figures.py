"""The report's figures as SVG: text that is text, nothing from elsewhere, and the same bytes for the same records.

A method has one colour, dash and marker in all figures. The colours are those of Okabe and Ito, which the colour-blind
can tell apart; sizes of input-tuning share its colour and differ in dash and marker.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from statistics import median, quantiles
from typing import TYPE_CHECKING

from comparisons import HIGHEST, LOWEST, OURS, Means, finished, gap_closed, means_of, pairs_of, relative
from records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {
    "prompt-tuning": ("#E69F00", "-", "o"),
    "input-tuning": ("#0072B2", "-", "s"),
    "fine-tuning": ("#000000", "-", "D"),
    "lora": ("#009E73", "-", "^"),
    "lora-all-linear": ("#009E73", "--", "v"),
    "lora-embedding": ("#CC79A7", "--", "^"),
    "trainable-tokens": ("#D55E00", "--", "X"),
    "adapter-only": ("#CC79A7", "-", "v"),
    "p-tuning": ("#D55E00", "-", "P"),
    "prefix-tuning": ("#56B4E9", "-", "X"),
    "input-tuning-19": ("#0072B2", ":", "<"),
    "input-tuning-64": ("#0072B2", "--", ">"),
    "input-tuning-256": ("#0072B2", "-.", "*"),
}
OTHER = ("#777777", "-", ".")
HATCHES = {"-": None, ":": "..", "--": "//", "-.": "xx"}  # of bars
BITS = "bits per byte of the task's inputs under the frozen model (not the paper's bigram measure)"
LOSS = "validation loss (nats per target token)"
_COLUMNS = 3  # of small multiples
_SETTINGS = {
    "svg.fonttype": "none",
    "figure.labelsize": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the layout is the same everywhere
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
}


def _drawn(name: str, caption: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """SVG of a figure, fit to stand in a page beside others.

    Args:
        name: what its ids begin with.
        caption: read out in its place.
        size: width and height in inches.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        written = io.StringIO()
        figure.savefig(written, format="svg")
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]  # without declaration and document type, which a page must not repeat
    # Nor with the metadata, which has the date. Its ids are to be the page's only ones of their names.
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)


def _multiples(figure: Figure, titles: Sequence[str]) -> list[Axes]:
    """Axes in rows of three, one for each title."""
    rows = -(-len(titles) // _COLUMNS)
    axes = list(figure.subplots(rows, min(_COLUMNS, len(titles)), squeeze=False).flat)
    for one, title in zip(axes, titles, strict=False):
        one.set_title(title)
    for one in axes[len(titles) :]:
        one.remove()
    return axes[: len(titles)]


def _size(multiples: int) -> tuple[float, float]:
    return 3.0 * min(_COLUMNS, max(2, multiples)), 0.9 + 2.4 * -(-multiples // _COLUMNS)


def _legend(figure: Figure, axes: Sequence[Axes], methods: Sequence[str]) -> None:
    """One for all axes, in the order of `methods`."""
    found = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    shown = [method for method in methods if method in found]
    figure.legend([found[method] for method in shown], shown, loc="outside lower center", ncols=5)


def _line(axes: Axes, method: str, xs: Sequence[float], ys: Sequence[float]) -> None:
    colour, dash, marker = STYLES.get(method, OTHER)
    axes.plot(xs, ys, color=colour, linestyle=dash, marker=marker, markersize=4, linewidth=1.3, label=method)


# ---- the figures ----------------------------------------------------------------------------------------------------


def loss_curves(records: Mapping[str, Record], tasks: Sequence[str], methods: Sequence[str]) -> str | None:
    """Validation loss over steps, for each task; of several seeds the mean. None without a finished run."""
    runs = finished(records).values()
    steps = sorted({step for run in runs for step, _ in run["curve"]["validation"]})
    at_step = {
        step: means_of(records, lambda run, at=step: dict(run["curve"]["validation"]).get(at)) for step in steps
    }
    if not steps:
        return None

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = _multiples(figure, tasks)
        for one, task in zip(axes, tasks, strict=True):
            for method in methods:
                points = [
                    (step, at_step[step][task, method].mean) for step in steps if (task, method) in at_step[step]
                ]
                if points:
                    _line(one, method, *zip(*points, strict=True))
            one.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            one.set_xlabel("step")
        figure.supylabel(LOSS)
        _legend(figure, axes, methods)

    return _drawn("curves", "Validation loss over steps", _size(len(tasks)), draw)


def gap_bars(scores: Means, tasks: Sequence[str], methods: Sequence[str]) -> str | None:
    """Share of the gap that methods close, by task; None where there is no share."""
    methods = [method for method in methods if method not in (LOWEST, HIGHEST)]
    shares = {(t, m): share for t in tasks for m in methods if (share := gap_closed(scores, t, m)) is not None}
    shown = [task for task in tasks if any(task == one for one, _ in shares)]
    methods = [method for method in methods if any(method == one for _, one in shares)]
    if not shares:
        return None

    def draw(figure: Figure) -> None:
        axes, labelled = figure.subplots(), set()
        width = 0.8 / len(methods)
        for place, task in enumerate(shown):
            there = [method for method in methods if (task, method) in shares]
            for n, method in enumerate(there):
                colour, dash, _ = STYLES.get(method, OTHER)
                x, label = place + (n - (len(there) - 1) / 2) * width, method if method not in labelled else None
                axes.bar(
                    x, shares[task, method], width, color=colour, hatch=HATCHES[dash], edgecolor="white", label=label
                )
                labelled.add(method)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axhline(100, color="black", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(shown)), shown)
        axes.set_ylabel("share of the gap in BLEU, per cent")
        _legend(figure, [axes], methods)

    return _drawn("gap", "Share of the gap closed, by task", (9, 3.6), draw)


def relative_performance(scores: Means, bits: Mapping[str, float]) -> str | None:
    """BLEU in per cent of fine-tuning's over bits per byte; None where no task has both."""
    methods = (LOWEST, OURS, "lora")
    found = {method: pairs_of(bits, lambda task, m=method: relative(scores, task, m)) for method in methods}
    tasks = sorted({task for some, _, _ in found.values() for task in some}, key=lambda task: bits[task])
    if not tasks:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for method, (_, xs, ys) in found.items():
            colour, _, marker = STYLES[method]
            axes.plot(xs, ys, color=colour, linestyle="", marker=marker, markersize=6, label=method)
        axes.axhline(100, color=STYLES[HIGHEST][0], linewidth=0.8, label=HIGHEST)
        axes.margins(x=0.08)
        highest = {task: max(relative(scores, task, m) or 0 for m in methods) for task in tasks}
        least = 0.05 * max(bits[tasks[-1]] - bits[tasks[0]], 0.1)
        place = -math.inf
        for task in tasks:  # names above, apart from each other, a thin line to their points
            place = max(bits[task], place + least)
            axes.annotate(
                task,
                xy=(bits[task], highest[task]),
                xytext=(place, 1.05),
                textcoords=("data", "axes fraction"),
                rotation=35,
                arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkB": 4, "relpos": (0, 0)},
            )
        axes.set_xlabel(BITS)
        axes.set_ylabel("BLEU in per cent of fine-tuning's")
        _legend(figure, [axes], (*methods, HIGHEST))

    return _drawn("relative", "BLEU in per cent of fine-tuning's over bits per byte of the inputs", (7.5, 4.4), draw)


def scores_over_rows(scores: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> str:
    """BLEU over the number of training rows, for each task.

    Args:
        scores: of each task and method, numbers of rows and BLEU.
    """

    def draw(figure: Figure) -> None:
        axes = _multiples(figure, list(scores))
        for one, of_methods in zip(axes, scores.values(), strict=True):
            for method, points in of_methods.items():
                _line(one, method, *zip(*sorted(points), strict=True))
            numbers = sorted({number for points in of_methods.values() for number, _ in points})
            one.set_xscale("log")
            one.set_xticks(numbers, [f"{number:,}" for number in numbers])
            one.minorticks_off()
            one.set_xlabel("training rows")
        figure.supylabel("BLEU")
        _legend(figure, axes, [method for method in STYLES if any(method in found for found in scores.values())])

    width, height = _size(len(scores))
    return _drawn("rows", "BLEU over the number of training rows", (max(width, 8), height + 0.4), draw)


def rate_search(records: Mapping[str, Record], tasks: Sequence[str], methods: Sequence[str]) -> str | None:
    """Validation loss over learning rates, for each task of the search; rates that diverged are crosses at the top."""
    searches: dict[tuple[str, str], dict[float, float]] = {}
    for record in records.values():
        if record["stage"] == "rates" and record["status"] in ("finished", "diverged"):
            loss = record["metrics"]["validation_loss"] if record["status"] == "finished" else math.inf
            searches.setdefault((record["task"], record["method"]), {})[record["rate"]] = loss
    shown = [task for task in tasks if any(task == one for one, _ in searches)]
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        axes = _multiples(figure, shown)
        for one, task in zip(axes, shown, strict=True):
            crosses: Counter[float] = Counter()
            for method in methods:
                points = sorted(searches.get((task, method), {}).items())
                trained = [point for point in points if math.isfinite(point[1])]
                for rate in (rate for rate, loss in points if not math.isfinite(loss)):
                    crosses[rate] += 1  # one below the other
                    height, colour = 1.03 - 0.04 * crosses[rate], STYLES.get(method, OTHER)[0]
                    one.plot(rate, height, "x", color=colour, transform=one.get_xaxis_transform(), clip_on=False)
                if trained:
                    _line(one, method, *zip(*trained, strict=True))
            one.set_xscale("log")
            one.set_xlabel("learning rate")
        figure.supylabel(LOSS)
        _legend(figure, axes, methods)

    width, height = _size(len(shown))
    return _drawn("rates", "Validation loss over learning rates", (max(width, 8), height + 0.8), draw)


def quantiles_over(pairs: Mapping[str, Sequence[tuple[float, float]]], what: str, parts: int) -> str:
    """Median and quartiles of a figure over each measure, whose values are taken in parts of equal number."""

    def draw(figure: Figure) -> None:
        for axes, (name, some) in zip(_multiples(figure, list(pairs)), pairs.items(), strict=True):
            ordered = sorted(some)
            size = -(-len(ordered) // parts)
            groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
            middles = [median([one for one, _ in group]) for group in groups]
            quartiles = [_quartiles([value for _, value in group]) for group in groups]
            low, middle, high = zip(*quartiles, strict=True)
            axes.fill_between(middles, low, high, alpha=0.25, linewidth=0)
            axes.plot(middles, middle, marker="o", markersize=4, linewidth=1.3)
            axes.set(xlabel=name, ylabel=what, ylim=(0, None), title="")

    return _drawn("quantiles", f"{what} over {' and over '.join(pairs)}", _size(len(pairs)), draw)


def _quartiles(values: Sequence[float]) -> list[float]:
    return quantiles(values, n=4) if len(values) > 1 else [*values] * 3
