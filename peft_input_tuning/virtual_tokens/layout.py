"""Where the virtual tokens stand in a batch: putting them in, taking them out. Pure functions of tensors.

A row of a batch is `[left pads | tokens | right pads]`. With its prompt (`PromptLayout`) it becomes

    [ slack | left pads | prompt | tokens | right pads ]        slack = "left"
    [ left pads | prompt | tokens | right pads | slack ]        slack = "right"

The prompt stands next to the tokens, never before the pads: otherwise a left-padded row would differ from the same row
alone (sliding windows, rotary and relative positions see the distance). Slack is what is left over where the rows of a
batch have prompts of different lengths; it is masked. It goes to the left, so that tokens generated later follow the
row's last token; encoders that number positions by the place in the row (BART's) want it on the right.

One index, gathered once, serves embeddings, masks, token types and positions alike, and nothing in it depends on the
data in a way that would make a GPU wait.

A row may hold several sequences (`PackedLayout`); then each of them gets a prompt of its own:

    [ a a a | b b ]   positions 0 1 2 0 1   ──►   [ prompt a a a | prompt b b | slack ]

A sequence starts where a position does not follow the one before it; that is also how transformers tells the
sequences of a row apart, and keeps one from seeing another; or where `cu_seq_lens` say so. Slack fills up rows that
hold fewer sequences than others. It stands at position 0, each place a sequence of its own, so that nothing sees it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..modules import VIRTUAL


def count_left_pads(mask: Tensor) -> Tensor:
    """Number of masked places before the first token of each row: `(batch, length)` → `(batch, 1)`.

    A row without any token counts as all left pads.
    """
    return (mask.cumsum(dim=-1) == 0).sum(dim=-1, keepdim=True)


def repeat_rows(rows: Tensor, batch: int) -> Tensor:
    """Repeats each row for the beams and return sequences of `generate`: `(b, ...)` → `(batch, ...)`, b | batch."""
    if rows.shape[0] == batch:
        return rows
    return rows.repeat_interleave(batch // rows.shape[0], dim=0)


def gather_places(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Picks places along `dim`, row by row: `index` is `(batch, places)`, dim 0 of `x` is the batch."""
    dim = dim % x.ndim
    if x.ndim == 2:
        return x.gather(dim, index)
    shape = [1] * x.ndim
    shape[0], shape[dim] = index.shape
    target = list(x.shape)
    target[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(target))


@dataclass(frozen=True)
class PromptLayout:
    """How the prompts stand in the rows of one batch.

    Args:
        slots: places added to each row, the length of the longest prompt.
        lengths: `(batch, 1)`, each row's prompt length; None if all have `slots`.
        mask: `(batch, length)`, of the call that the prompts were put into; None if it has no pads.
        slack: "left" or "right", see the module's picture.
    """

    slots: int
    lengths: Tensor | None = None
    mask: Tensor | None = None
    slack: str = "left"
    _indices: dict[int, Tensor | None] = field(default_factory=dict, compare=False, repr=False)

    @property
    def pads(self) -> Tensor | None:
        """Each row's left pads, `(batch, 1)`; None if there is no mask."""
        return None if self.mask is None else count_left_pads(self.mask)

    def index(self, length: int) -> Tensor | None:
        """Places to take from `[slots right-aligned prompt places | length places of x]`, `(batch, slots + length)`.

        None if that is already the wanted order. Worked out once for each length.
        """
        if torch.compiler.is_compiling():  # there would be a graph for each length
            return self._index(length)
        if length not in self._indices:
            self._indices[length] = self._index(length)
        return self._indices[length]

    def _index(self, length: int) -> Tensor | None:
        """Every place gets a rank, and a stable sort does the rest: 0 for left pads and slack on the left, 1 for
        prompts and what follows them, 2 for slack on the right."""
        lengths = self.lengths
        if self.mask is None and (lengths is None or self.slack == "left"):
            return None
        if self.mask is None:
            assert lengths is not None
            of_row = torch.ones(lengths.shape[0], length, dtype=torch.long, device=lengths.device)
        else:
            of_row = self.mask.cumsum(dim=-1).clamp(max=1)
            if of_row.shape[1] < length:  # what follows later is no left pad
                of_row = nn.functional.pad(of_row, (0, length - of_row.shape[1]), value=1)
        if lengths is None:
            ranks = nn.functional.pad(of_row, (self.slots, 0), value=1)
        else:
            visible = self._visible(lengths)
            ranks = torch.cat([visible if self.slack == "left" else 2 - visible, of_row], dim=1)
        return ranks.argsort(dim=1, stable=True)

    def _visible(self, lengths: Tensor) -> Tensor:
        """1 for slots that hold virtual tokens, 0 for others, `(batch, slots)`."""
        return (torch.arange(self.slots, 0, -1, device=lengths.device) <= lengths).long()

    def join(self, prompt: Tensor, x: Tensor) -> Tensor:
        """Puts `prompt` `(batch, slots, ...)` into `x` `(batch, length, ...)` → `(batch, slots + length, ...)`."""
        return self._in_order(torch.cat([prompt.to(x.dtype), x], dim=1), x.shape[1])

    def _in_order(self, joined: Tensor, length: int) -> Tensor:
        index = self.index(length)
        return joined if index is None else gather_places(joined, index)

    def virtual_ids(self, batch: int, device: torch.device, slack: int | None = None) -> Tensor:
        """The ids of the prompts, `(batch, slots)`: `VIRTUAL` - 1 is a prompt's last virtual token, `VIRTUAL` - 2 the
        one before it.

        Slots that shorter prompts leave over get the id `slack`; None leaves them ids of virtual tokens.
        """
        ids = torch.arange(VIRTUAL - self.slots, VIRTUAL, device=device).expand(batch, -1)
        if self.lengths is None or slack is None:
            return ids
        return torch.where(ids >= VIRTUAL - self.lengths, ids, slack)

    def join_mask(self, mask: Tensor | None, batch: int, length: int) -> Tensor | None:
        """The mask with virtual tokens visible and slack hidden, `(batch, slots + length)`; None if none is needed."""
        if mask is None:
            if self.lengths is None:
                return None
            mask = torch.ones(batch, length, dtype=torch.long, device=self.lengths.device)
        if self.lengths is None:
            return self._in_order(nn.functional.pad(mask, (self.slots, 0), value=1), length)
        return self.join(self._visible(self.lengths), mask)

    def join_positions(self, positions: Tensor, first_is_smallest: bool = False) -> Tensor:
        """Positions `(batch or 1, length)` → `(.., slots + length)`: the prompt takes the first token's position and
        those after it; what follows moves on by the row's prompt length (and so do pads, which nobody reads).

        Positions with axes (time, height, width) are `(axes, batch, length)`: each axis does so.
        `first_is_smallest` says that no position of a row is smaller than its first token's.
        """
        if positions.ndim == 3:
            return torch.stack([self.join_positions(axis, first_is_smallest) for axis in positions])
        slots, length = self.slots, positions.shape[1]
        reference = self.mask if self.mask is not None else self.lengths
        if reference is not None:
            positions = positions.expand(reference.shape[0], -1)
        if self.lengths is None:
            prompt = torch.arange(slots, device=positions.device).expand(positions.shape[0], -1)
        else:
            prompt = (torch.arange(-slots, 0, device=positions.device) + self.lengths).clamp(min=0)
        if self.mask is None:
            first = positions[:, :1]
        elif first_is_smallest:
            first = positions.amin(dim=1, keepdim=True)
        else:
            first = positions.gather(1, count_left_pads(self.mask).clamp(max=length - 1))
        return self.join(prompt + first, self.shift_positions(positions))

    def shift_positions(self, positions: Tensor) -> Tensor:
        """Positions `(..., batch or 1, length)` of tokens that follow a prompt which is already in the cache."""
        return positions + (self.slots if self.lengths is None else self.lengths)

    def remove(self, x: Tensor, dim: int = 1) -> Tensor:
        """Takes the prompt out again: places along `dim` go from slots + length to length.

        Tokens come back at their own places. With slack on the left, what stands at left pads is not what the pads
        got, which makes this a slice instead of a gather: nothing reads it in hidden states. Masks and labels, of two
        dimensions, are read there.
        """
        length = x.shape[dim] - self.slots
        is_slice = x.ndim > 2 and (self.slack == "left" or self.lengths is None)
        index = None if is_slice else self.index(length)
        if index is None:
            # Contiguous: in bfloat16 on a CPU, a head over a slice copies its weight for every row of the batch.
            return x.narrow(dim, self.slots, length).contiguous()
        return gather_places(x, index.argsort(dim=1)[:, self.slots :], dim)

    def selected(self, rows: Tensor) -> PromptLayout:
        """The same layout for some of the rows, by their numbers or as booleans `(batch,)`."""
        lengths = None if self.lengths is None else self.lengths[rows]
        return PromptLayout(self.slots, lengths, None if self.mask is None else self.mask[rows], self.slack)

    def repeated(self, batch: int) -> PromptLayout:
        """The same layout for a batch whose rows were repeated."""
        if all(one is None or one.shape[0] == batch for one in (self.lengths, self.mask)):
            return self
        lengths = None if self.lengths is None else repeat_rows(self.lengths, batch)
        mask = None if self.mask is None else repeat_rows(self.mask, batch)
        return PromptLayout(self.slots, lengths, mask, self.slack)


# ---- rows of several sequences --------------------------------------------------------------------------------------


def numbers_of(bounds: Tensor, length: int) -> Tensor:
    """Which sequence each place belongs to, `(1, length)` from 1, in the one row that `cu_seq_lens` `(sequences + 1,)`
    describes.

    What stands behind the last bound goes with the last sequence.
    """
    at = torch.arange(length, device=bounds.device)
    return torch.searchsorted(bounds[:-1].contiguous(), at, right=True).unsqueeze(0)


def places_in_sequences(numbers: Tensor) -> Tensor:
    """How far each place is from the start of its sequence, `(batch, length)`."""
    at = torch.arange(numbers.shape[1], device=numbers.device).expand(numbers.shape[0], -1)
    starts = numbers.diff(dim=-1, prepend=numbers[:, :1] - 1) != 0
    return at - torch.where(starts, at, 0).cummax(-1).values


def moved_bounds(bounds: Tensor, slots: int) -> Tensor:
    """`cu_seq_lens` `(sequences + 1,)` with a prompt of `slots` before each sequence."""
    return bounds + slots * torch.arange(len(bounds), device=bounds.device, dtype=bounds.dtype)


def sequence_starts(positions: Tensor) -> Tensor:
    """Whether a sequence starts at a place: `(batch, length)` → booleans of the same shape."""
    return positions.diff(dim=-1, prepend=positions[:, :1] - 2) != 1


@dataclass(frozen=True)
class PackedLayout:
    """How prompts stand in rows of several sequences. `N` is the length of the rows with their prompts.

    Args:
        slots: the length of the longest prompt.
        token: `(batch, N)`, the place in the caller's row of the token there, or of the one that a prompt stands
            before.
        distance: `(batch, N)`, how far that token is: 0 at the token itself, up to the prompt's length before it.
        kept: `(batch, length)`, where the caller's tokens stand now.
        numbers: `(batch, N)`, which sequence a place belongs to; a place of slack is one by itself.
        positions: `(batch, N)` or `(axes, batch, N)`, what the model is to be told; the prompt takes the position of
            its sequence's first token and those after it, tokens move on by the length of one prompt.
    """

    slots: int
    token: Tensor
    distance: Tensor
    kept: Tensor
    numbers: Tensor
    positions: Tensor

    @classmethod
    def of(cls, numbers: Tensor, positions: Tensor, slots: int, lengths: Tensor | None, places: int) -> PackedLayout:
        """The layout for the caller's sequences.

        Args:
            numbers: `(batch, length)`, which sequence each place belongs to, from 1.
            positions: `(batch or 1, length)`, or `(axes, batch or 1, length)`.
            slots: the length of the longest prompt.
            lengths: `(batch, 1)`, each row's prompt length; None where all have `slots`.
            places: N, what the longest row comes to with its prompts.
        """
        batch, length = numbers.shape
        prompts = torch.full_like(numbers[:, :1], slots) if lengths is None else lengths
        kept = torch.arange(length, device=numbers.device) + numbers * prompts
        # The place of the next token, seen from every place: what stands there now, or the nearest to the right.
        at = torch.arange(places, device=numbers.device).expand(batch, -1)
        following = torch.full_like(at, places).scatter(1, kept, kept).flip(-1).cummin(-1).values.flip(-1)
        is_slack = following == places
        tokens = torch.zeros_like(at).scatter(1, kept, torch.arange(length, device=at.device).expand(batch, -1))
        token = tokens.gather(1, following.clamp(max=places - 1))
        distance = torch.where(is_slack, 0, following - at)

        def moved(axis: Tensor) -> Tensor:
            return torch.where(is_slack, 0, (axis + prompts).gather(1, token) - distance)

        told = moved(positions) if positions.ndim == 2 else torch.stack([moved(axis) for axis in positions])
        return cls(slots, token, distance, kept, torch.where(is_slack, -1 - at, numbers.gather(1, token)), told)

    def join(self, prompt: Tensor, x: Tensor) -> Tensor:
        """Puts `prompt` `(batch, slots, ...)` before each sequence of `x` `(batch, length, ...)` → `(batch, N, ...)`.

        A row's prompt stands at the right end of its slots.
        """
        index = torch.where(self.distance > 0, self.slots - self.distance, self.slots + self.token)
        return gather_places(torch.cat([prompt.to(x.dtype), x], dim=1), index)

    def spread(self, x: Tensor) -> Tensor:
        """Gives virtual tokens what their sequence's first token has: `(batch, length)` → `(batch, N)`."""
        return x.expand(self.token.shape[0], -1).gather(1, self.token)

    def remove(self, x: Tensor, dim: int = 1) -> Tensor:
        """Takes the prompts out again: places along `dim` go from N to length."""
        return gather_places(x, self.kept, dim)
