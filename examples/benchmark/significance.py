"""The bootstrap over all pairs of runs that are to be compared, kept in a file beside the records.

The test sees the choice of rows, not that of the seed. Rows of several seeds put together are not independent (each
test row is in it once a seed), so that their p is too small; it is given beside those of each seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bleu import bleu
from bootstrap import SAMPLES, SEED, paired_bootstrap
from comparisons import finished, in_order
from input_tuning_examples.extras import needs
from input_tuning_examples.task_data import InputError
from peft_input_tuning.output.files import unfinished
from plan import TASKS
from records import AGAIN, Record, read_outputs
from tasks import SPLITS, find_tasks, read_task

PAIRS = (("input-tuning", "prompt-tuning"), ("input-tuning", "fine-tuning"), ("lora", "input-tuning"))
_TOLERANCE = 0.1  # BLEU: outputs are kept without their line breaks, which sacrebleu's tokens hardly depend on


@dataclass(frozen=True)
class Comparison:
    """Two methods on a task.

    Args:
        seeds: one, or several whose rows are put together.
        rows: how many outputs of each method were compared.
        runs: what tells whether a run has changed since, by its name: see `state_of`.
        training_rows: what runs on fewer or more rows were asked to take; None of main runs.
    """

    task: str
    method: str
    baseline: str
    seeds: tuple[int, ...]
    rows: int
    bleu: float
    baseline_bleu: float
    p_value: float
    runs: Mapping[str, Mapping[str, Any]]
    training_rows: int | None = None

    @property
    def difference(self) -> float:
        """In points of BLEU; above 0 where the method is better."""
        return self.bleu - self.baseline_bleu

    @property
    def name(self) -> str:
        seeds = ", ".join(map(str, self.seeds))
        trained = trained_on(self.task, self.training_rows)
        return f"{trained}: {self.method} against {self.baseline}, seed{'s' * (len(self.seeds) > 1)} {seeds}"


# ---- over the records -----------------------------------------------------------------------------------------------


def state_of(results: Path, name: str, record: Record) -> dict[str, Any]:
    """What a comparison depends on: the attempt, the outputs' hash and the test file's.

    Raises:
        InputError: the outputs are missing.
    """
    lines = "".join(f"{text}\n" for text in read_outputs(results, name))
    return {
        "attempts": record["attempts"],
        "outputs": hashlib.sha256(lines.encode()).hexdigest(),
        "test": record["data_hash"]["test"],
        "rows": record["config"]["rows"]["test"],
    }


def trained_on(task: str, training_rows: int | None) -> str:
    return task if training_rows is None else f"{task}, {training_rows:,} training rows"


def _with_outputs(records: Mapping[str, Record]) -> dict[str, Record]:
    return finished(records) | finished(records, "amounts")


def _cell(record: Record) -> tuple[str, int | None, str]:
    """Task, training rows and method of a run; rows None of main runs, whatever the records say of theirs."""
    return record["task"], record["rows"] if record["stage"] == "amounts" else None, record["method"]


def pairs_to_compare(records: Mapping[str, Record]) -> list[tuple[str, int | None, str, str, list[int]]]:
    """Task, training rows (None of main runs), method, baseline, and the seeds that both finished."""
    seeds: dict[tuple[str, int | None, str], set[int]] = {}
    for record in _with_outputs(records).values():
        seeds.setdefault(_cell(record), set()).add(record["seed"])
    amounts = sorted({rows for _, rows, _ in seeds if rows is not None})
    return [
        (task, rows, method, baseline, sorted(common))
        for rows in [None, *amounts]
        for task in in_order((task for task, *_ in seeds), TASKS)
        for method, baseline in PAIRS
        if (common := seeds.get((task, rows, method), set()) & seeds.get((task, rows, baseline), set()))
    ]


def compare_all(records: Mapping[str, Record], results: Path, data: Path, samples: int = SAMPLES) -> list[Comparison]:
    """Every pair of `PAIRS` on every task: each seed alone, then the rows of all seeds if there are several.

    Raises:
        InputError: DATA lacks a task, or is not what a run was tested on; the message names the run.
    """
    pairs = pairs_to_compare(records)
    names_of = {(*_cell(record), record["seed"]): name for name, record in _with_outputs(records).items()}
    find_tasks(data, tuple(dict.fromkeys(task for task, *_ in pairs)))

    @cache
    def of(name: str) -> tuple[list[str], list[list[str]]]:
        return outputs_and_references(results, data, name, records[name])

    compared = []
    for task, rows, method, baseline, seeds in tqdm(pairs, desc="Comparing", unit="pair", disable=None):
        for some in [[seed] for seed in seeds] + ([seeds] if len(seeds) > 1 else []):
            names = [[names_of[task, rows, one, seed] for seed in some] for one in (method, baseline)]
            (ours, references), (theirs, others) = (_joined(map(of, each)) for each in names)
            if references != others:
                raise InputError(
                    f"{names[0][0]} and {names[1][0]} were tested on different numbers of rows. Of one: {AGAIN}"
                )
            found = paired_bootstrap(ours, theirs, references, samples)
            runs = {name: state_of(results, name, records[name]) for each in names for name in each}
            pair = (task, method, baseline, tuple(some), len(ours))
            compared.append(Comparison(*pair, **asdict(found), runs=runs, training_rows=rows))
    return compared


def _joined(parts: Iterator[tuple[list[str], list[list[str]]]]) -> tuple[list[str], list[list[str]]]:
    outputs, references = zip(*parts, strict=True)
    return list(chain.from_iterable(outputs)), list(chain.from_iterable(references))


def check_installed() -> None:
    """Raises InputError where a package is missing that what follows needs."""
    needs("benchmark", "datasets", "evaluate", "rouge_score", "sacrebleu")


def outputs_and_references(results: Path, data: Path, name: str, record: Record) -> tuple[list[str], list[list[str]]]:
    """A run's outputs and their references.

    Raises:
        InputError: DATA does not hold the rows that it was tested on, or the outputs are missing or another run's.
    """
    task = read_task(data, record["task"], {**dict.fromkeys(SPLITS), "test": record["config"]["rows"]["test"]})
    if task.data_hash["test"] != record["data_hash"]["test"]:
        raise InputError(
            f"DATA: {record['task']}/test.jsonl is not the file that {name} was tested on (its SHA-256 begins with "
            f"{task.data_hash['test'][:12]}, the run's with {record['data_hash']['test'][:12]}). Pass the data of the "
            "run."
        )
    outputs, references = read_outputs(results, name), [list(row.references) for row in task.rows["test"]]
    if len(outputs) != len(references):
        raise InputError(f"{name}: it has {len(outputs)} outputs for {len(references)} test rows. {AGAIN}")
    score = bleu(outputs, references)
    if abs(score - record["metrics"]["bleu"]) > _TOLERANCE:
        raise InputError(
            f"{name}: its outputs have BLEU {score:.2f} on DATA, its record says {record['metrics']['bleu']:.2f}. "
            f"They are of different runs, or of other test rows. {AGAIN}"
        )
    return outputs, references


# ---- the file -------------------------------------------------------------------------------------------------------


def save(path: Path, comparisons: Sequence[Comparison], samples: int) -> None:
    """Writes comparisons and how they were made."""
    import sacrebleu

    how = {"test": "paired bootstrap", "samples": samples, "seed": SEED, "sacrebleu": sacrebleu.__version__}
    with unfinished(path) as scratch:
        text = json.dumps({**how, "comparisons": [asdict(one) for one in comparisons]}, indent=1)
        scratch.write_text(text + "\n", encoding="utf-8")


def load(path: Path) -> tuple[list[Comparison], int]:
    """What `save` wrote: comparisons, and the number of samples.

    Raises:
        InputError: the file holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        comparisons = [Comparison(**{**one, "seeds": tuple(one["seeds"])}) for one in found["comparisons"]]
        return comparisons, int(found["samples"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path.name} holds no comparisons ({error}). Remove it, or pass DATA.") from None


def still_true(
    comparisons: Sequence[Comparison], records: Mapping[str, Record], results: Path
) -> tuple[list[Comparison], list[str]]:
    """Stored comparisons whose runs are the same; a word on each of the others, and on each that was never made."""
    runs, kept, words = _with_outputs(records), [], []
    for one in comparisons:
        changed = [name for name, state in one.runs.items() if not _same(results, name, runs.get(name), state)]
        if changed:
            words.append(f"{one.name}: {', '.join(changed)} changed since.")
        else:
            kept.append(one)
    made = {(one.task, one.training_rows, one.method, one.baseline, seed) for one in comparisons for seed in one.seeds}
    for task, rows, method, baseline, seeds in pairs_to_compare(records):
        new = [seed for seed in seeds if (task, rows, method, baseline, seed) not in made]
        trained = trained_on(task, rows)
        words += [f"{trained}: {method} against {baseline}, seed {seed}: not compared yet." for seed in new]
    return kept, words


def _same(results: Path, name: str, record: Record | None, state: Mapping[str, Any]) -> bool:
    try:
        return record is not None and state_of(results, name, record) == state
    except InputError:  # its outputs are missing
        return False
