"""Rows that name their adapter: how they get into a batch, and in which order.

{"input_ids": ..., "adapter_name": "a"}  ──►  {"input_ids": (batch, length), "adapter_names": ["a", ...]}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

COLUMN = "adapter_name"  # of a row
ARGUMENT = "adapter_names"  # of a batch, as the model takes it


class CollateNames:
    """A collator that makes a batch with another one, and adds the names of its rows' adapters.

    Args:
        collator: makes a batch of the rows without their names.
        known: the adapters that there are.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any], known: Sequence[str]) -> None:
        self.collator, self.known = collator, list(known)

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        names = [row.get(COLUMN) for row in rows]
        check_names(names, self.known, rows[0])
        batch = self.collator([{key: value for key, value in row.items() if key != COLUMN} for row in rows])
        sizes = {len(value) for key, value in batch.items() if key in ("input_ids", "labels")}
        if sizes != {len(rows)}:
            raise ValueError(
                f"The collator made {sorted(sizes)} rows of {len(rows)}: sequences of several adapters would stand in "
                "one row. Use a collator that pads (padding_free=False, no DataCollatorWithFlattening)."
            )
        batch[ARGUMENT] = names
        return batch


def names_in(data: Any, known: Sequence[str]) -> list[Any]:
    """The adapter of each row of a dataset, or of a list.

    Raises:
        ValueError: a row names none of the adapters that are known.
    """
    if hasattr(data, "column_names"):  # datasets.Dataset, whose column is read without its rows
        columns = data.column_names
        names = list(data[COLUMN]) if COLUMN in columns else [None] * len(data)
    else:
        columns = data[0] if len(data) else ()
        names = [data[row].get(COLUMN) for row in range(len(data))]  # a Dataset of torch may know no end
    check_names(names, known, columns)
    return names


def check_names(names: Sequence[str | None], known: Sequence[str], columns: Iterable[str]) -> None:
    for name in dict.fromkeys(names):
        if name not in known:
            got = f"no `{COLUMN}`, but {sorted(columns)}" if name is None else f"the `{COLUMN}` {name!r}"
            raise ValueError(
                f"A row has {got}. Give each row the name of an adapter: {list(known)}. (TRL's packing loses it: use "
                "packing=False.)"
            )


class EvenRows(Sampler[int]):
    """An order of rows in which each adapter's are shuffled, and spread evenly over an epoch.

    With as many rows for each of A adapters, any batch of A · n rows has n of each; and adapters with as many rows get
    them in the same order.

    Args:
        names: the adapter of each row.
        seed: of the order.
    """

    def __init__(self, names: Sequence[str], seed: int) -> None:
        self.rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            self.rows_of.setdefault(name, []).append(row)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer: each epoch has an order of its own, a resumed one the same."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.rows_of.values()))

    def __iter__(self) -> Iterator[int]:
        order = []
        for number, rows in enumerate(self.rows_of.values()):
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            shuffled = torch.randperm(len(rows), generator=generator).tolist()
            order += [((at + 0.5) / len(rows), number, rows[row]) for at, row in enumerate(shuffled)]
        return iter([row for _, _, row in sorted(order)])


def select_rows(batch: dict[str, Any], rows: list[int]) -> dict[str, Any] | None:
    """Keep some rows of a batch; None if not all of its tensors have one entry a row."""
    size = len(batch[ARGUMENT])
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    if any(value.ndim == 0 or len(value) != size for value in tensors.values()):
        return None
    kept = {key: value[rows] for key, value in tensors.items()}
    return {**batch, **kept, ARGUMENT: [batch[ARGUMENT][row] for row in rows]}
