"""Rows that hold several sequences each: every one of them gets a prompt of its own.

    [ a a a | b b ]   positions 0 1 2 0 1   ──►   [ prompt a a a | prompt b b | slack ]

A sequence starts where a position does not follow the one before it; that is also how transformers tells the
sequences of a row apart, and keeps one from seeing another. Slack fills up rows that hold fewer sequences than others.
It stands at position 0, each place a sequence of its own, so that nothing sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.masking_utils import create_masks_for_generate

from .splice import gather_places


def positions_of(bounds: Tensor, length: int) -> Tensor:
    """Positions `(1, length)` of the one row that `cu_seq_lens` `(sequences + 1,)` describes."""
    at = torch.arange(length, device=bounds.device)
    return (at - bounds[torch.searchsorted(bounds, at, right=True) - 1]).unsqueeze(0)


def moved_bounds(bounds: Tensor, slots: int) -> Tensor:
    """`cu_seq_lens` `(sequences + 1,)` with a prompt of `slots` before each sequence."""
    return bounds + slots * torch.arange(len(bounds), device=bounds.device, dtype=bounds.dtype)


def sequence_starts(positions: Tensor) -> Tensor:
    """Whether a sequence starts at a place: `(batch, length)` → booleans of the same shape."""
    return positions.diff(dim=-1, prepend=positions[:, :1] - 2) != 1


def _in_one_sequence(number: Tensor, row: Any, head: Any, query: Any, key: Any) -> Tensor:
    """A mask function of transformers: whether two places of a row belong to one sequence."""
    return number[row, query] == number[row, key]


@dataclass(frozen=True)
class PackedLayout:
    """How prompts stand in rows of several sequences. `N` is the length of the rows with their prompts.

    Args:
        slots: the length of the longest prompt.
        token: `(batch, N)`, the place in the caller's row of the token there, or of the one that a prompt stands
            before.
        distance: `(batch, N)`, how far that token is: 0 at the token itself, up to the prompt's length before it.
        kept: `(batch, length)`, where the caller's tokens stand now.
        positions: `(batch, N)`, what the model is to be told; tokens move on by the length of one prompt.
    """

    slots: int
    token: Tensor
    distance: Tensor
    kept: Tensor
    positions: Tensor

    @classmethod
    def of(cls, positions: Tensor, slots: int, lengths: Tensor | None, places: int) -> PackedLayout:
        """The layout for the caller's positions.

        Args:
            positions: `(batch, length)`.
            slots: the length of the longest prompt.
            lengths: `(batch, 1)`, each row's prompt length; None where all have `slots`.
            places: N, what the longest row comes to with its prompts.
        """
        batch, length = positions.shape
        prompts = torch.full_like(positions[:, :1], slots) if lengths is None else lengths
        number = sequence_starts(positions).cumsum(-1)  # of the sequence, from 1
        kept = torch.arange(length, device=positions.device) + number * prompts
        # The place of the next token, seen from every place: what stands there now, or the nearest to the right.
        at = torch.arange(places, device=positions.device).expand(batch, -1)
        following = torch.full_like(at, places).scatter(1, kept, kept).flip(-1).cummin(-1).values.flip(-1)
        is_slack = following == places
        numbers = torch.zeros_like(at).scatter(1, kept, torch.arange(length, device=at.device).expand(batch, -1))
        token = numbers.gather(1, following.clamp(max=places - 1))
        distance = torch.where(is_slack, 0, following - at)
        moved = (positions + prompts).gather(1, token) - distance
        return cls(slots, token, distance, kept, torch.where(is_slack, 0, moved))

    def join(self, prompt: Tensor, x: Tensor) -> Tensor:
        """Puts `prompt` `(batch, slots, ...)` before each sequence of `x` `(batch, length, ...)` → `(batch, N, ...)`.

        A row's prompt stands at the right end of its slots.
        """
        index = torch.where(self.distance > 0, self.slots - self.distance, self.slots + self.token)
        return gather_places(torch.cat([prompt.to(x.dtype), x], dim=1), index)

    def mask(self, config: PretrainedConfig, x: Tensor) -> Any:
        """The model's own attention mask, in which sequences do not see each other, for embeddings `(batch, N, dim)`.

        Transformers would look for packed sequences in positions, and a GPU would have to wait. Only where attention
        goes by chunks must it have them: a chunk is counted from the start of its sequence.
        """
        number = sequence_starts(self.positions).cumsum(-1)
        if getattr(config, "attention_chunk_size", None):
            return create_masks_for_generate(config, x, None, None, position_ids=self.positions)
        alike = partial(_in_one_sequence, number)
        return create_masks_for_generate(config, x, None, None, and_mask_function=alike)

    def spread(self, x: Tensor) -> Tensor:
        """Gives virtual tokens what their sequence's first token has: `(batch, length)` → `(batch, N)`."""
        return x.expand(self.token.shape[0], -1).gather(1, self.token)

    def remove(self, x: Tensor, dim: int = 1) -> Tensor:
        """Takes the prompts out again: places along `dim` go from N to length."""
        return gather_places(x, self.kept, dim)
