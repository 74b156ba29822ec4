"""The rows the demo trains and tests on: JSON lines from files, or the generated task of `logic_to_text.py`.

One row a line, {"source": str, "references": [str, ...]}. Training and validation use a row's first reference.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from .logic_to_text import make_splits

VALIDATION_ROWS = 48
SHAPE = '{"source": "...", "references": ["...", ...]}'


class InputError(ValueError):
    """Something the user passed cannot be used; the message names the argument, the value and the remedy."""


@dataclass(frozen=True)
class Example:
    source: str
    references: tuple[str, ...]


def read_json_lines(path: str, argument: str) -> list[Example]:
    """Reads and checks a whole file.

    Raises:
        InputError: it is missing, empty, or a line is not what it should be.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # JSON may hold what splitlines takes for an end
    except FileNotFoundError:
        raise InputError(f"{argument}: there is no file {path!r}. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{argument}: {path!r} cannot be read ({error}). Pass a file of UTF-8 JSON lines.") from None
    examples = [_parse(line, f"{argument}: line {n} of {path!r}") for n, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise InputError(f"{argument}: {path!r} is empty. Write one JSON object a line, {SHAPE}.")
    return examples


def _parse(line: str, where: str) -> Example:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error.msg}, column {error.colno}). Write {SHAPE}.") from None
    source, references = (row.get("source"), row.get("references")) if isinstance(row, dict) else (None, None)
    if not isinstance(source, str) or not source.strip():
        raise InputError(f'{where} has no text under "source", got {source!r:.60}. Write {SHAPE}.')
    if not isinstance(references, list) or not references or not all(isinstance(r, str) and r for r in references):
        raise InputError(f'{where} has no list of texts under "references", got {references!r:.60}. Write {SHAPE}.')
    return Example(source, tuple(references))


def split_by_source(examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Takes rows for validation out of the training rows; no source is in both."""
    sources = sorted({example.source for example in examples})
    if len(sources) < 2:
        raise InputError("--train-file has one source only, so no row is left to validate on. Pass --validation-file.")
    random.Random(seed).shuffle(sources)
    held_out: set[str] = set(sources[: min(VALIDATION_ROWS, max(1, len(sources) // 10))])
    validation = [example for example in examples if example.source in held_out]
    return [example for example in examples if example.source not in held_out], validation


def limit(examples: list[Example], rows: int, seed: int) -> list[Example]:
    """At most `rows` of them, drawn at random, in their order."""
    if len(examples) <= rows:
        return examples
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), rows))]


def load_task(
    train_file: str | None, validation_file: str | None, test_file: str | None, test_rows: int, seed: int
) -> dict[str, list[Example]]:
    """The "train", "validation" and "test" rows; generated where no files are given."""
    if bool(train_file) != bool(test_file) or (validation_file and not train_file):
        given = {"--train-file": train_file, "--validation-file": validation_file, "--test-file": test_file}
        missing = next(name for name in ("--train-file", "--test-file") if not given[name])
        raise InputError(f"{missing} is not given. Pass both --train-file and --test-file, or no file at all.")
    if not train_file or not test_file:
        splits = make_splits(validation=VALIDATION_ROWS, test=test_rows, seed=seed)
        return {name: [Example(row.source, (row.reference,)) for row in rows] for name, rows in splits.items()}
    train = read_json_lines(train_file, "--train-file")
    test = read_json_lines(test_file, "--test-file")
    if validation_file:
        validation = read_json_lines(validation_file, "--validation-file")
    else:
        train, validation = split_by_source(train, seed)
    return {
        "train": train,
        "validation": limit(validation, VALIDATION_ROWS, seed),
        "test": limit(test, test_rows, seed),
    }
