"""`peft-input-tuning compare RUN RUN ...`: training runs side by side."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..output.files import check_file_to_write, unfinished
from ..run_comparison.plot import drawn
from ..run_comparison.read import TrainingRun, best, differing_settings, figure, names_of_figures, read_runs, scale
from .extras import needs

if TYPE_CHECKING:
    from rich.columns import Columns
    from rich.table import Table

NEEDS_MODELS = False  # files are read, and torch is not imported
WIDTH, HEIGHT = 32, 8  # of a curve, in characters
STYLES = {-1: "", 0: "dim", 1: "bold blue"}  # no curve, training, validation


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="output folders of train.py, or of any Trainer")
    add("--html", type=Path, metavar="FILE", help="write it as one HTML page too")


def check(arguments: argparse.Namespace) -> None:
    needs("inspect", "rich")
    if len(arguments.runs) < 2:
        raise ValueError("RUN: one run was given. Name two or more.")
    check_file_to_write("--html", arguments.html)


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from ..run_comparison.page import comparison_page

    runs = read_runs(arguments.runs)
    console = Console()
    for part in _parts(runs):
        console.print(part)
    if arguments.html is not None:
        with unfinished(arguments.html) as scratch:
            scratch.write_text(comparison_page(runs), encoding="utf-8")
        print(f"Wrote {arguments.html}")
    return 0


def _parts(runs: Sequence[TrainingRun]) -> Iterator[Table | Columns | str]:
    yield _figures(runs)
    if settings := differing_settings(runs):
        yield _settings(runs, settings)
    else:
        yield "No setting that the folders tell differs."
    if (shared := scale(runs)) is not None:
        yield _curves(runs, shared)


def _figures(runs: Sequence[TrainingRun]) -> Table:
    table = _table("Figures; the best of a row is bold", runs, "right")
    from rich.text import Text

    for name in names_of_figures(runs):
        winners = best(name, runs)
        cells = (Text(figure(run, name), "bold" if n in winners else "") for n, run in enumerate(runs))
        table.add_row(Text(name), *cells)
    return table


def _settings(runs: Sequence[TrainingRun], settings: dict[str, list[str | None]]) -> Table:
    from rich.text import Text

    table = _table("Settings that differ", runs, "left")
    for name, values in settings.items():
        table.add_row(Text(name), *(Text("–" if value is None else value) for value in values))
    return table


def _table(title: str, runs: Sequence[TrainingRun], justify: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    table.add_column("")
    for run in runs:
        table.add_column(Text(run.name), justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table


def _curves(runs: Sequence[TrainingRun], shared: tuple[float, float, float]) -> Columns:
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    last, low, high = shared
    panels = []
    for run in runs:
        text = Text()
        for row in drawn((run.training, run.validation), shared, WIDTH, HEIGHT):
            for character, of in row:
                text.append(character, STYLES[of])
            text.append("\n")
        text.append(f"{low:.3g} to {high:.3g}, {last:g} steps", "dim")
        panels.append(Panel(text, title=Text(run.name), width=WIDTH + 4))
    return Columns(panels, title="Losses: training dim, validation blue, all on one scale")
