"""The metrics of finished runs once more, from their stored texts: for when one was added or mended (BLEU apart, by
which a record and its texts are known to belong together).

    python examples/benchmark/rescore.py DATA

DATA is the folder that the runs were made with. All runs are measured before the first record is written; their
`versions` stay those of the training.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from input_tuning_examples.metrics import PAPER_METRICS
from input_tuning_examples.task_data import InputError
from one_run import check_installed
from records import RESULTS, Record, has_texts, read_outputs, read_records, write_outputs, write_record
from report import parser_for_stored_runs
from significance import outputs_and_references
from tasks import find_tasks


def rescore(results: Path, data: Path) -> dict[str, Record]:
    """The records whose metrics change, with all of their metrics.

    Raises:
        InputError: there are no such runs, DATA is not that of the runs, or a run's texts are missing or another's;
            the message names the run.
    """
    records = {name: record for name, record in read_records(results).items() if has_texts(record)}
    if not records:
        raise InputError(
            f"--results: no run with texts in {str(results)!r} has finished. Name the folder of the runs."
        )
    find_tasks(data, tuple({record["task"] for record in records.values()}))
    import evaluate

    metric = evaluate.load(PAPER_METRICS)
    changed = {}
    for name, record in tqdm(records.items(), desc="Measuring", unit="run", disable=None):
        texts, references = outputs_and_references(results, data, name, record)
        metrics = record["metrics"] | metric.compute(predictions=texts, references=references)
        if metrics != record["metrics"]:
            changed[name] = record | {"metrics": metrics}
    return changed


def main(argv: list[str] | None = None) -> int:
    options = parser_for_stored_runs(__doc__).parse_args(argv)
    results = options.results or RESULTS / options.budget
    try:
        check_installed()
        changed = rescore(results, options.data)
    except InputError as error:
        print(f"rescore.py: {error}", file=sys.stderr)
        return 2
    for name, record in changed.items():
        write_outputs(results, name, read_outputs(results, name))  # beside its record, wherever they were
        write_record(results, name, record)
    print(f"{len(changed)} records in {results} have new metrics; collect.py stores them.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
