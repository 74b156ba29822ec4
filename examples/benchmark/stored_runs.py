"""Runs as they are kept for good: runs.jsonl has a line a run, texts.jsonl.xz the texts that each generated.

Both are sorted by the runs' names, and the same runs give the same bytes.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from input_tuning_examples.task_data import InputError
from peft_input_tuning.output.files import unfinished

RUNS, TEXTS = "runs.jsonl", "texts.jsonl.xz"


def stored_records(results: Path) -> dict[str, dict[str, Any]]:
    """The stored record of each run, by its name; none where nothing is stored.

    Raises:
        InputError: a line is no record.
    """
    path = results / RUNS
    if not path.is_file():
        return {}
    records = {}
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # texts may hold other ends of lines
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records[record.pop("name")] = record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"--results: line {number} of {str(path)!r} is no record ({error}). Take it out; its run is made "
                "again."
            ) from None
    return records


def stored_texts(results: Path) -> dict[str, list[str]]:
    """The stored texts of each run that generated some, by its name, in the order of the test rows.

    Raises:
        InputError: the file holds something else.
    """
    path = results / TEXTS
    if not path.is_file():
        return {}
    state = path.stat()
    return _texts(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=2)  # unpacked once, not once a run that is looked at
def _texts(path: Path, changed: int, size: int) -> dict[str, list[str]]:
    try:
        lines = map(json.loads, lzma.decompress(path.read_bytes()).decode().split("\n")[:-1])
        return {line["name"]: line["texts"] for line in lines}
    except (lzma.LZMAError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--results: {str(path)!r} holds no texts of runs ({error}). Fetch it again.") from None


def store(results: Path, records: Mapping[str, Mapping[str, Any]], texts: Mapping[str, list[str]]) -> None:
    """Writes both files anew; each is whole or as it was. Texts come first: a record says that its texts are there."""
    results.mkdir(parents=True, exist_ok=True)
    packed = "".join(_line({"name": name, "texts": texts[name]}) for name in sorted(texts))
    with unfinished(results / TEXTS) as scratch:
        scratch.write_bytes(lzma.compress(packed.encode(), preset=9))
    with unfinished(results / RUNS) as scratch:
        scratch.write_text("".join(_line({"name": name, **records[name]}) for name in sorted(records)), "utf-8")


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"
