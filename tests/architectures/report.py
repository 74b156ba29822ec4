"""What the results of a run come to: counts and lists for the terminal, a page of documentation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .registry import CELLS

STATUSES = ("exact", "lacks", "refused", "failure")
LONGEST = 320  # characters of a reason
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
WORDS = {
    "exact": "exact in every cell that the base has",
    "refused": "something is refused, by an error that says why",
    "failure": "something is wrong",
    "lacks": "the base cannot be run on text",
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
    said = {
        status: [f"{wrong}{', '.join(names)}: {_short(note)}" for note, names in by_status.get(status, {}).items()]
        for status, wrong in (("lacks", ""), ("failure", "**wrong**: "), ("refused", ""))
    }
    columns = said["lacks"], said["failure"] + said["refused"]
    return f"| {record['name']} | {exact} | {' | '.join('<br>'.join(column) for column in columns)} |"


def _short(note: str) -> str:
    """A reason; of an error the message, without the place where it was raised."""
    note = note.rpartition(" (")[0] if note.endswith(")") else note
    return (note if len(note) <= LONGEST else f"{note[:LONGEST]} ...").replace("|", "\\|")


def records(path: Path) -> dict[str, dict[str, Any]]:
    """What a file holds, by the names of architectures; later lines count."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {record["name"]: record for record in lines}


def worst(record: dict[str, Any]) -> str:
    """What an architecture comes to: the worst of its cells, where what the base lacks does not count."""
    found = {cell["status"] for cell in record["cells"].values()}
    return next((status for status in ("failure", "refused", "exact") if status in found), "lacks")


def summary(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Counts by cell, and the failures."""
    yield f"{'cell':32}" + "".join(f"{status:>9}" for status in STATUSES)
    for name in ["base", *CELLS]:
        counts = Counter(r["cells"][name]["status"] for r in found.values() if name in r["cells"])
        if counts:
            yield f"{name:32}" + "".join(f"{counts[status]:>9}" for status in STATUSES)
    counts = Counter(map(worst, found.values()))
    yield f"{'architectures':32}" + "".join(f"{counts[status]:>9}" for status in STATUSES) + f"   of {len(found)}"
    for status in ("refused", "failure"):
        yield f"\n{status}:"
        for record in found.values():
            said: dict[str, list[str]] = {}
            for name, cell in record["cells"].items():
                if cell["status"] == status:
                    gap = f" (gap {cell['gap']:.1e})" if "gap" in cell else ""
                    said.setdefault(cell.get("note", "") if gap == "" else "wrong value", []).append(name + gap)
            for note, names in said.items():
                yield f"  {record['name']}: {', '.join(names)}: {note}"
