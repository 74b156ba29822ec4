"""How a trial is judged: what the adapter gives, against what the oracle gives and what the base can do."""

from __future__ import annotations

import dis
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import peft_input_tuning

PACKAGE = str(Path(peft_input_tuning.__file__).parent)


@dataclass
class Cell:
    """How a trial ended.

    Args:
        status: "exact", "lacks", "refused" or "failure".
        note: the error, or what the base lacks.
        gap: the largest difference from the oracle, over the oracle's largest value.
    """

    status: str
    note: str = ""
    gap: float | None = None


def tolerance() -> float:
    """How far values may be apart, over the largest; in float64 too models compute norms and rotations in float32."""
    return 1e-5 if torch.get_default_dtype() == torch.float64 else 1e-3


def describe(error: BaseException) -> str:
    """An error and where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "/".join(Path(frame.filename).parts[-2:])
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]} ({place}:{frame.lineno})"


def is_ours(error: BaseException) -> bool:
    """Whether the package raised it on purpose: the last frame is one of its `raise` statements."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code  # its instructions, not its lines: the file may have changed since it was imported
    return code.co_filename.startswith(PACKAGE) and dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def gap(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference over the largest value; infinite where shapes differ."""
    worst = 0.0
    for x, y in zip(found, wanted, strict=True):
        if x.shape != y.shape or x.isnan().any():
            return math.inf
        x, y = x.double(), y.double()
        large = 1e30  # scores of words that a model never says
        same = (x == y) | ((x.abs() > large) & (y.abs() > large) & (x.sign() == y.sign()))
        if same.all():
            continue
        size = y[y.abs() <= large].abs().max() if (y.abs() <= large).any() else y.new_ones(())
        difference = float((x - y)[~same].abs().max())
        worst = max(worst, difference / max(float(size), 1e-30))
    return worst


Run = Callable[[], list[Tensor]]


def judge(ours: Run, wanted: Run, base: Run, also: Run | None = None) -> Cell:
    """Compares what the adapter gives with what the oracle gives.

    Args:
        ours: the adapted model.
        wanted: the oracle in the same situation; if both end with one error, the base has it with rows of that length.
        base: the untouched base in the same situation; asked where the oracle fails.
        also: the oracle in a situation that should come to the same (no padding, no cache). Where the base makes a
            difference between the two, either counts.
    """
    try:
        values = finite(wanted())
    except Exception as error:
        lacking = _error_of(base)
        if lacking is not None:
            return Cell("lacks", lacking)
        try:
            ours()
        except Exception as same:
            if is_ours(same):
                return Cell("refused", describe(same))
            if describe(same) == describe(error):  # the oracle is the base, with longer rows
                return Cell("lacks", f"with as many tokens: {describe(error)}")
        return Cell("failure", f"no oracle: {describe(error)}")
    try:
        found = ours()
    except Exception as error:
        if is_ours(error):
            return Cell("refused", describe(error))
        lacking = _error_of(base)
        return Cell("failure", describe(error)) if lacking is None else Cell("lacks", lacking)
    first = gap(found, values)
    if first <= tolerance():
        return Cell("exact", gap=first)
    if also is not None:
        try:
            others = finite(also())
            second, apart = gap(found, others), gap(values, others)
        except Exception:
            return Cell("failure", "wrong value", first)
        if second <= tolerance():
            return Cell("exact", gap=second)
        if apart > tolerance():
            return Cell("lacks", f"the base itself differs by {apart:.1e}; we by {first:.1e} and {second:.1e}", first)
    return Cell("failure", "wrong value", first)


def finite(values: list[Tensor]) -> list[Tensor]:
    if any(bool(value.isnan().any()) for value in values):
        raise ValueError("values that are no numbers")
    return values


def _error_of(run: Run) -> str | None:
    """What a run of the base ends with; None if all is well."""
    try:
        finite(run())
    except Exception as error:
        return describe(error)
    return None
