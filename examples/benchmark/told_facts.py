"""Which facts of their inputs the texts tell, and how much they repeat: what makes texts short or long.

    python examples/benchmark/told_facts.py DATA --task webnlg

DATA is the folder that the runs were made with. Prints a Markdown table over the task's main runs of the first seed.
For tasks whose inputs are triples, `subject : predicate : object | ...`: WebNLG and DART.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from blocks import Table, block_markdown
from comparisons import finished, in_order
from input_tuning_examples.task_data import InputError
from methods import METHODS
from plan import ABLATIONS, BUDGETS
from records import RESULTS, read_records
from report import parser_for_stored_runs
from significance import check_installed, outputs_and_references
from tasks import SPLITS, find_tasks, read_task

WITH_TRIPLES = ("webnlg", "dart")
ENOUGH = 0.6  # of an object's words: they may be inflected, or a date written otherwise
REFERENCE = "first reference"
HEAD = ("", "words a text", "facts told", "first of several", "last of several", "repeated trigrams")


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def objects(source: str) -> list[str]:
    """What each triple says of its subject.

    Raises:
        InputError: the source is not made of triples.
    """
    triples = [triple.split(" : ") for triple in source.split(" | ")]
    if any(len(triple) < 3 for triple in triples):
        raise InputError(f"--task: {source!r} is not 'subject : predicate : object | ...'. Choose another task.")
    return [triple[-1] for triple in triples]


def is_told(entity: str, text: str) -> bool:
    """Whether enough of its words are in the text, wherever."""
    wanted, there = words(entity), set(words(text))
    return sum(word in there for word in wanted) >= ENOUGH * len(wanted)


def repeated(text: str) -> float:
    """Share of its trigrams of words that it had before."""
    found = words(text)
    trigrams = list(zip(found, found[1:], found[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def row(name: str, sources: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Of one method: means over texts of words and repetitions, and over facts of whether they are told."""
    told = [[is_told(one, text) for one in objects(source)] for source, text in zip(sources, texts, strict=True)]
    several = [facts for facts in told if len(facts) > 1]
    shares = [[fact for facts in told for fact in facts], [facts[0] for facts in several], [f[-1] for f in several]]
    return [
        name,
        f"{fmean(len(words(text)) for text in texts):.1f}",
        *(f"{100 * fmean(share):.0f} %" for share in shares),
        f"{100 * fmean(map(repeated, texts)):.1f} %",
    ]


def table(results: Path, data: Path, task: str, seed: int) -> Table:
    """A row for each method that finished, and one for the first reference.

    Raises:
        InputError: no main run of the task finished, or DATA is not that of the runs.
    """
    records = finished(read_records(results))
    names = {
        record["method"]: name
        for name, record in records.items()
        if (record["task"], record["seed"]) == (task, seed) and record["method"] not in ABLATIONS
    }
    if not names:
        raise InputError(f"--results: no main run of {task} in {str(results)!r} has finished. Name the runs' folder.")
    find_tasks(data, (task,))
    rows = []
    for method in in_order(names, list(METHODS)):
        texts, references = outputs_and_references(results, data, names[method], records[names[method]])
        tests = {**dict.fromkeys(SPLITS), "test": len(references)}
        sources = [example.source for example in read_task(data, task, tests).rows["test"]]
        rows.append(row(method, sources, texts))
    return Table(HEAD, [*rows, row(REFERENCE, sources, [some[0] for some in references])])


def main(argv: list[str] | None = None) -> int:
    parser = parser_for_stored_runs(__doc__)
    parser.add_argument("--task", choices=WITH_TRIPLES, default=WITH_TRIPLES[0], help="(%(default)s)")
    options = parser.parse_args(argv)
    results = options.results or RESULTS / options.budget
    try:
        check_installed()
        print(block_markdown(table(results, options.data, options.task, BUDGETS[options.budget].seeds[0])))
    except InputError as error:
        print(f"told_facts.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
