"""The result files: one JSON object a run, and the texts that it generated, one a line, in a file beside it.

A record is written when its run starts, and again when it ends, so that every run that was started is to be found.
Its `status` is "running" (also: killed), "interrupted", "failed", "diverged" or "finished"; the last two are final.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from input_tuning_examples.task_data import InputError
from peft_input_tuning.output.files import unfinished

FINAL = ("finished", "diverged")
Record = dict[str, Any]


def read_record(results: Path, name: str) -> Record | None:
    """The record of the run of this name; None if it was never started."""
    path = results / f"{name}.json"
    return _read(path) if path.is_file() else None


def _read(path: Path) -> Record:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"--results: {str(path)!r} is no record ({error}). Remove it; its run is made again."
        ) from None


def write_record(results: Path, name: str, record: Record) -> None:
    path = results / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as scratch:
        lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items())
        scratch.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")  # a key a line, short to look at


def write_outputs(results: Path, name: str, texts: list[str]) -> None:
    """One generated text a line; line breaks in it become blanks."""
    path = results / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as scratch:
        scratch.write_text("".join(" ".join(text.split()) + "\n" for text in texts), encoding="utf-8")


def read_outputs(results: Path, name: str) -> list[str]:
    return (results / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")


def read_records(results: Path) -> dict[str, Record]:
    """All records below a folder, by their runs' names.

    Raises:
        InputError: a file is no record.
    """
    return {f"{path.parent.name}/{path.stem}": _read(path) for path in sorted(results.glob("*/*.json"))}


def losses(records: dict[str, Record]) -> dict[str, float]:
    """Validation loss of each run that has ended; infinite where training diverged."""
    ended = {name: record for name, record in records.items() if record["status"] in FINAL}
    return {
        name: record["metrics"]["validation_loss"] if record["status"] == "finished" else math.inf
        for name, record in ended.items()
    }
