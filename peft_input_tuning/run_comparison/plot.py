"""Curves in a terminal, drawn with the dots of braille characters: two across and four down in each."""

from __future__ import annotations

from collections.abc import Sequence

from .read import Points

_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a character's dots, by column and row
_BLANK = 0x2800
Cell = tuple[str, int]  # a character, and which curve is in it: -1 none, else the last one drawn


def drawn(curves: Sequence[Points], shared: tuple[float, float, float], width: int, height: int) -> list[list[Cell]]:
    """Rows of characters.

    Args:
        curves: steps and values of each; later ones are drawn over earlier ones.
        shared: the last step, the lowest and the highest value.
        width, height: in characters.
    """
    last, low, high = shared
    dots = [[0] * width for _ in range(height)]
    owner = [[-1] * width for _ in range(height)]

    def place(point: tuple[float, float]) -> tuple[int, int]:
        x = round((2 * width - 1) * point[0] / (last or 1))
        y = round((4 * height - 1) * (high - point[1]) / ((high - low) or 1))
        return x, y

    for number, curve in enumerate(curves):
        places = [place(point) for point in curve]
        for start, end in zip(places, places[1:] or places, strict=False):
            steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
            for step in range(steps + 1):
                x = round(start[0] + (end[0] - start[0]) * step / steps)
                y = round(start[1] + (end[1] - start[1]) * step / steps)
                dots[y // 4][x // 2] |= _BITS[x % 2][y % 4]
                owner[y // 4][x // 2] = number
    return [
        [(chr(_BLANK + bits) if bits else " ", of) for bits, of in zip(*both, strict=True)]
        for both in zip(dots, owner, strict=True)
    ]
