"""A task's rows: which ones, in which order, and the hash of the files they come from."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

from held_out import folder_of, rows_of
from input_tuning_examples.task_data import Example, InputError, limit, read_json_lines

SPLITS = ("train", "validation", "test")
_SUBSET_SEED = 0  # all methods and seeds see the same rows
_POOL = 16  # batches at most, whose rows are sorted by length together
_POOLS = 4  # in an epoch at least: a pool of several epochs would put copies of a row into one batch


@dataclass(frozen=True)
class Task:
    """The rows of each split, and the SHA-256 of each file."""

    rows: dict[str, list[Example]]
    data_hash: dict[str, str]


def find_tasks(data: Path, names: tuple[str, ...]) -> None:
    """Raises InputError where a task's folder or a file in it is missing."""
    for name in map(folder_of, names):
        for split in SPLITS:
            if not (data / name / f"{split}.jsonl").is_file():
                raise InputError(f"DATA: there is no {name}/{split}.jsonl in {str(data)!r}. Name the tasks' folder.")


def read_task(data: Path, name: str, most: dict[str, int | None], train_rows: int | None = None) -> Task:
    """Reads a task.

    Args:
        most: how many rows of each split are drawn; None is all.
        train_rows: instead of `most["train"]`, at most. Fewer rows are among more of them.
    """
    rows = {}
    for split in SPLITS:
        path = data / folder_of(name) / f"{split}.jsonl"
        found = rows_of(name, split, read_json_lines(str(path), "DATA"))
        rows[split] = limit(found, most[split] or len(found), _SUBSET_SEED)
        if split == "train" and train_rows is not None:
            rows[split] = _fewer_or_more(rows[split], found, train_rows)
    return Task(rows, hashes_of(data, name))


def hashes_of(data: Path, name: str) -> dict[str, str]:
    """SHA-256 of each file of a task, by split."""
    return {
        split: hashlib.sha256((data / folder_of(name) / f"{split}.jsonl").read_bytes()).hexdigest() for split in SPLITS
    }


def _fewer_or_more(drawn: list[Example], found: list[Example], rows: int) -> list[Example]:
    """Some of the rows that were drawn, or all of them and some of the others that were found."""
    taken = {id(row) for row in drawn}  # rows may be equal
    others = [row for row in found if id(row) not in taken]
    draw = random.Random(_SUBSET_SEED)
    return [*draw.sample(drawn, len(drawn)), *draw.sample(others, len(others))][:rows]


def in_order_of_steps(lengths: list[int], steps: int, batch_size: int, seed: int) -> list[int]:
    """Which row is trained on when: `steps` batches, one after the other. The seed alone fixes it.

    Each epoch is shuffled. Within some batches rows of like length go together, so that less is padding; then these
    batches are shuffled.

    Args:
        lengths: of each row, in tokens.
    """
    draw = random.Random(seed)
    order: list[int] = []
    for pool in _pools(lengths, steps, batch_size, draw, _pool_of(lengths, batch_size)):
        draw.shuffle(pool)
        order += [row for batch in pool for row in batch]
    return order


def side_by_side(lengths: list[list[int]], steps: int, batch_size: int, seed: int) -> list[list[list[int]]]:
    """The batches of trainings that take their steps together: of each training a batch of rows for each step.

    As `in_order_of_steps` for each of them; but short batches of all meet in one step, and long ones, so that less is
    padding.

    Args:
        lengths: of each training's rows, in tokens.
    """
    pool = min(_pool_of(of_one, batch_size) for of_one in lengths)
    pools = [_pools(of_one, steps, batch_size, random.Random(seed), pool) for of_one in lengths]
    draw = random.Random(seed)
    found: list[list[list[int]]] = [[] for _ in lengths]
    for together in zip(*pools, strict=True):
        places = draw.sample(range(len(together[0])), len(together[0]))
        for batches, some in zip(found, together, strict=True):
            batches += [some[place] for place in places]
    return found


def _pool_of(lengths: list[int], batch_size: int) -> int:
    return min(_POOL, max(1, len(lengths) // batch_size // _POOLS))


def _pools(lengths: list[int], steps: int, batch_size: int, draw: random.Random, pool: int) -> list[list[list[int]]]:
    """Batches in groups of `pool`; in a group from short to long."""
    order: list[int] = []
    while len(order) < steps * batch_size:
        order += draw.sample(range(len(lengths)), len(lengths))
    order = order[: steps * batch_size]
    found = []
    for start in range(0, len(order), size := batch_size * pool):
        some = sorted(order[start : start + size], key=lambda row: lengths[row])
        found.append([some[n : n + batch_size] for n in range(0, len(some), batch_size)])
    return found
