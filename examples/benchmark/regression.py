"""What prompt-tuning lost against fine-tuning on tasks where both were trained, over a figure of familiarity.

    loss in % = intercept + slope * figure          fitted by least squares, one point a task

A line holds for the model, the prompt's length and the scores that it was fitted on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression

LEAST_TASKS = 5
LEAST_STANDARD_ERRORS = 3.0


@dataclass(frozen=True)
class FamiliarityRegression:
    """A fitted line and its errors.

    Args:
        slope: percent of fine-tuning's score that prompt-tuning loses for each unit of the figure.
        intercept: the same where the figure is 0.
        slope_error: standard error of the slope.
        residual_error: standard deviation of the tasks around the line, in percent, with n - 2 degrees of freedom.
        tasks: number of tasks, n.
        lowest, highest: of the tasks' figures. Nothing is said of inputs outside of them.
    """

    slope: float
    intercept: float
    slope_error: float
    residual_error: float
    tasks: int
    lowest: float
    highest: float

    @classmethod
    def fit(cls, values: Sequence[float], losses: Sequence[float]) -> FamiliarityRegression:
        """Fits the line.

        Args:
            values: a figure of familiarity for each task.
            losses: percent of fine-tuning's score that prompt-tuning lost on it.

        Raises:
            ValueError: fewer than three tasks, lists of different lengths, or all values the same.
        """
        n = len(values)
        if n < 3 or n != len(losses) or len(set(values)) < 2:
            raise ValueError(f"`values` must be at least 3, as many as `losses` and not all the same, got {n}.")
        slope, intercept = linear_regression(values, losses)
        squares = sum((y - intercept - slope * x) ** 2 for x, y in zip(values, losses, strict=True))
        residual = math.sqrt(squares / (n - 2))
        mean = fmean(values)
        spread = math.sqrt(sum((x - mean) ** 2 for x in values))
        return cls(slope, intercept, residual / spread, residual, n, min(values), max(values))

    @property
    def unsupported(self) -> str | None:
        """Why the line says nothing of other inputs; None if it does."""
        if self.tasks < LEAST_TASKS:
            return f"it rests on {self.tasks} tasks, fewer than {LEAST_TASKS}"
        if abs(self.slope) < LEAST_STANDARD_ERRORS * self.slope_error:
            return f"its slope, {self.slope:.3g} ± {self.slope_error:.2g}, is too uncertain"
        return None
