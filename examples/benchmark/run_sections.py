"""The report's sections on the runs themselves: what was run, the search for learning rates, every run by name."""

from __future__ import annotations

import math
import re
from collections import Counter

from blocks import Block, Code, Figure, Heading, Paragraph, Table
from figures import rate_search
from findings import MISSING, Findings, each
from methods import METHODS
from plan import best_rate, runs
from records import Record, losses
from tasks import SPLITS

STAGES = {"rates": "search for rates", "main": "main runs", "amounts": "less or more training"}
_ERROR_LENGTH = 160  # characters


def what_was_run(found: Findings) -> list[Block]:
    records = list(found.records.values())
    configs = [record["config"] for record in records if "config" in record]
    training = [
        f"{name}: {each([record['steps'] for record in records if record['stage'] == stage])} steps"
        for stage, name in STAGES.items()
        if any(record["stage"] == stage for record in records)
    ]
    packages = sorted({package for record in records for package in record["versions"]})
    versions = [f"{one} {each([r['versions'][one] for r in records if one in r['versions']])}" for one in packages]
    rows = [
        ("model", each([config["model"] for config in configs])),
        ("type of frozen weights", each([config["dtype"] for config in configs])),
        ("training", ", ".join(training)),
        ("rows of a step", each([config["batch_size"] for config in configs])),
        ("seeds of the main runs", ", ".join(map(str, found.seeds))),
        ("machines", each([record["machine"] for record in records])),
        ("versions", ", ".join(versions)),
    ]
    return [
        Heading("What was run"),
        Table(("", ""), rows),
        Table(("task", *(f"{split} rows" for split in SPLITS), "SHA-256 of test.jsonl"), _task_rows(found)),
        *_states(found),
    ]


def _task_rows(found: Findings) -> list[list[str]]:
    rows = []
    for task in found.tasks:
        records = [record for record in found.main.values() if record["task"] == task]
        counts = [each([record["config"]["rows"][split] for record in records]) for split in SPLITS]
        rows.append([task, *counts, each([record["data_hash"]["test"][:12] + "…" for record in records])])
    return rows


def _states(found: Findings) -> list[Block]:
    """Runs by status; all that did not finish by name."""
    counts = Counter(record["status"] for record in found.records.values())
    rows = []
    for status in sorted(counts, key=lambda status: (status != "finished", status)):
        names = [name for name, record in found.records.items() if record["status"] == status]
        rows.append((status, str(len(names)), "see the last table" if status == "finished" else ", ".join(names)))
    known = {run.name for run in runs(found.budget, losses(dict(found.records)))}
    return [
        Table(("status", "runs", ""), [*rows, ("all", str(len(found.records)), "")]),
        Paragraph(
            'The status "running" is also that of a run that was killed. Of the runs that the plan knows by now, '
            f"{len(known - set(found.records))} were not started. {MISSING} in a table: no such run finished."
        ),
    ]


def rates(found: Findings) -> list[Block]:
    """The losses of the search, and what was chosen."""
    searched = [method for method, entry in METHODS.items() if entry.rates_of is None]
    known = losses(dict(found.records))
    tasks = found.budget.search_tasks
    rows = []
    for method in searched:
        tried = {task: _tried(found, task, method) for task in tasks}
        if any(tried.values()):
            rows += [(method, task, tried[task] or MISSING, _rate(found, task, method, known)) for task in tasks]
            rows.append((method, "other tasks", "", _rate(found, "", method, known)))
    svg = rate_search(found.records, tasks, searched)
    caption = "Validation loss over learning rates; a cross at the top is a rate that diverged"
    return [
        Heading("Learning rates"),
        Paragraph(
            "Of each rate the validation loss at the end of a short run. Other tasks take the rate with the lowest "
            "mean over the tasks of the search. Of input-tuning the input-adapter's rate; the soft prompt's is 10 "
            f"times that where nothing else is said. {MISSING} as chosen: the search goes on. Ablations take "
            "input-tuning's."
        ),
        Table(("method", "task", "rate: validation loss", "chosen"), rows),
        *([Figure("rates", caption, svg)] if svg else []),
    ]


def _tried(found: Findings, task: str, method: str) -> str:
    records = [
        record
        for record in found.records.values()
        if (record["stage"], record["task"], record["method"]) == ("rates", task, method)
    ]
    return ", ".join(f"{one['rate']:g}: {_outcome(one)}" for one in sorted(records, key=lambda one: one["rate"]))


def _outcome(record: Record) -> str:
    done = record["status"] == "finished"
    return f"{record['metrics']['validation_loss']:.3f}" if done else record["status"]


def _rate(found: Findings, task: str, method: str, known: dict[str, float]) -> str:
    rate = best_rate(found.budget, task, method, known)
    return MISSING if rate is None or not math.isfinite(rate) else f"{rate:g}"


def all_runs(found: Findings) -> list[Block]:
    """Every run that was started, also those that came to nothing."""
    rows = [
        (
            name,
            record["status"],
            f"{record['rate']:g}",
            str(record["attempts"]),
            f"{sum(record['seconds'].values()):.0f}" if "seconds" in record else MISSING,
            Code(_error(record["errors"][-1]) if record["errors"] else ""),
        )
        for name, record in found.records.items()
    ]
    return [
        Heading("All runs"),
        Paragraph("Seconds are those of the last attempt. The error is the last one of any attempt."),
        Table(("run", "status", "rate", "attempts", "seconds", "error"), rows),
    ]


def _error(text: str) -> str:
    """Its beginning on one line; of paths only the last part, as the others are the machine's."""
    line = re.sub(r"(?:/[^\s/'\"]+)+/(?=[^\s/'\"])", "…/", " ".join(text.split()))
    return line if len(line) <= _ERROR_LENGTH else line[:_ERROR_LENGTH] + "…"
