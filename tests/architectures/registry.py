"""The list of cells, which functions with `@cell(name)` make."""

from __future__ import annotations

from collections.abc import Callable

from .judging import Cell
from .subject import Subject

CELLS: dict[str, Callable[[Subject], Cell | None]] = {}


def cell(name: str) -> Callable:
    """Adds a cell; a function that returns None says that it does not apply."""

    def add(function: Callable[[Subject], Cell | None]) -> Callable[[Subject], Cell | None]:
        CELLS[name] = function
        return function

    return add
