"""What an export says to its caller."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExportReport:
    """What `export_model` wrote.

    Args:
        output_dir: the folder.
        adapter_name: the adapter.
        virtual_token_ids: ids that stand before every input, in order; without a tokenizer the caller puts them there.
        largest_difference: largest absolute difference of outputs between the adapted and the reloaded model.
        largest_output: largest absolute output, to compare with.
    """

    output_dir: Path
    adapter_name: str
    virtual_token_ids: tuple[int, ...]
    largest_difference: float
    largest_output: float
