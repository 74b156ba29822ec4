"""Overnight without some of its domains: what was learned from the others is asked for domains never seen in training.

A row's domain is that of the types in its logical form, of which each has one domain alone. The few rows without any
(57 of 6,334: a person's meals, a price in dollars) are of no domain, and are left out.
"""

from __future__ import annotations

import re

from input_tuning_examples.task_data import Example

SOURCE = "overnight"
TYPES = {
    "basketball": ("player", "team", "position"),
    "restaurants": ("restaurant", "food"),
    "recipes": ("recipe", "ingredient"),
    "publications": ("article", "venue"),
    "housing": ("housing_unit", "housing"),
    "calendar": ("meeting", "location"),
}
_WITHOUT = f"{SOURCE}_without_"
# Each domain is held out once.
PAIRS = (("basketball", "recipes"), ("calendar", "housing"), ("publications", "restaurants"))
HELD_OUT = tuple(_WITHOUT + "_".join(pair) for pair in PAIRS)


def domain_of(source: str) -> str | None:
    """The domain of a logical form; None where it names none of the types.

    Raises:
        ValueError: it names types of two domains.
    """
    found = {
        domain
        for domain, types in TYPES.items()
        if re.search(rf"\b({'|'.join(types)})\.|\( (singleton|domain \() ({'|'.join(types)}) \)", source)
    }
    if len(found) > 1:
        raise ValueError(f"types of {' and '.join(sorted(found))} stand in one logical form: {source}")
    return next(iter(found), None)


def folder_of(task: str) -> str:
    """Of DATA: the folder with a task's rows."""
    return SOURCE if task in HELD_OUT else task


def domains_without(task: str) -> tuple[str, ...]:
    """The domains that a task's training rows leave out."""
    return PAIRS[HELD_OUT.index(task)] if task in HELD_OUT else ()


def rows_of(task: str, split: str, rows: list[Example]) -> list[Example]:
    """Of the folder's rows those of a task: without the domains that are held out, in its test rows with them."""
    if task not in HELD_OUT:
        return rows
    without = domains_without(task) if split != "test" else ()
    return [row for row in rows if (domain := domain_of(row.source)) is not None and domain not in without]
