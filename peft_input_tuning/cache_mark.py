"""The cache of a call: what its argument is called, and the mark on one that holds a prompt.

Later calls on a marked cache read from it where the virtual tokens stand. A mark needs no look at the data (a GPU
would have to wait for it), and caches that were filled without a prompt pass untouched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .splice import PromptLayout

MARK_ON_CACHE = "_input_tuning_prompt"
# What transformers calls the cache, as an argument and in outputs: since 5.24, and before. Until 5.40 the older name
# is understood as well.
CACHE_NAMES = ("cache", "past_key_values")


@dataclass(frozen=True)
class CacheMark:
    """The mark on a cache that holds a prompt.

    Args:
        layout: how the prompts stand in its rows; 0 slots where the caller's own input held them.
        first_position: `(batch or 1, 1)`, the first token's position, where the caller passed positions.
    """

    layout: PromptLayout
    first_position: Tensor | None = None


def cache_name(parameters: Iterable[str]) -> str | None:
    """The cache's name among the arguments of a forward, which is its name in the output, too; None if it has none."""
    parameters = set(parameters)
    return next((name for name in CACHE_NAMES if name in parameters), None)


def cache_of(call: dict[str, Any]) -> Any:
    """The cache that a call brings, by whichever of its names the caller used; None if it brings none."""
    return next((call[name] for name in CACHE_NAMES if call.get(name) is not None), None)


def mark_of(cache: Any) -> CacheMark | None:
    """The mark on a cache; None where the cache is empty or was filled without a prompt.

    The length of a cache that was filled from the caller's own input (0 slots) is not asked for: static caches keep it
    on the device.
    """
    mark = getattr(cache, MARK_ON_CACHE, None)
    if mark is None or (mark.layout.slots and not cache.get_seq_length()):
        return None
    return mark


def mark_cache(cache: Any, mark: CacheMark) -> None:
    """Says of a cache what it holds."""
    setattr(cache, MARK_ON_CACHE, mark)
