"""Changing a function of another package from outside, so that it can be called as before."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any


def put_around(owner: type, name: str, around: Callable) -> None:
    """Replaces a function of a class by `around(function, ...)`, once."""
    original = getattr(owner, name)
    if hasattr(original, "inside_of_input_tuning"):
        return

    @wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    function.inside_of_input_tuning = original  # type: ignore[attr-defined]
    setattr(owner, name, staticmethod(function) if isinstance(vars(owner)[name], classmethod) else function)
