"""What a report is made from: the records and what was computed on them; and how figures are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from comparisons import Mean, Means, finished, in_order, means
from methods import METHODS
from plan import ABLATIONS, TASKS, Budget
from records import Record
from significance import Comparison

MISSING = "–"


@dataclass(frozen=True)
class Findings:
    """All that a report shows.

    Args:
        records: by the runs' names.
        bits: bits per byte of each task's inputs.
        measured_with: the model that they were measured with, and the number of inputs at most.
        comparisons: those that still hold; None where none were ever computed.
        samples: of the bootstrap.
        left_out: a word on each comparison that holds no more or was not made.
    """

    budget: Budget
    records: Mapping[str, Record]
    bits: Mapping[str, float]
    measured_with: tuple[str, int] | None
    comparisons: Sequence[Comparison] | None
    samples: int
    left_out: Sequence[str]

    @cached_property
    def main(self) -> dict[str, Record]:
        """The main runs that finished."""
        return finished(self.records)

    @cached_property
    def tasks(self) -> list[str]:
        return in_order((record["task"] for record in self.main.values()), TASKS)

    @cached_property
    def methods(self) -> list[str]:
        return in_order((record["method"] for record in self.main.values()), list(METHODS))

    @property
    def compared(self) -> list[str]:
        """The methods without the ablations."""
        return [method for method in self.methods if method not in ABLATIONS]

    @cached_property
    def bleu(self) -> Means:
        return means(self.main, "bleu")

    @cached_property
    def seeds(self) -> list[int]:
        return sorted({record["seed"] for record in self.main.values()})

    def shown(self, mean: Mean | None, form: str) -> str:
        """Mean and spread; the number of seeds where it is neither that of the whole nor one, which has no spread."""
        if mean is None:
            return MISSING
        if mean.spread is None:
            return f"{mean.mean:{form}}"
        seeds = f" ({mean.seeds} of {len(self.seeds)} seeds)" if mean.seeds != len(self.seeds) else ""
        return f"{mean.mean:{form}} ± {mean.spread:{form}}{seeds}"


def number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def each(values: Sequence[object]) -> str:
    """Each different one once, in order."""
    return "; ".join(sorted({str(value) for value in values})) or MISSING
