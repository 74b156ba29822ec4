"""An adapter and its base model as one plain checkpoint, which loads without PEFT and without this package."""

from .export import export_model
from .report import ExportReport

__all__ = ["ExportReport", "export_model"]
