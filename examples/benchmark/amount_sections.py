"""The report's section on less and more training: runs on fewer and more rows beside the main runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from blocks import Block, Figure, Heading, Paragraph, Table
from comparisons import Mean, finished, in_order
from figures import scores_over_rows
from findings import Findings, each
from methods import METHODS
from plan import MOST_PASSES, TASKS
from records import Record

_METRICS = {"validation_loss": ".3f", "bleu": ".1f", "chrf": ".1f"}
Group = tuple[int, int, bool, str]  # training rows, steps, whether main runs, method


def amounts(found: Findings) -> list[Block]:
    """A table for each task that has such runs, and a figure; nothing where there are none."""
    varied = finished(found.records, "amounts").values()
    tasks = in_order((record["task"] for record in varied), TASKS)
    groups = {task: _groups(found, task, {r["method"] for r in varied if r["task"] == task}) for task in tasks}
    if not tasks:
        return []
    blocks: list[Block] = [
        Heading("Less and more training"),
        Paragraph(
            "On some of the rows of a main run, or on all of them and others: with as many steps, but one pass at "
            f"least and {MOST_PASSES} at most. Learning rates are the main run's. The step with the lowest validation "
            "loss of at most eight is kept, of a main run the last. All seeds have the same rows: the spread does not "
            "include their choice."
        ),
    ]
    head = ("training rows", "steps", "method", "step kept", "validation loss", "BLEU", "chrF")
    for task in tasks:
        blocks += [Heading(task, 3), Table(head, [_row(found, group, runs) for group, runs in groups[task].items()])]
    lines = {task: of_rows for task in tasks if (of_rows := _scores_over_rows(groups[task]))}
    caption = "BLEU over the number of training rows, by task"
    return [*blocks, *([Figure("rows", caption, scores_over_rows(lines))] if lines else [])]


def _groups(found: Findings, task: str, methods: set[str]) -> dict[Group, list[Record]]:
    """These runs and the main runs of the same methods: of each group one run a seed."""
    runs = [*finished(found.records, "amounts").values(), *found.main.values()]
    groups: defaultdict[Group, list[Record]] = defaultdict(list)
    for run in runs:
        if run["task"] == task and run["method"] in methods:
            rows = run["config"]["rows"]["train"]
            groups[rows, run["steps"], run["stage"] == "main", run["method"]].append(run)
    order = in_order(methods, list(METHODS))
    return dict(sorted(groups.items(), key=lambda item: (*item[0][:3], order.index(item[0][3]))))


def _row(found: Findings, group: Group, runs: Sequence[Record]) -> list[str]:
    rows, steps, main, method = group
    scores = [found.shown(_mean(runs, metric), form) for metric, form in _METRICS.items()]
    kept = each([run.get("step_kept", run["steps"]) for run in runs])  # older main runs do not say
    return [f"{rows:,}", f"{steps:,}" + (" (main run)" if main else ""), method, kept, *scores]


def _mean(runs: Sequence[Record], metric: str) -> Mean:
    return Mean.of([run["metrics"][metric] for run in runs])


def _scores_over_rows(groups: dict[Group, list[Record]]) -> dict[str, list[tuple[int, float]]]:
    """Of each method that has other runs than main runs: numbers of rows and BLEU."""
    lines: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    for (rows, _, _, method), runs in groups.items():
        lines[method].append((rows, _mean(runs, "bleu").mean))
    return {method: points for method, points in lines.items() if len(points) > 1}
