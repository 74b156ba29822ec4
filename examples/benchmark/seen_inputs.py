"""Scores on test inputs that occur in the training rows, and on those that do not.

    python examples/benchmark/seen_inputs.py DATA --task overnight

DATA is the folder that the runs were made with. Prints a Markdown table: BLEU of each method's first seed, over the
numbers of training rows that there are runs of. Overnight's forms are few, so that most test inputs have been seen.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bleu import bleu
from blocks import Table, block_markdown
from comparisons import finished
from findings import MISSING
from input_tuning_examples.task_data import InputError
from plan import BUDGETS, SHARED, TASKS, Budget
from records import RESULTS, Record, read_records
from report import parser_for_stored_runs
from significance import check_installed, outputs_and_references
from tasks import find_tasks, read_task


def split_scores(texts: list[str], references: list[list[str]], seen: list[bool]) -> tuple[float | None, float | None]:
    """BLEU, in per cent, of the rows that were seen and of the others; None where there are none."""

    def score(rows: list[int]) -> float | None:
        return bleu([texts[row] for row in rows], [references[row] for row in rows]) if rows else None

    return score([row for row, was in enumerate(seen) if was]), score([row for row, was in enumerate(seen) if not was])


def table(results: Path, data: Path, task: str, budget: Budget) -> Table:
    """A row for each number of training rows.

    Raises:
        InputError: no run of the task finished, or DATA is not that of the runs.
    """
    records = read_records(results)
    runs = {
        name: record
        for name, record in (finished(records, "amounts") | finished(records)).items()
        if (record["task"], record["seed"]) == (task, budget.seeds[0]) and record["method"] in SHARED
    }
    if not runs:
        raise InputError(f"--results: no run of {task} in {str(results)!r} has finished. Name the runs' folder.")
    find_tasks(data, (task,))
    amounts: dict[int, dict[str, str]] = {}
    for name, record in runs.items():
        amounts.setdefault(record["config"]["rows"]["train"], {})[record["method"]] = name
    rows = [_row(results, data, task, budget, number, runs, amounts[number]) for number in sorted(amounts)]
    return Table(("training rows", "test inputs seen", *SHARED), rows)


def _row(
    results: Path, data: Path, task: str, budget: Budget, number: int, runs: dict[str, Record], names: dict[str, str]
) -> list[str]:
    record = runs[next(iter(names.values()))]
    most = {"train": budget.train_rows, "validation": 1, "test": record["config"]["rows"]["test"]}
    split = read_task(data, task, most, record["rows"] if record["stage"] == "amounts" else None).rows
    sources = {example.source for example in split["train"]}
    seen = [example.source in sources for example in split["test"]]
    cells = []
    for method in SHARED:
        if method not in names:
            cells.append(MISSING)
            continue
        both = split_scores(*outputs_and_references(results, data, names[method], runs[names[method]]), seen)
        cells.append(" / ".join(MISSING if score is None else f"{score:.1f}" for score in both))
    return [f"{number:,}", f"{sum(seen)} of {len(seen)}", *cells]


def main(argv: list[str] | None = None) -> int:
    parser = parser_for_stored_runs(__doc__)
    parser.add_argument("--task", choices=TASKS, default="overnight", help="(%(default)s)")
    options = parser.parse_args(argv)
    results = options.results or RESULTS / options.budget
    try:
        check_installed()
        print(block_markdown(table(results, options.data, options.task, BUDGETS[options.budget])))
    except InputError as error:
        print(f"seen_inputs.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
