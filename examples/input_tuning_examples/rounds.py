"""Timing variants side by side: in one process, in turns, so that other load on the machine meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median, quantiles

Variant = Callable[[], float | None]  # returns its own figure, or None to be timed with the clock


@dataclass(frozen=True)
class Measure:
    """Variants of one piece of work, and which of them are compared.

    Args:
        name: what is measured.
        unit: of the figures: "ms" (times; callables that return seconds or None) or "MB" (callables return bytes).
        variants: the work, by name.
        compared: (variant, against, target) with the largest ratio that is wanted, or None.
        rounds_matter: whether figures differ between rounds; one round is enough for a count of bytes.
    """

    name: str
    unit: str
    variants: dict[str, Variant]
    compared: list[tuple[str, str, float | None]]
    rounds_matter: bool = True


@dataclass(frozen=True)
class Row:
    """One line of the table: figures are medians over the rounds, the ratio is that of the medians.

    Args:
        low, high: quartiles of the rounds' own ratios.
        target: the largest ratio that is wanted, or None.
    """

    measure: str
    variant: str
    against: str
    unit: str
    figure: float
    reference: float
    ratio: float
    low: float
    high: float
    target: float | None = None
    met: bool | None = field(default=None)


def run_rounds(
    variants: dict[str, Variant],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], None] = lambda: None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Runs every variant once to warm up, then once a round, each round starting with the next variant.

    Args:
        variants: the work, by name.
        rounds: number of rounds that count.
        clock: seconds.
        synchronize: waits for the device.
        progress: called after each run.

    Returns:
        A figure a round for each variant.
    """
    names = list(variants)
    figures: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize()
            start = clock()
            own = variants[name]()
            synchronize()
            if turn >= 0:
                figures[name].append(clock() - start if own is None else own)
            progress()
    return figures


def compare(measure: Measure, figures: dict[str, list[float]]) -> list[Row]:
    """The rows of one measure."""
    scale = 1e3 if measure.unit == "ms" else 1e-6
    rows = []
    for variant, against, target in measure.compared:
        figure, reference = (median(figures[name]) for name in (variant, against))
        each = [a / b for a, b in zip(figures[variant], figures[against], strict=True)]
        low, _, high = quantiles(each, n=4) if len(each) > 1 else (each[0],) * 3
        ratio = figure / reference
        met = None if target is None else ratio <= target
        rows.append(
            Row(
                measure.name,
                variant,
                against,
                measure.unit,
                figure * scale,
                reference * scale,
                ratio,
                low,
                high,
                target,
                met,
            )
        )
    return rows


def markdown(rows: list[Row]) -> str:
    """The rows as a table."""
    lines = [
        "| | variant | against | median | against's | ratio | quartiles | target |",
        "| :-- | :-- | :-- | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        target = "" if row.target is None else f"≤ {row.target:g} {'✓' if row.met else 'missed'}"
        lines.append(
            f"| {row.measure} | {row.variant} | {row.against} | {row.figure:.1f} {row.unit} | "
            f"{row.reference:.1f} {row.unit} | {row.ratio:.3f} | {row.low:.3f} to {row.high:.3f} | {target} |"
        )
    return "\n".join(lines) + "\n"
