"""The results of runs: a record each, and the texts that it generated.

A run has two files of its own below `runs/`, which git ignores: a JSON object, and one text a line. The record is
written when the run starts, and again when it ends, so that every run that was started is to be found. `collect.py`
moves what is there into the two files of `stored_runs.py`, which the repository keeps. A run's own record comes before
its stored one, and its texts are from where its record is.

The `status` is "running" (also: killed), "interrupted", "failed", "diverged" or "finished"; the last two are final.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from input_tuning_examples.task_data import InputError
from peft_input_tuning.output.files import unfinished
from stored_runs import stored_records, stored_texts

RESULTS = Path(__file__).resolve().parent / "results"
FINAL = ("finished", "diverged")
OWN = "runs"
AGAIN = "Take its line out of runs.jsonl, or its files out of runs/, and run it again."
Record = dict[str, Any]


def record_file(results: Path, name: str) -> Path:
    """Where a run of this name writes its own record."""
    return results / OWN / f"{name}.json"


def outputs_file(results: Path, name: str) -> Path:
    """Where a run of this name writes its texts."""
    return results / OWN / f"{name}.txt"


def read_record(results: Path, name: str) -> Record | None:
    """The record of the run of this name; None if it was never started."""
    path = record_file(results, name)
    return _read(path) if path.is_file() else stored_records(results).get(name)


def _read(path: Path) -> Record:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"--results: {str(path)!r} is no record ({error}). Remove it; its run is made again."
        ) from None


def write_record(results: Path, name: str, record: Record) -> None:
    """Writes a run's own record."""
    path = record_file(results, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as scratch:
        lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items())
        scratch.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")  # a key a line, short to look at


def write_outputs(results: Path, name: str, texts: list[str]) -> None:
    """One generated text a line; line breaks in it become blanks."""
    path = outputs_file(results, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as scratch:
        scratch.write_text("".join(" ".join(text.split()) + "\n" for text in texts), encoding="utf-8")


def read_outputs(results: Path, name: str) -> list[str]:
    """The texts of a run, in the order of the test rows.

    Raises:
        InputError: they are missing.
    """
    path = outputs_file(results, name)
    if path.is_file():
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    texts = None if record_file(results, name).is_file() else stored_texts(results).get(name)
    if texts is None:
        raise InputError(f"{name}: its texts are missing. {AGAIN}")
    return texts


def own_records(results: Path) -> dict[str, Record]:
    """The records that runs wrote and that are not stored yet, by their runs' names.

    Raises:
        InputError: a file is no record.
    """
    return {f"{path.parent.name}/{path.stem}": _read(path) for path in sorted((results / OWN).glob("*/*.json"))}


def read_records(results: Path) -> dict[str, Record]:
    """All records of a folder, stored or not, by their runs' names.

    Raises:
        InputError: one is no record.
    """
    return dict(sorted((stored_records(results) | own_records(results)).items()))


def has_texts(record: Record) -> bool:
    """Whether a run has generated texts: it finished, and was not one of the search for rates."""
    return record["status"] == "finished" and record["stage"] != "rates"


def losses(records: dict[str, Record]) -> dict[str, float]:
    """Validation loss of each run that has ended; infinite where training diverged."""
    ended = {name: record for name, record in records.items() if record["status"] in FINAL}
    return {
        name: record["metrics"]["validation_loss"] if record["status"] == "finished" else math.inf
        for name, record in ended.items()
    }
