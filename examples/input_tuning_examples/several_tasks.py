"""Several tasks at once: generated ones, or folders of JSON lines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .logic_to_text import make_splits
from .task_data import Example, read_json_lines


@dataclass(frozen=True)
class Task:
    name: str
    train: list[Example]
    test: list[Example]


def generated_tasks(seed: int) -> list[Task]:
    """Three tasks over the same generated rows: say it in words, write it as an expression, name the properties."""
    splits = make_splits(seed=seed)
    directions = {
        "logic-to-text": lambda row: Example(row.source, (row.reference,)),
        "text-to-logic": lambda row: Example(row.reference, (row.source,)),
        "properties": lambda row: Example(row.source, (", ".join(row.properties) or "none",)),
    }
    return [
        Task(name, [make(row) for row in splits["train"]], [make(row) for row in splits["test"]])
        for name, make in directions.items()
    ]


def tasks_from(data: Path, names: list[str]) -> list[Task]:
    """Tasks from folders of JSON lines.

    Raises:
        InputError: a file is missing or not what it should be.
    """
    return [
        Task(name, *(read_json_lines(str(data / name / f"{split}.jsonl"), "--data") for split in ("train", "test")))
        for name in names
    ]
