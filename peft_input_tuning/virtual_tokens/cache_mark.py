"""The cache of a call: what its argument is called, and the mark on one that holds a prompt.

Later calls on a marked cache read from it where the virtual tokens stand. A mark needs no look at the data (a GPU
would have to wait for it), and caches that were filled without a prompt pass untouched.

    the backbone, while it runs      [ prompt | tokens ]      positions and masks count all places
    everyone else (`generate`)                [ tokens ]      ids are cut by the number of tokens

So a marked cache has two lengths. It gets a subclass of its class, which tells each the one that it needs.
States without a length are marked as well: the mark alone says that they hold a prompt. They are objects (Mamba's), or
lists of tensors (RWKV's, XLNet's), which come back as lists that can carry a mark.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .layout import PromptLayout, repeat_rows
from .subclass import Extension, class_of, extend

# What transformers calls the cache, as an argument and in outputs: since 5.24, and before; the third is that of
# state-space models, the last are those of RWKV, XLNet and Reformer. Until 5.40 older names are understood as well.
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")


@dataclass(frozen=True)
class CacheMark:
    """The mark on a cache that holds a prompt.

    Args:
        layout: how the prompts stand in its rows; 0 slots if the caller's own input was all that it was filled from.
        mask: `(batch, slots + length)`, of the call that put the prompts in, if it had one.
    """

    layout: PromptLayout
    mask: Tensor | None = None

    def selected(self, rows: Any, batch: int | None) -> CacheMark:
        """The mark on some of the rows of a cache with `batch` of them (None: as many as there were at first)."""
        layout = self.layout if batch is None else self.layout.repeated(batch)
        mask = self.mask if self.mask is None or batch is None else repeat_rows(self.mask, batch)
        known = next((one for one in (layout.lengths, layout.mask, mask) if one is not None), None)
        if known is None:  # all rows are alike
            return self
        rows = torch.as_tensor(rows, device=known.device)
        return CacheMark(layout.selected(rows), None if mask is None else mask[rows])


class MarkedState(Extension):
    """What a state without a length has more than its class."""

    input_tuning_mark: CacheMark | None = None

    def reset(self) -> None:
        """Empties it; then it holds no prompt any more."""
        super().reset()  # type: ignore[misc]
        self.input_tuning_mark = None


class MarkedTensors(list):
    """A past that is a list of tensors, with a mark."""

    input_tuning_mark: CacheMark | None = None


class MarkedCache(MarkedState):
    """What a cache of transformers has more than its class."""

    in_backbone = False
    makes_masks = True

    @property
    def slots(self) -> int:
        """Number of places that virtual tokens take, for those who are not to know of them; 0 for the backbone."""
        mark = self.input_tuning_mark
        return 0 if mark is None or self.in_backbone else mark.layout.slots

    @property
    def is_compileable(self) -> bool:
        """Whether it has a fixed size. `generate` expands masks then, which it is kept from (`without_masks`)."""
        return self.makes_masks and super().is_compileable  # type: ignore[misc]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Number of the caller's tokens; for the backbone that runs on the cache, of places."""
        places = super().get_seq_length(layer_idx)  # type: ignore[misc]
        slots = self.slots
        return places if not slots or (isinstance(places, int) and not places) else places - slots

    def batch_select_indices(self, indices: Any) -> None:
        """Keeps some rows, and what is known of their prompts."""
        mark = self._mark_of_rows(indices)
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.input_tuning_mark = mark

    def reorder_cache(self, beam_idx: Tensor) -> None:
        mark = self._mark_of_rows(beam_idx)
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.input_tuning_mark = mark

    def _mark_of_rows(self, rows: Any) -> CacheMark | None:
        if self.input_tuning_mark is None:
            return None
        keys = (getattr(layer, "keys", None) for layer in _layers(self))
        batch = next((len(one) for one in keys if isinstance(one, Tensor)), None)
        return self.input_tuning_mark.selected(rows, batch)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """As the cache's own; a model that does not know of the prompt would count its positions without it."""
        if self.slots and mark_of(self) is None:
            self.input_tuning_mark = None  # it was emptied, and holds no prompt any more
        if self.slots:
            raise ValueError(
                f"The cache holds {self.slots} virtual tokens, and a model without input-tuning goes on from it. Use "
                "the model that filled it (its adapter may be disabled), or start a new cache."
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]


def cache_name(parameters: Iterable[str]) -> str | None:
    """The cache's name among the arguments of a forward, which is its name in the output, too; None if it has none."""
    parameters = set(parameters)
    return next((name for name in CACHE_NAMES if name in parameters), None)


def cache_of(call: dict[str, Any]) -> Any:
    """The cache that a call brings, by whichever of its names the caller used; None if it brings none."""
    return next((call[name] for name in CACHE_NAMES if call.get(name) is not None), None)


def places_in(cache: Any) -> Any:
    """Length of a cache, virtual tokens included: an int, or a tensor if its size is fixed; None if it has none."""
    cache = of_tokens(cache)
    if not isinstance(cache, Cache) or (_layers(cache) and all(cache.is_linear)):
        return None
    return class_of(cache).get_seq_length(cache)


def of_tokens(cache: Any) -> Any:
    """The part of a cache that holds the tokens, and has the mark: a decoder may have one for cross-attention beside
    it, and put both together only while it runs (BLIP). In transformers 5.20 the pair does not know its layers."""
    return getattr(cache, "self_attention_cache", cache)


def _layers(cache: Any) -> list:
    return of_tokens(cache).layers


def is_empty(cache: Any) -> bool:
    """Whether a cache without a mark holds nothing. Of one of a fixed size that was used before, a device is asked.

    Raises:
        ValueError: a state of which nothing tells.
    """
    if cache is None or not isinstance(cache, Cache):
        if cache is None or isinstance(cache, MarkedState):
            return True
        raise ValueError(
            f"Nothing tells whether this {type(cache).__name__} is empty, and so whether the prompt belongs in front. "
            "Start without one, and go on with the one that comes back."
        )
    if len(cache) > len(_layers(cache)):  # MiniMax keeps states beside its layers
        return False
    own = of_tokens(cache)
    if any(own.is_linear) and own.has_previous_state():
        return False
    length = places_in(cache)
    return length is None or int(length) == 0


def mark_of(cache: Any) -> CacheMark | None:
    """The mark on a cache; None if the cache is empty or was filled without a prompt.

    Raises:
        ValueError: part of the prompt was cropped away.
    """
    cache = of_tokens(cache)
    mark = getattr(cache, "input_tuning_mark", None)
    if mark is None or not mark.layout.slots:
        return mark
    _tell_tokens(cache)
    places = places_in(cache)
    if not isinstance(places, int) or len(cache) > len(_layers(cache)):
        return mark  # it can be emptied by `reset` only, which takes the mark away
    if 0 < places < mark.layout.slots:
        raise ValueError(
            f"The cache was cropped to {places} places, but its first {mark.layout.slots} are virtual tokens. Crop "
            "less, or start a new cache."
        )
    return mark if places else None


def has_fixed_size(cache: Any) -> bool:
    """Whether a cache has places for so many tokens and no more; a state has none (-1)."""
    return isinstance(cache, Cache) and cache.is_compileable and cache.get_max_length() > 0


def mark_cache(cache: Any, mark: CacheMark | None) -> Any:
    """Says of a cache what it holds; returns the cache, in place of a list or tuple one that can say it."""
    if isinstance(cache, list | tuple) and not isinstance(cache, MarkedTensors):
        cache = MarkedTensors(cache)
    holder = of_tokens(cache)
    holder.input_tuning_mark = mark
    _tell_tokens(holder)
    return cache


def _tell_tokens(cache: Any) -> None:
    """Compiled code cannot change a class; then the next call outside of it does. Not of a cache of a fixed size: that
    it was emptied only its class can tell."""
    if torch.compiler.is_compiling():
        if has_fixed_size(cache) and not isinstance(cache, MarkedCache):
            _outside_of_graphs(cache, MarkedCache)
        return
    if isinstance(cache, Cache):
        extend(cache, MarkedCache)
    elif hasattr(cache, "reset"):
        extend(cache, MarkedState)


_outside_of_graphs = torch.compiler.disable(
    extend,
    reason="a cache of a fixed size is marked outside of graphs; with fullgraph=True, do not compile its first call",
)


def enter_backbone(cache: Any) -> None:
    """The backbone runs on a cache from now on: it is told places instead of tokens."""
    cache = of_tokens(cache)
    if isinstance(cache, MarkedCache):
        cache.in_backbone = True


def leave_backbone(cache: Any) -> None:
    cache = of_tokens(cache)
    if isinstance(cache, MarkedCache):
        cache.in_backbone = False


@contextmanager
def without_masks(cache: Any) -> Iterator[None]:
    """`generate` prepares a call on a cache of a fixed size: it leaves the mask to the backbone, which widens it."""
    cache = of_tokens(cache)
    if not isinstance(cache, MarkedCache):
        yield
        return
    cache.makes_masks = False
    try:
        yield
    finally:
        cache.makes_masks = True
