"""Moves the records and texts of runs into runs.jsonl and texts.jsonl.xz, the form in which results are kept.

    python examples/benchmark/collect.py                  # of the small budget
    python examples/benchmark/collect.py --budget full

To be called when no run is going on. What reads results finds the same runs before and after.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from input_tuning_examples.task_data import InputError
from plan import BUDGETS
from records import OWN, RESULTS, has_texts, own_records, read_outputs, read_records
from stored_runs import store, stored_texts


def collect(results: Path) -> int:
    """Stores all runs of a folder, and removes their own files; returns how many had some.

    Raises:
        InputError: a record cannot be read, is of a run that goes on, or its texts are missing.
    """
    own, records = own_records(results), read_records(results)
    running = [name for name, record in own.items() if record["status"] == "running"]
    if running:
        raise InputError(f"{running[0]} is running, or was killed. Let it end, or run it again, and collect then.")
    kept = stored_texts(results)
    texts = {name: text for name, text in kept.items() if name not in own}
    texts |= {name: read_outputs(results, name) for name, record in own.items() if has_texts(record)}
    store(results, records, texts)
    shutil.rmtree(results / OWN, ignore_errors=True)
    return len(own)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--budget", choices=sorted(BUDGETS), default="small", help="of the runs (%(default)s)")
    add("--results", type=Path, metavar="FOLDER", help="the records (default: results/BUDGET beside this script)")
    options = parser.parse_args(argv)
    results = options.results or RESULTS / options.budget
    try:
        number = collect(results)
    except InputError as error:
        print(f"collect.py: {error}", file=sys.stderr)
        return 2
    print(f"{number} runs are stored in {results}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
