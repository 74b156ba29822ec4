"""The cache of a call: what its argument is called, and the mark on one that holds a prompt.

Later calls on a marked cache read from it where the virtual tokens stand. A mark needs no look at the data (a GPU
would have to wait for it), and caches that were filled without a prompt pass untouched.

    the backbone, while it runs      [ prompt | tokens ]      positions and masks count all places
    everyone else (`generate`)                [ tokens ]      ids are cut by the number of tokens

So a marked cache has two lengths. It gets a subclass of its class, which tells each the one that it needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache as cached
from typing import Any

import torch
from torch import Tensor

from .layout import PromptLayout

# What transformers calls the cache, as an argument and in outputs: since 5.24, and before. Until 5.40 the older name
# is understood as well.
CACHE_NAMES = ("cache", "past_key_values")
_MARK = "input_tuning_mark"


@dataclass(frozen=True)
class CacheMark:
    """The mark on a cache that holds a prompt.

    Args:
        layout: how the prompts stand in its rows; 0 slots where the caller's own input held them.
        mask: `(batch, slots + length)`, of the call that put the prompts in, where it had one.
    """

    layout: PromptLayout
    mask: Tensor | None = None


class _MarkedCache:
    """What a cache with a mark has more than its class."""

    input_tuning_mark: CacheMark
    in_backbone = False

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Number of the caller's tokens; for the backbone that runs on the cache, of places."""
        places = super().get_seq_length(layer_idx)  # type: ignore[misc]
        slots = self.input_tuning_mark.layout.slots
        return places if self.in_backbone or not slots or not places else places - slots

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """As the cache's own; a model that does not know of the prompt would count its positions without it."""
        if not self.in_backbone and not places_in(self):
            self.input_tuning_mark = CacheMark(PromptLayout(0))  # it was emptied, and holds no prompt any more
        slots = self.input_tuning_mark.layout.slots
        if slots and not self.in_backbone:
            raise ValueError(
                f"The cache holds {slots} virtual tokens, and a model without input-tuning goes on from it. Use the "
                "model that filled it (its adapter may be disabled), or start a new cache."
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Copies and pickles name the class that the subclass was made of."""
        return _empty_marked, (type(self).__mro__[2],), self.__dict__


@cached
def _marked_class(cache_class: Any) -> Any:
    return type(cache_class.__name__, (_MarkedCache, cache_class), {"__module__": cache_class.__module__})


def _empty_marked(cache_class: type) -> Any:
    marked = _marked_class(cache_class)
    return marked.__new__(marked)


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

    Raises:
        ValueError: part of the prompt was cropped away.
    """
    mark = getattr(cache, _MARK, None)
    if mark is None or not mark.layout.slots:
        return mark
    _tell_tokens(cache)
    places = places_in(cache)
    if 0 < places < mark.layout.slots:
        raise ValueError(
            f"The cache was cropped to {places} places, but its first {mark.layout.slots} are virtual tokens. Crop "
            "less, or start a new cache."
        )
    return mark if places else None


def places_in(cache: Any) -> int:
    """Length of a cache, virtual tokens included."""
    if not isinstance(cache, _MarkedCache):
        return cache.get_seq_length()
    return super(_MarkedCache, cache).get_seq_length()  # type: ignore[misc]


def mark_cache(cache: Any, mark: CacheMark) -> None:
    """Says of a cache what it holds."""
    setattr(cache, _MARK, mark)
    if mark.layout.slots:
        _tell_tokens(cache)


def _tell_tokens(cache: Any) -> None:
    """Compiled code cannot change a class; then the next call outside of it does."""
    if not isinstance(cache, _MarkedCache) and not torch.compiler.is_compiling():
        cache_class: Any = type(cache)
        cache.__class__ = _marked_class(cache_class)


def enter_backbone(cache: Any) -> None:
    """The backbone runs on a cache from now on."""
    if isinstance(cache, _MarkedCache):
        cache.in_backbone = True


def leave_backbone(cache: Any) -> None:
    if isinstance(cache, _MarkedCache):
        cache.in_backbone = False
