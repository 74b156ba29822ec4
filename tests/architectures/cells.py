"""What is tried with each architecture: all cells, and a run of them.

A cell is one of
    exact     the values of the oracle
    lacks     the base itself cannot do it, or does not do it right: shown by running the base
    refused   an error of the package, raised on purpose
    failure   another value than the oracle's, or somebody else's error
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import transformers

from . import calling, keeping  # noqa: F401  they fill CELLS
from .build import Architecture
from .judging import Cell, describe
from .registry import CELLS
from .subject import Subject, main_outputs


@contextmanager
def _in_float64() -> Iterator[None]:
    """Some models make tensors of their own."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            transformers.logging.set_verbosity(before)


def run(arch: Architecture, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Cell]:
    """All cells of an architecture that apply to it."""
    found: dict[str, Cell] = {}
    with _quiet(), _in_float64(), torch.no_grad():
        subject, lacking = Subject(arch), arch.overrides.get("lacks")
        try:
            main_outputs(subject.call(subject.base, subject.ids))
        except Exception as error:
            status, reason = ("failure", "") if lacking is None else ("lacks", f"{lacking}: ")
            return {"base": Cell(status, reason + describe(error))}
        if lacking is not None:
            return {"base": Cell("failure", f"it runs, though it is said that {lacking}")}
        for name, function in CELLS.items():
            if wanted(name):
                try:
                    result = function(subject)
                except Exception as error:
                    result = Cell("failure", f"the trial itself: {describe(error)}")
                if result is not None:
                    found[name] = result
    return found
