"""The benchmark's report: tables and figures of the runs that are there, as Markdown and as one HTML page.

    python examples/benchmark/report.py DATA          # with the significance of differences, which needs the data
    python examples/benchmark/report.py               # with what an earlier call stored of it
    python examples/benchmark/report.py --summary     # prints the README's table, writes no report

DATA is the folder that the runs were made with. Files go beside the records: report.md, report.html, figures/ and
significance.json. The same records give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from amount_sections import amounts
from blocks import FIGURES, Block, Figure, Table, block_markdown, markdown, page
from bootstrap import SAMPLES
from comparisons import LOWEST, OURS, finished, gap_closed
from familiarity_sections import familiarity, gap, significance
from findings import MISSING, Findings, number
from in_short import in_short
from input_tuning_examples.extras import needs
from input_tuning_examples.task_data import InputError
from peft_input_tuning.output.files import unfinished
from plan import BUDGETS, SHARED
from records import RESULTS, read_records
from result_sections import ablations, samples, scores
from run_sections import all_runs, rates, what_was_run
from significance import check_installed, compare_all, load, save, still_true

FAMILIARITY = RESULTS / "familiarity.json"
STORED = "significance.json"
SECTIONS = (familiarity, scores, significance, gap, what_was_run, rates, ablations, amounts, samples, all_runs)


def gather(options: argparse.Namespace) -> Findings:
    """Reads the records, and compares outputs where DATA is there; the comparisons are stored.

    Raises:
        InputError: no main run has finished, or DATA is not that of the runs.
    """
    records = read_records(options.results)
    if not finished(records):
        raise InputError(
            f"--results: no main run in {str(options.results)!r} has finished ({len(records)} runs were started). "
            f"Call `run_all.py DATA --budget {options.budget}`, or name the folder of its records."
        )
    others = {record["budget"] for record in records.values()} - {options.budget}
    if others:
        raise InputError(
            f"--budget: {str(options.results)!r} has runs of the budget {min(others)!r}, got {options.budget!r}. "
            "Name the budget and the folder of the same runs."
        )
    stored, left_out, comparisons, draws = options.results / STORED, [], None, options.samples
    if options.data is not None:
        comparisons = compare_all(records, options.results, options.data, draws)
        save(stored, comparisons, draws)
    elif stored.is_file():
        comparisons, draws = load(stored)
        comparisons, left_out = still_true(comparisons, records, options.results)
    if options.familiarity != FAMILIARITY and not options.familiarity.is_file():
        raise InputError(
            f"--familiarity: there is no file {str(options.familiarity)!r}. familiarity_of_tasks.py writes it."
        )
    bits, measured_with = read_familiarity(options.familiarity)
    return Findings(BUDGETS[options.budget], records, bits, measured_with, comparisons, draws, left_out)


def read_familiarity(path: Path) -> tuple[dict[str, float], tuple[str, int] | None]:
    """Bits per byte of each task, and the model and the number of inputs they were measured with."""
    if not path.is_file():
        return {}, None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        bits = {task: entry["bits_per_byte"] for task, entry in found.items() if isinstance(entry, dict)}
        return bits, (found["model"], found["limit"])
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"--familiarity: {str(path)!r} is not what familiarity_of_tasks.py writes ({error}). Write it again."
        ) from None


def write(found: Findings, results: Path) -> list[Path]:
    """Writes the report and its figures; returns the files that are there."""
    title = f"Benchmark, budget {found.budget.name}"
    blocks: list[Block] = [block for section in SECTIONS for block in section(found)]
    lead = in_short(found)
    texts = {results / "report.md": markdown(title, lead, blocks), results / "report.html": page(title, lead, blocks)}
    texts |= {results / FIGURES / f"{one.name}.svg": one.svg for one in blocks if isinstance(one, Figure)}
    for path, text in texts.items():
        path.parent.mkdir(exist_ok=True)
        with unfinished(path) as scratch:
            scratch.write_text(text, encoding="utf-8")
    return [path for path in (*texts, results / STORED) if path.is_file()]


def summary(found: Findings) -> str:
    """The README's table, as Markdown; p is the largest of the seeds'."""
    head = (
        *("task", "prompt-tuning", "input-tuning", "LoRA", "fine-tuning"),
        "p of input- over prompt-tuning",
        "gap closed",
    )
    return block_markdown(Table(head, [_summary_row(found, task) for task in found.tasks]))


def _summary_row(found: Findings, task: str) -> Sequence[str]:
    wanted = (task, None, OURS, LOWEST)
    pairs = [c for c in found.comparisons or () if (c.task, c.training_rows, c.method, c.baseline) == wanted]
    p_value = max((one.p_value for one in pairs if len(one.seeds) == 1), default=None)
    share = gap_closed(found.bleu, task, OURS)
    return [
        task,
        *(found.shown(found.bleu.get((task, method)), ".1f") for method in SHARED),
        number(p_value, ".3f"),
        MISSING if share is None else f"{share:.0f} %",
    ]


def parser_for_stored_runs(description: str | None) -> argparse.ArgumentParser:
    """What scripts take that read stored runs beside their data; no --results means `RESULTS / budget`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="folder with a folder for each task")
    add("--budget", choices=sorted(BUDGETS), default="small", help="of the runs (%(default)s)")
    add("--results", type=Path, metavar="FOLDER", help="the records (default: results/BUDGET beside this script)")
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", type=Path, nargs="?", metavar="DATA", help="folder with a folder for each task")
    add("--budget", choices=sorted(BUDGETS), default="small", help="of the runs (%(default)s)")
    add("--results", type=Path, metavar="FOLDER", help="the records (default: results/BUDGET beside this script)")
    add("--familiarity", type=Path, default=FAMILIARITY, help="what familiarity_of_tasks.py wrote")
    add("--samples", type=int, default=SAMPLES, metavar="N", help="draws of the bootstrap (%(default)s)")
    add("--summary", action="store_true", help="print the README's table instead")
    options = parser.parse_args(argv)
    options.results = options.results or RESULTS / options.budget
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    try:
        if options.samples < 1:
            raise InputError(f"--samples must be >= 1, got {options.samples}.")
        needs("benchmark", "matplotlib")
        check_installed()
        found = gather(options)
    except InputError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    for word in found.left_out:
        print(f"report.py: {word} Pass DATA.", file=sys.stderr)
    if options.summary:
        print(summary(found))
        return 0
    for path in write(found, options.results):
        print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
