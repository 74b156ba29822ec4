"""What methods are worth on domains and words that training did not have: losses and BLEU of the transfer budget.

    python examples/benchmark/run_all.py DATA --budget transfer
    python examples/benchmark/unseen.py DATA --budget transfer

Prints Markdown tables. Runs are taken of the tasks and seeds that all methods have. Losses are means over target
tokens in nats; their differences have 95 % intervals of 10,000 paired bootstrap draws of test rows (of all seeds
together, so that they do not tell how seeds differ). A word is a token of the model's.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from blocks import Heading, Paragraph, Table, block_markdown
from comparisons import finished
from dense_model import plain_checkpoint
from findings import MISSING
from held_out import HELD_OUT, domain_of, domains_without
from input_tuning_examples.base_model import Base
from input_tuning_examples.packaged_model import PACKAGED
from input_tuning_examples.task_data import InputError
from input_tuning_examples.train_and_generate import SEPARATOR
from plan import BUDGETS, Budget
from records import RESULTS, Record, read_outputs, read_records
from report import parser_for_stored_runs
from seen_inputs import split_scores
from significance import check_installed
from tasks import find_tasks, read_task

OURS = "input-tuning"
DRAWS = 10_000


@dataclass(frozen=True)
class Row:
    """A test row.

    Args:
        known_domain: whether training had its domain; None where a task has none.
        new_words: how many words of its input training did not have.
    """

    task: str
    number: int
    references: list[str]
    known_domain: bool | None
    new_words: int


def test_rows(data: Path, task: str, budget: Budget, words_of) -> list[Row]:
    """The test rows of a budget's runs on a task.

    Args:
        words_of: the words of a text, as ids.
    """
    most = {"train": budget.train_rows, "validation": 1, "test": budget.test_rows}
    split = read_task(data, task, most).rows
    seen = {word for row in split["train"] for text in (row.source, row.references[0]) for word in words_of(text)}
    without = domains_without(task)
    return [
        Row(
            task,
            number,
            list(row.references),
            domain_of(row.source) not in without if task in HELD_OUT else None,
            len(set(words_of(row.source)) - seen),
        )
        for number, row in enumerate(split["test"])
    ]


def difference(
    losses: np.ndarray, others: np.ndarray, tokens: np.ndarray, draws: int = DRAWS
) -> tuple[float, float, float]:
    """By how much the mean loss of a token is above another method's, and the ends of its 95 % interval.

    Args:
        losses, others: of each row the sum over its target tokens, `(rows,)`.
        tokens: of each row, `(rows,)`.
    """
    gap = losses - others
    drawn = np.random.default_rng(0).integers(len(gap), size=(draws, len(gap)))
    means = gap[drawn].sum(1) / tokens[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(gap.sum() / tokens.sum()), float(low), float(high)


class Runs:
    """The finished main runs of some tasks, those that all methods have.

    Args:
        rows: the test rows of all tasks.
    """

    def __init__(
        self, results: Path, records: Mapping[str, Record], rows: Sequence[Row], tasks: Sequence[str]
    ) -> None:
        self.results, self.rows, self.tasks = results, rows, tasks
        of_tasks = {name: record for name, record in finished(dict(records)).items() if record["task"] in tasks}
        self.methods = list(dict.fromkeys(record["method"] for record in of_tasks.values()))
        self.methods.sort(key=lambda method: method != OURS)
        of_methods = [
            {(r["task"], r["seed"]) for r in of_tasks.values() if r["method"] == method} for method in self.methods
        ]
        self.common = sorted(set.intersection(*of_methods)) if of_methods else []
        self.names = {(r["method"], r["task"], r["seed"]): name for name, r in of_tasks.items()}
        self.records = of_tasks

    def seeds(self, task: str) -> list[int]:
        return [seed for one, seed in self.common if one == task]

    def losses(self, method: str, chosen: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Of each row the loss, a mean over seeds, and the number of its tokens."""
        losses, tokens = [], []
        for row in chosen:
            of_row = [
                self.records[self.names[method, row.task, seed]]["test_losses"][row.number]
                for seed in self.seeds(row.task)
            ]
            losses.append(fmean(loss for loss, _ in of_row))
            tokens.append(of_row[0][1])
        return np.array(losses), np.array(tokens)

    def bleu(self, method: str, chosen: Sequence[Row]) -> float | None:
        """A mean over seeds; tasks of one seed each are taken together."""
        scores = []
        for place in range(max(len(self.seeds(task)) for task in self.tasks)):
            texts, references = [], []
            for row in chosen:
                seed = self.seeds(row.task)[place]
                texts.append(read_outputs(self.results, self.names[method, row.task, seed])[row.number])
                references.append(row.references)
            scores.append(split_scores(texts, references, [True] * len(texts))[0])
        return None if None in scores else fmean(score for score in scores if score is not None)

    def prose(self, method: str) -> float:
        """By how much the loss on plain prose is above the base's, a mean over runs."""
        return fmean(
            self.records[self.names[method, task, seed]]["metrics"]["forgetting"] for task, seed in self.common
        )


def parts(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows, and what they are taken apart into."""
    found = {
        "all": list(rows),
        "domains that training had": [row for row in rows if row.known_domain],
        "domains that it had not": [row for row in rows if row.known_domain is False],
        "inputs whose words training had": [row for row in rows if not row.new_words],
        "inputs with words that it had not": [row for row in rows if row.new_words],
    }
    return {name: some for name, some in found.items() if some}


def tables(runs: Runs) -> list[Table]:
    """Losses, what they are above input-tuning's, BLEU, and the loss on prose."""
    losses, gaps, bleu = [], [], []
    others = runs.methods[1:] if runs.methods[0] == OURS else []
    for name, chosen in parts(runs.rows).items():
        of = {method: runs.losses(method, chosen) for method in runs.methods}
        first = (name, f"{len(chosen):,}")
        losses.append((*first, *(f"{loss.sum() / tokens.sum():.3f}" for loss, tokens in of.values())))
        between = [difference(of[method][0], *of[OURS]) for method in others]
        gaps.append((*first, *(f"{middle:+.3f} ({low:+.3f} to {high:+.3f})" for middle, low, high in between)))
        scores = [runs.bleu(method, chosen) for method in runs.methods]
        bleu.append((*first, *(MISSING if score is None else f"{score:.1f}" for score in scores)))
    return [
        Table(("loss, of inputs", "rows", *runs.methods), losses),
        Table((f"loss above {OURS}'s, of inputs", "rows", *others), gaps),
        Table(("BLEU, of inputs", "rows", *runs.methods), bleu),
        Table(
            ("", *runs.methods),
            [("loss on plain prose above the base's", *(f"{runs.prose(method):+.3f}" for method in runs.methods))],
        ),
    ]


def blocks(
    data: Path, results: Path, budget: Budget, model: str, work: Path, methods: Sequence[str] | None = None
) -> list:
    """The whole answer.

    Args:
        methods: those that are compared; None is all that have a run.

    Raises:
        InputError: DATA misses a task, or no run is there that all methods have.
    """
    find_tasks(data, budget.tasks)
    records = read_records(results)
    if methods is not None:
        present = {record["method"] for record in records.values()}
        if unknown := [method for method in methods if method not in present]:
            raise InputError(f"--methods: {unknown[0]!r} has no run. Methods that have: {', '.join(sorted(present))}.")
        records = {name: record for name, record in records.items() if record["method"] in methods}
    tokenizer = Base.find(plain_checkpoint(model, work)).tokenizer

    def words_of(text: str) -> list[int]:
        return tokenizer(text + SEPARATOR).input_ids

    found: list = []
    of_tasks = {"Domains and words that training did not have": [task for task in budget.tasks if task in HELD_OUT]}
    of_tasks |= {f"Words that training did not have: {t}": [t] for t in budget.tasks if t not in HELD_OUT}
    for title, tasks in of_tasks.items():
        run = {task for task, _ in Runs(results, records, [], tasks).common}  # by all methods
        tasks = [task for task in tasks if task in run]
        if not tasks:
            continue
        rows = [row for task in tasks for row in test_rows(data, task, budget, words_of)]
        runs = Runs(results, records, rows, tasks)
        counts = ", ".join(f"{task} (seeds {', '.join(map(str, runs.seeds(task)))})" for task in tasks)
        found += [Heading(title), Paragraph(f"Runs of all methods: {counts}."), *tables(runs)]
    if not found:
        raise InputError(f"--results: no task in {str(results)!r} has a finished run of every method. Run more.")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = parser_for_stored_runs(__doc__)
    parser.set_defaults(budget="transfer")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="only these (default: all that have a run)")
    parser.add_argument("--model", default=PACKAGED, help="whose words are meant (default: the packaged one)")
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmark"), help="where it is kept (%(default)s)")
    options = parser.parse_args(argv)
    results = options.results or RESULTS / options.budget
    try:
        check_installed()
        for block in blocks(
            options.data, results, BUDGETS[options.budget], options.model, options.work, options.methods
        ):
            print(block_markdown(block), end="\n\n")
    except InputError as error:
        print(f"unseen.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
