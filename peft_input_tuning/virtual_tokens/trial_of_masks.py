"""What a backbone does with positions and masks, seen by running it on a few ids.

backbone(ids)  ==  backbone(ids, positions)?    from where positions are counted
[ pads | ids ]  ==  [ ids ]?                    whether what is masked changes nothing, on a cache as well
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from .backbone import BackboneTraits
from .position_table import PositionTable, use_row_positions
from .subclass import extend, unextend
from .trial_run import hidden_states, is_same, pad_id, plain_ids, states_or_none

_LENGTH, _PADS = 7, 3
_FIRST_POSITIONS = (0, 1, 2)  # BERT, PaliGemma, MRA


@dataclass(frozen=True)
class WhatMasksDo:
    """What runs with positions and masks show; None if they could not be run.

    Args:
        first_position: of a row's first token, as the backbone counts if it is not told; None if it cannot be told.
        honours_mask: whether what is masked changes nothing beside it.
        needs_token_types: whether that holds with token types only (PaliGemma: without them its attention looks ahead
            if nothing is masked, and back if something is).
        masks_on_cache: whether it holds on a cache, too; None if there is none.
        takes_row_positions: whether its table of positions can be told those of each row.
        looks_ahead: whether states change with what follows, so that none is kept; asked where a table counts places.
        fills_cache: whether a cache that is passed, and does not come back in the output, goes on (RecurrentGemma's
            does; XLM wants whole rows with it); None if it comes back, or there is none.
    """

    first_position: int | None = None
    honours_mask: bool | None = None
    needs_token_types: bool = False
    masks_on_cache: bool | None = None
    takes_row_positions: bool = False
    looks_ahead: bool = False
    fills_cache: bool | None = None

    def added_to(self, traits: BackboneTraits) -> BackboneTraits:
        """What was read off a backbone, with what its runs have shown."""
        moved = 0 if self.first_position is None else self.first_position - traits.first_position
        return replace(
            traits,
            cache=None if self.looks_ahead else traits.cache,
            slack="left" if self.takes_row_positions else traits.slack,
            position_table=traits.position_table if self.takes_row_positions else None,
            first_position=traits.first_position + moved,
            max_positions=None if traits.max_positions is None else traits.max_positions - moved,
            honours_mask=self.honours_mask,
            needs_token_types=self.needs_token_types,
            masks_on_cache=self.masks_on_cache,
            fills_cache=self.fills_cache,
        )


def what_masks_do(backbone: nn.Module, embedding: nn.Module, traits: BackboneTraits) -> WhatMasksDo:
    """Runs a backbone on a row that is padded and one that is not, and on a cache."""
    ids = plain_ids(backbone, embedding, _LENGTH)
    seen = _with_masks(backbone, ids, traits)
    first = traits.first_position if seen.first_position is None else seen.first_position
    return replace(seen, fills_cache=_fills_cache(backbone, ids, replace(traits, first_position=first)))


def _with_masks(backbone: nn.Module, ids: Tensor, traits: BackboneTraits) -> WhatMasksDo:
    positions = "position_ids" in traits.parameters
    first = _first_position(backbone, ids, traits.first_position) if positions else traits.first_position
    table = None if traits.position_table is None else backbone.get_submodule(traits.position_table)
    ahead = table is not None and _looks_ahead(backbone, ids)
    if first is None or "attention_mask" not in traits.parameters:
        return WhatMasksDo(first, honours_mask=False, looks_ahead=ahead)
    if table is not None and not ahead and _takes_row_positions(backbone, table, ids):
        return WhatMasksDo(first, honours_mask=True, takes_row_positions=True)
    given = replace(traits, first_position=first)
    honours, needs_types = _honours_mask(backbone, ids, given), False
    if not honours and "token_type_ids" in traits.parameters:
        honours = needs_types = _honours_mask(backbone, ids, given, token_types=True)
    on_cache = _masks_on_cache(backbone, ids, given) if honours and not needs_types else None
    return WhatMasksDo(first, honours, needs_types, on_cache, looks_ahead=ahead)


def _first_position(backbone: nn.Module, ids: Tensor, likely: int) -> int | None:
    """From where a backbone counts positions; the likely one if it cannot be told apart (rotary positions)."""
    at = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    expected = states_or_none(backbone, input_ids=ids)
    for first in dict.fromkeys((likely, *_FIRST_POSITIONS)):
        if is_same(states_or_none(backbone, input_ids=ids, position_ids=at + first), expected):
            return first
    return None


def _honours_mask(backbone: nn.Module, ids: Tensor, traits: BackboneTraits, token_types: bool = False) -> bool:
    """Whether a row that has masked places, where slack stands in mixed batches, is the same as that row alone."""
    padded = _padded(backbone, ids, traits)
    types = {"token_type_ids": torch.zeros_like(padded["input_ids"])} if token_types else {}
    found = states_or_none(backbone, **padded, **types)
    if found is None or found.shape[:2] != padded["input_ids"].shape:
        return False
    kept = found[1:, _PADS:] if traits.slack == "left" else found[1:, :-_PADS]
    return all(
        is_same(one, states_or_none(backbone, input_ids=row, **{k: v[:1, : row.shape[1]] for k, v in types.items()}))
        for row, one in ((ids, found[:1]), (ids[:, :-_PADS], kept))
    )


def _looks_ahead(backbone: nn.Module, ids: Tensor) -> bool:
    """Whether a state changes with what follows."""
    changed = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
    same, other = (states_or_none(backbone, input_ids=row) for row in (ids, changed))
    return same is None or other is None or not is_same(other[:, :-1], same[:, :-1])


def _takes_row_positions(backbone: nn.Module, table: nn.Module, ids: Tensor) -> bool:
    """Whether a row behind masked places is what it is alone, beside one without, if a table is told the positions of
    both. Not if what it gives is not for the embeddings: RoFormer turns all rows' queries and keys by one table."""
    at = torch.arange(ids.shape[1], device=ids.device)
    at = torch.cat([at, at - _PADS]).view(2, -1)
    extend(table, PositionTable)
    try:
        with use_row_positions(at.clamp(min=0)):
            found = states_or_none(
                backbone, input_ids=torch.where(at < 0, pad_id(backbone), ids), attention_mask=(at >= 0).long()
            )
    finally:
        unextend(table)
    alone = [states_or_none(backbone, input_ids=row) for row in (ids, ids[:, _PADS:])]
    return found is not None and is_same(found[:1], alone[0]) and is_same(found[1:, _PADS:], alone[1])


def _masks_on_cache(backbone: nn.Module, ids: Tensor, traits: BackboneTraits) -> bool | None:
    """Whether the same holds for a last token that comes on a cache of those before it; GIT takes masks there for
    those of a text behind an image."""
    if traits.cache is None or traits.slack == "right":
        return None
    padded = _padded(backbone, ids, traits)
    try:
        first = {name: value[:, :-1] for name, value in padded.items()}
        cache = getattr(backbone(**first, use_cache=True, return_dict=True), traits.cache, None)
        if not isinstance(cache, Cache) or any(cache.is_linear):  # a state has forgotten what was masked
            return None
        last = {name: value if name == "attention_mask" else value[:, -1:] for name, value in padded.items()}
        found = hidden_states(backbone, use_cache=True, **last, **{traits.cache: cache})
        alone = [hidden_states(backbone, input_ids=row) for row in (ids, ids[:, :-_PADS])]
    except Exception:
        return None
    if found is None or any(one is None for one in alone):
        return None
    return is_same(found[:, -1], torch.cat([one[:, -1] for one in alone if one is not None]))


def _fills_cache(backbone: nn.Module, ids: Tensor, traits: BackboneTraits) -> bool | None:
    """Whether a last token on a cache that was passed before is what it is in the whole row."""
    name = traits.cache
    whole = {"input_ids": ids}
    if "position_ids" in traits.parameters:
        whole["position_ids"] = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0) + traits.first_position
    try:
        if name is None or name in backbone(input_ids=ids, use_cache=True, return_dict=True):
            return None
        cache = DynamicCache(config=backbone.config)
        for part in (slice(0, -1), slice(-1, None)):
            given = {key: value[:, part] for key, value in whole.items()}
            found = hidden_states(backbone, **given, use_cache=True, **{name: cache})
    except Exception:
        return False
    expected = states_or_none(backbone, input_ids=ids)
    return found is not None and expected is not None and is_same(found[:, -1:], expected[:, -1:])


def _padded(backbone: nn.Module, ids: Tensor, traits: BackboneTraits) -> dict[str, Tensor]:
    """A batch of a row as it is, and of its start with masked places beside it: a row that would get the mask of
    another shows, too."""
    pads = torch.full_like(ids[:, -_PADS:], pad_id(backbone))

    def both(whole: Tensor, masked: Tensor) -> Tensor:
        here = whole[:, :-_PADS]
        return torch.cat([whole, torch.cat([masked, here] if traits.slack == "left" else [here, masked], dim=1)])

    parts = {"input_ids": both(ids, pads), "attention_mask": both(torch.ones_like(ids), torch.zeros_like(pads))}
    if "position_ids" in traits.parameters:
        at = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0) + traits.first_position
        parts["position_ids"] = both(at, torch.zeros_like(pads) + traits.first_position)
    return parts
