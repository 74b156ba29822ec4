"""What an adapter has learned, in words of the vocabulary: as figures, and as a page."""

from .inspect import AdapterInspection, inspect_adapter

__all__ = ["AdapterInspection", "inspect_adapter"]
