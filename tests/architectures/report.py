"""Writes docs/architectures.md from a file of results: `python -m tests.architectures.report FILE.jsonl`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from .runner import records, worst

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
WORDS = {
    "exact": "exact in every cell that the base has",
    "refused": "something is refused, by an error that says why",
    "failure": "something is wrong",
    "lacks": "the base cannot be run",
}


def page(found: dict[str, dict[str, Any]], versions: str) -> str:
    """The page: counts, then a line an architecture."""
    counts = Counter(map(worst, found.values()))
    lines = [
        "# Every text architecture of transformers",
        "",
        f"{counts['exact']} of {len(found)} architectures are exact in every cell that the base itself has. A cell is",
        "what is tried: forward, padding, caches, generation, mixed batches, training, saving, images, heads",
        f"(`tests/architectures/cells.py`), with tiny random models, in float64 if they can, {versions}.",
        "`make test-architectures` writes this page.",
        "",
        "| comes to | architectures |",
        "|---|--:|",
        *(f"| {said} | {counts[status]} |" for status, said in WORDS.items() if counts[status]),
        "",
        "| architecture | exact | the base lacks | refused or wrong |",
        "|---|--:|---|---|",
    ]
    return "\n".join([*lines, *(_line(record) for _, record in sorted(found.items()))]) + "\n"


def _line(record: dict[str, Any]) -> str:
    by_status: dict[str, dict[str, list[str]]] = {}
    for name, cell in record["cells"].items():
        by_status.setdefault(cell["status"], {}).setdefault(cell.get("note", ""), []).append(name)
    exact = sum(len(names) for names in by_status.get("exact", {}).values())
    lacks = "; ".join(", ".join(names) for names in by_status.get("lacks", {}).values())
    said = [
        f"{'**wrong**: ' if status == 'failure' else ''}{', '.join(names)}: {_short(note)}"
        for status in ("failure", "refused")
        for note, names in by_status.get(status, {}).items()
    ]
    return f"| {record['name']} | {exact} | {lacks} | {'<br>'.join(said)} |"


def _short(note: str) -> str:
    """An error's message, without the place where it was raised."""
    return note.rpartition(" (")[0].replace("|", "\\|") if note.endswith(")") else note


def main() -> None:
    import torch
    import transformers

    versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    PAGE.write_text(page(records(Path(sys.argv[1])), versions), encoding="utf-8")


if __name__ == "__main__":
    main()
