"""What scripts about one saved adapter share: their arguments, and the check of the adapter's folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from input_tuning_examples.packaged_model import PACKAGED
from input_tuning_examples.task_data import InputError


def parser_for_adapter(description: str | None, rows: str) -> argparse.ArgumentParser:
    """A parser of DATA, ADAPTER, --task, --model and --work; `rows` says which of the task's are read."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="folder with a folder for each task")
    add("adapter", metavar="ADAPTER", help="folder of a saved adapter")
    add("--task", default="overnight", help=f"whose {rows} are read (%(default)s)")
    add("--model", default=PACKAGED, help="the adapter's base (default: the packaged one)")
    add("--work", type=Path, default=Path("outputs/benchmark"), help="where it is kept (%(default)s)")
    return parser


def check_adapter(folder: str) -> None:
    """Raises InputError where a folder holds no adapter."""
    if not (Path(folder) / "adapter_config.json").is_file():
        raise InputError(f"ADAPTER: there is no adapter_config.json in {folder!r}. Name a saved adapter's folder.")
