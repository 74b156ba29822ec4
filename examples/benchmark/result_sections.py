"""The report's sections on scores: BLEU over tasks, everything of a task, the ablations, some outputs."""

from __future__ import annotations

from collections.abc import Callable

from blocks import Block, Code, Figure, Heading, Paragraph, Table
from comparisons import in_order, means, means_of
from figures import loss_curves
from findings import MISSING, Findings
from methods import METHODS
from plan import SHARED

Column = Callable[[str, str], str]  # of a table: the cell for a task and a method

METRICS = {
    "validation_loss": ("validation loss", ".3f"),
    "bleu": ("BLEU", ".1f"),
    "chrf": ("chrF", ".1f"),
    "ter": ("TER ↓", ".1f"),
    "nist": ("NIST", ".2f"),
    "meteor": ("METEOR", ".1f"),
    "rouge_l": ("ROUGE-L", ".1f"),
    "cider": ("CIDEr", ".2f"),
    "exact_match": ("exact match", ".1f"),
    "length_ratio": ("length", ".2f"),
    "forgetting": ("forgetting ↓", "+.3f"),  # nats a token of plain prose
}
COSTS = {  # means only: seeds differ in them by the machine's doings
    "trainable parameters": lambda run: run["trainable_parameters"],
    "training, s": lambda run: _seconds(run, "training"),
    "generation, s": lambda run: _seconds(run, "generation"),
    "peak memory, MB": lambda run: run["peak_memory_mb"],
}
# What an ablation changes, the value of each method, and the methods' order in its table.
ABLATION_GROUPS = {
    "Virtual tokens": {
        "adapter-only": "0",
        "input-tuning-prompt-5": "5",
        "input-tuning": "20",
        "input-tuning-prompt-100": "100",
    },
    "Inner size of the input-adapter": {
        "input-tuning-19": "19",
        "input-tuning-64": "64",
        "input-tuning-256": "256",
        "input-tuning": "2e",
    },
    "Activation": {"input-tuning": "relu", "input-tuning-gelu": "gelu"},
    "Biases": {"input-tuning": "without", "input-tuning-bias": "with"},
    "Start of W2": {"input-tuning": "zero", "input-tuning-random-start": "random"},
    "Rate of the soft prompt over the input-adapter's": {
        "input-tuning-ratio-1": "1",
        "input-tuning": "10",
        "input-tuning-ratio-100": "100",
    },
    "Tokens that the input-adapter changes": {"input-tuning": "all", "input-tuning-scope-input": "the input's"},
}
_ABLATION_METRICS = ("validation_loss", "bleu", "chrf")
_SAMPLE_ROWS = 3
_SAMPLE_LENGTH = 240  # characters


def _seconds(run: dict, stage: str) -> float | None:
    return run["seconds"][stage] if run["attempts"] == 1 else None  # later attempts go on from a checkpoint


def scores(found: Findings) -> list[Block]:
    """BLEU of all tasks and methods, then everything of each task."""
    shown = in_order({*SHARED, *found.compared}, list(METHODS))
    rows = [
        [method, *(found.shown(found.bleu.get((task, method)), ".1f") for task in found.tasks)] for method in shown
    ]
    blocks: list[Block] = [
        Heading("BLEU"),
        Paragraph(
            "sacrebleu on 13a tokens in lower case, in per cent, on the drawn test rows, greedy texts. "
            + (
                "One seed."
                if len(found.seeds) == 1
                else "Mean ± sample standard deviation over seeds; without ±, one."
            )
        ),
        Table(("", *found.tasks), rows),
        Heading("Each task"),
        Paragraph(
            "Validation loss in nats per target token; TER, loss: lower is better. NIST and CIDEr are on their own "
            "scales, the others in per cent. Length is that of the texts over that of their references, in tokens: "
            "below 1 BLEU has a penalty. Seconds are given of runs that were done in one attempt, on the machines "
            "above, where other runs may have been at work beside them; memory is the process's or the accelerator's."
        ),
    ]
    for task in found.tasks:
        blocks += [Heading(task, 3), _task_table(found, task)]
    svg = loss_curves(found.main, found.tasks, found.compared)
    return [*blocks, *([Figure("curves", "Validation loss over steps, by task", svg)] if svg else [])]


def _task_table(found: Findings, task: str) -> Table:
    present = {metric for run in found.main.values() for metric in run["metrics"]}
    metrics = [name for name in METRICS if name in present]
    columns = [*(_metric(found, name) for name in metrics), *(_cost(found, cost) for cost in COSTS)]
    rows = [
        [method, _rates(found, task, method), *(column(task, method) for column in columns)]
        for method in found.methods
        if (task, method) in found.bleu
    ]
    return Table(["", "rate", *(METRICS[name][0] for name in metrics), *COSTS], rows)


def _metric(found: Findings, name: str) -> Column:
    of, form = means(found.main, name), METRICS[name][1]
    return lambda task, method: found.shown(of.get((task, method)), form)


def _cost(found: Findings, name: str) -> Column:
    of = means_of(found.main, COSTS[name])
    return lambda task, method: f"{of[task, method].mean:,.0f}" if (task, method) in of else MISSING


def _rates(found: Findings, task: str, method: str) -> str:
    runs = [run for run in found.main.values() if (run["task"], run["method"]) == (task, method)]
    return ", ".join(f"{rate:g}" for rate in sorted({run["rate"] for run in runs})) or MISSING


# ---- ablations ------------------------------------------------------------------------------------------------------


def ablations(found: Findings) -> list[Block]:
    """A table for each thing that was changed, on each task where at least two of its values were run."""
    blocks: list[Block] = []
    for title, values in ABLATION_GROUPS.items():
        tables: list[Block] = []
        for task in found.tasks:
            if sum((task, method) in found.bleu for method in values) > 1:
                tables += [Paragraph(f"{task}:"), _ablation(found, task, title, values)]
        blocks += [Heading(title, 3), *tables] if tables else []
    said = "One thing of input-tuning is changed at a time. Sizes and adapter-only have learning rates of their own."
    return [Heading("Ablations"), Paragraph(said), *blocks] if blocks else []


def _ablation(found: Findings, task: str, title: str, values: dict[str, str]) -> Table:
    columns = [*(_metric(found, name) for name in _ABLATION_METRICS), _cost(found, "trainable parameters")]
    head = [
        title[0].lower() + title[1:],
        "method",
        "rate",
        *(METRICS[name][0] for name in _ABLATION_METRICS),
        "trainable parameters",
    ]
    rows = [
        [_value(found, value), method, _rates(found, task, method), *(column(task, method) for column in columns)]
        for method, value in values.items()
    ]
    return Table(head, rows)


def _value(found: Findings, value: str) -> str:
    """With the number that 2e is, where a record tells the embedding size e."""
    sizes = {run["config"]["peft"].get("token_dim") for run in found.main.values() if run["config"]["peft"]} - {None}
    return f"2e = {2 * sizes.pop()}" if value == "2e" and len(sizes) == 1 else value


# ---- outputs --------------------------------------------------------------------------------------------------------


def samples(found: Findings) -> list[Block]:
    """The first outputs of the methods that all tasks have; of several seeds, of the first."""
    blocks: list[Block] = [
        Heading("Outputs"),
        Paragraph(
            "Rows are numbered from 0 among the drawn test rows, as the lines of the runs' .txt files. Inputs and "
            "references are in the data."
        ),
    ]
    for task in found.tasks:
        runs = [_first(found, task, method) for method in SHARED]
        outputs = [{one["row"]: one["output"] for one in run["samples"]} if run else {} for run in runs]
        numbers = sorted(set().union(*outputs))[:_SAMPLE_ROWS]
        rows = [
            (str(row), method, Code(_cut(texts[row])))
            for row in numbers
            for method, texts in zip(SHARED, outputs, strict=True)
            if row in texts
        ]
        blocks += [Heading(task, 3), Table(("row", "method", "output"), rows)] if rows else []
    return blocks


def _first(found: Findings, task: str, method: str) -> dict | None:
    runs = [run for run in found.main.values() if (run["task"], run["method"]) == (task, method)]
    return min(runs, key=lambda run: run["seed"], default=None)


def _cut(text: str) -> str:
    line = "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))
    return line if len(line) <= _SAMPLE_LENGTH else line[:_SAMPLE_LENGTH] + "…"
