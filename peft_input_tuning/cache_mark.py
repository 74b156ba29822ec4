"""The mark on a cache that holds a prompt: later calls on that cache read from it where the virtual tokens stand.

A mark needs no look at the data (a GPU would have to wait for it), and caches that were filled without a prompt pass
untouched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .splice import PromptLayout

MARK_ON_CACHE = "_input_tuning_prompt"


@dataclass(frozen=True)
class CacheMark:
    """The mark on a cache that holds a prompt.

    Args:
        layout: how the prompts stand in its rows; 0 slots where the caller's own input held them.
        first_position: `(batch or 1, 1)`, the first token's position, where the caller passed positions.
    """

    layout: PromptLayout
    first_position: Tensor | None = None


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
