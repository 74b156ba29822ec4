"""What prompt-tuning lost against fine-tuning on tasks where both were trained, over a figure of familiarity.

    loss in % = intercept + slope * figure          fitted by least squares, one point a task

Nothing is packaged: a line holds for the model, the prompt's length and the scores that it was fitted on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, linear_regression

from ..output.files import unfinished

FIGURES = ("bits_per_byte", "excess_bits_per_byte", "tokens_per_byte", "bigram_score")
LEAST_TASKS = 5
LEAST_STANDARD_ERRORS = 3.0


@dataclass(frozen=True)
class FamiliarityRegression:
    """A fitted line and its errors.

    Args:
        figure: one of `FIGURES`: what a task's familiarity is measured by.
        slope: percent of fine-tuning's score that prompt-tuning loses for each unit of the figure.
        intercept: the same where the figure is 0.
        slope_error: standard error of the slope.
        residual_error: standard deviation of the tasks around the line, in percent, with n - 2 degrees of freedom.
        tasks: number of tasks, n.
        mean, lowest, highest: of the tasks' figures. Nothing is said of inputs outside of them.
        source: where it comes from: model, scores, prompt.
    """

    figure: str
    slope: float
    intercept: float
    slope_error: float
    residual_error: float
    tasks: int
    mean: float
    lowest: float
    highest: float
    source: str

    def __post_init__(self) -> None:
        if self.figure not in FIGURES:
            raise ValueError(f"`figure` must be one of {FIGURES}, got {self.figure!r}.")
        for name, value in asdict(self).items():
            if name not in ("figure", "source") and not (isinstance(value, int | float) and math.isfinite(value)):
                raise ValueError(f"`{name}` must be a number, got {value!r}.")

    @classmethod
    def fit(cls, figure: str, values: Sequence[float], losses: Sequence[float], source: str) -> FamiliarityRegression:
        """Fits the line.

        Args:
            figure: what `values` are.
            values: a figure for each task.
            losses: percent of fine-tuning's score that prompt-tuning lost on it.
            source: where they come from.

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
        return cls(figure, slope, intercept, residual / spread, residual, n, mean, min(values), max(values), source)

    def save(self, path: str | Path) -> None:
        """Writes it as a JSON object."""
        with unfinished(Path(path)) as scratch:
            scratch.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> FamiliarityRegression:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{str(path)!r} holds no regression ({error}).") from None

    def unsupported(self, value: float | None) -> str | None:
        """Why the line says nothing of inputs with this figure; None if it does."""
        if value is None:
            return f"{self.figure} was not measured"
        if self.tasks < LEAST_TASKS:
            return f"it rests on {self.tasks} tasks, fewer than {LEAST_TASKS}"
        if abs(self.slope) < LEAST_STANDARD_ERRORS * self.slope_error:
            return f"its slope, {self.slope:.3g} ± {self.slope_error:.2g}, is too uncertain"
        if not self.lowest <= value <= self.highest:
            return f"{self.figure} = {value:.2f} is outside of its tasks' {self.lowest:.2f} to {self.highest:.2f}"
        return None

    def predict(self, value: float) -> tuple[float, float]:
        """Expected loss in percent, and the standard error of the prediction for one new task."""
        if self.slope_error == 0:  # the tasks lie on the line
            return self.intercept + self.slope * value, 0.0
        spread = self.residual_error / self.slope_error
        error = self.residual_error * math.sqrt(1 + 1 / self.tasks + ((value - self.mean) / spread) ** 2)
        return self.intercept + self.slope * value, error
