"""Training runs side by side: their figures, the settings that differ, their curves. Needs no torch."""

from .read import TrainingRun, read_runs

__all__ = ["TrainingRun", "read_runs"]
