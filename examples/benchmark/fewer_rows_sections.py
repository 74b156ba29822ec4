"""The report's section on the number of training rows: runs on fewer rows beside the main runs."""

from __future__ import annotations

from collections import defaultdict

from blocks import Block, Figure, Heading, Paragraph, Table
from comparisons import Mean, finished, in_order
from figures import scores_over_rows
from findings import Findings
from methods import METHODS
from plan import MOST_PASSES, TASKS
from records import Record

_METRICS = {"validation_loss": ".3f", "bleu": ".1f", "chrf": ".1f"}
Group = tuple[int, str, str]  # training rows, stage, method


def fewer_rows(found: Findings) -> list[Block]:
    """A table for each task that has such runs, and their figure; nothing where there are none."""
    few = finished(found.records, "rows").values()
    tasks = in_order((record["task"] for record in few), TASKS)
    groups = {task: _groups(found, task, {r["method"] for r in few if r["task"] == task}) for task in tasks}
    if not tasks:
        return []
    blocks: list[Block] = [
        Heading("Number of training rows"),
        Paragraph(
            f"Fewer of the same training rows; as many steps as a main run, but at most {MOST_PASSES} passes over the "
            "rows. Learning rates are the main run's. The step with the lowest validation loss of eight is kept, of a "
            "main run the last."
        ),
    ]
    for task in tasks:
        head = ("training rows", "method", "steps", "step kept", "validation loss", "BLEU", "chrF")
        blocks += [Heading(task, 3), Table(head, [_row(found, group, runs) for group, runs in groups[task].items()])]
    svg = scores_over_rows({task: _lines(groups[task]) for task in tasks})
    return [*blocks, Figure("rows", "BLEU over the number of training rows, by task", svg)]


def _groups(found: Findings, task: str, methods: set[str]) -> dict[Group, list[Record]]:
    """Runs on fewer rows and main runs of these methods: of each group one run a seed."""
    runs = [*finished(found.records, "rows").values(), *found.main.values()]
    groups: defaultdict[Group, list[Record]] = defaultdict(list)
    for run in runs:
        if run["task"] == task and run["method"] in methods:
            groups[run["config"]["rows"]["train"], run["stage"], run["method"]].append(run)
    order = in_order(methods, list(METHODS))
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] == "main", order.index(item[0][2]))))


def _row(found: Findings, group: Group, runs: list[Record]) -> list[str]:
    number, stage, method = group
    scores = [found.shown(_mean(runs, metric), form) for metric, form in _METRICS.items()]
    steps = [", ".join(map(str, sorted(each))) for each in ({r["steps"] for r in runs}, {_kept(r) for r in runs})]
    return [f"{number:,}" + (" (main run)" if stage == "main" else ""), method, *steps, *scores]


def _mean(runs: list[Record], metric: str) -> Mean:
    return Mean.of([run["metrics"][metric] for run in runs])


def _kept(run: Record) -> int:
    """The step whose weights made the texts."""
    curve = run["curve"]["validation"]
    return curve[-1][0] if run["stage"] == "main" else min(curve, key=lambda point: point[1])[0]


def _lines(groups: dict[Group, list[Record]]) -> dict[str, list[tuple[int, float]]]:
    """Of each method, numbers of rows and BLEU."""
    lines: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    for (number, _, method), runs in groups.items():
        lines[method].append((number, _mean(runs, "bleu").mean))
    return dict(lines)
