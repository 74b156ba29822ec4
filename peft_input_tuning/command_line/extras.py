"""Packages that only some commands need."""

from __future__ import annotations

from importlib.util import find_spec


def needs(extra: str, *modules: str) -> None:
    """Does nothing where all modules are installed.

    Args:
        extra: of this package, which brings them.

    Raises:
        ValueError: one is missing; the message says how to install it.
    """
    for module in modules:
        if find_spec(module) is None:
            raise ValueError(f"{module} is missing. Install it with: pip install 'peft-input-tuning[{extra}]'")
