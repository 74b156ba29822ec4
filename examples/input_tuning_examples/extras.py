"""What scripts answer with, in one line: which packages are missing, and what is wrong with their arguments.

Packages that only some examples need are imported where they are used, so that --help works without them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec

from .task_data import InputError


def needs(extra: str, *modules: str) -> None:
    """To be called before any work. Imports nothing, so that it answers at once.

    Args:
        extra: the dependency group of pyproject.toml that brings all of the modules.

    Raises:
        InputError: one is missing; the message says how to install it.
    """
    for module in modules:
        if find_spec(module) is None:
            raise InputError(
                f"{module} is missing. In a clone: pip install 'pip>=25.1', then pip install --group {extra}"
            )


def exit_status(run: Callable[[], int]) -> int:
    """Runs a script; returns its exit status. What is wrong with its arguments is one line, and status 2."""
    try:
        return run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
