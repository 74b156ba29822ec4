"""Where the virtual tokens go: batches of random shapes, against a loop over rows and places.

The loop says what stands at each place of a row (`places_of_row`, `places_of_packed_row`); what it has to be of
embeddings, masks and positions follows from that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from torch import Tensor

from device import DEVICE
from peft_input_tuning.virtual_tokens.layout import (
    PackedLayout,
    PromptLayout,
    count_left_pads,
    moved_bounds,
    numbers_of,
    places_in_sequences,
    repeat_rows,
    sequence_starts,
)

# The same batches in each run, however slow the machine.
of_random_shapes = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def tensor(values: list, dtype: torch.dtype = torch.long) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def column(values: list[int] | None) -> Tensor | None:
    return None if values is None else tensor(values)[:, None]


def numbered(rows: int, length: int, first: int) -> Tensor:
    """`(rows, length)` of different numbers."""
    return torch.arange(first, first + rows * length, device=DEVICE).view(rows, length)


# ---- a row is one sequence ------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Rows of one sequence each.

    Args:
        slots: length of the longest prompt.
        slack: on which side it stands.
        prompts: each row's prompt length; `lengths` is the same as the layout has it, None for `slots` in each row.
        mask: zeros and ones of each row; all ones unless `has_mask`, without which the layout knows of none.
    """

    slots: int
    slack: str
    prompts: list[int]
    lengths: list[int] | None
    mask: list[list[int]]
    has_mask: bool

    @property
    def size(self) -> tuple[int, int]:
        return len(self.mask), len(self.mask[0])

    @property
    def pads(self) -> list[int]:
        return [[*row, 1].index(1) for row in self.mask]

    @property
    def layout(self) -> PromptLayout:
        return PromptLayout(self.slots, column(self.lengths), tensor(self.mask) if self.has_mask else None, self.slack)

    def prompt(self) -> Tensor:
        """`(batch, slots)` negative numbers at the right end of the slots, 0 where a row's prompt is shorter."""
        rows = -numbered(len(self.mask), self.slots, 1)
        for row, length in enumerate(self.prompts):
            rows[row, : self.slots - length] = 0
        return rows

    def places(self, row: int) -> list[tuple[str, int]]:
        return places_of_row(self.size[1], self.slots, self.prompts[row], self.pads[row], self.slack)


def places_of_row(length: int, slots: int, prompt: int, pads: int, slack: str) -> list[tuple[str, int]]:
    """What stands at each place: ("prompt", slot), or ("given", the caller's place), or ("slack", 0)."""
    row = [("given", at) for at in range(pads)]
    row += [("prompt", slot) for slot in range(slots - prompt, slots)]
    row += [("given", at) for at in range(pads, length)]
    leftover = [("slack", 0)] * (slots - prompt)
    return leftover + row if slack == "left" else row + leftover


@some.composite
def batches(draw) -> Batch:
    slots, rows, length = draw(some.integers(1, 6)), draw(some.integers(1, 4)), draw(some.integers(1, 8))
    lengths = draw(some.none() | some.lists(some.integers(0, slots), min_size=rows, max_size=rows))
    if lengths is not None:
        lengths[draw(some.integers(0, rows - 1))] = slots
    mask = [[1] * length for _ in range(rows)]
    has_mask = draw(some.booleans())
    if has_mask:  # with holes, pads on both sides, and rows of nothing but pads
        mask = draw(
            some.lists(
                some.lists(some.sampled_from([0, 1]), min_size=length, max_size=length), min_size=rows, max_size=rows
            )
        )
    prompts = [slots] * rows if lengths is None else lengths
    return Batch(slots, draw(some.sampled_from(["left", "right"])), prompts, lengths, mask, has_mask)


@of_random_shapes
@given(batches())
def test_join(batch):
    x, prompt = numbered(*batch.size, 1), batch.prompt()
    joined = batch.layout.join(prompt, x)
    for row in range(len(x)):
        of_kind = {"given": x[row].tolist(), "prompt": prompt[row].tolist(), "slack": [0]}
        assert joined[row].tolist() == [of_kind[kind][at] for kind, at in batch.places(row)]
    wide = batch.layout.join(
        prompt[..., None, None].expand(-1, -1, 3, 2).double(), x[..., None, None].expand(-1, -1, 3, 2)
    )
    assert torch.equal(wide, joined[..., None, None].expand(-1, -1, 3, 2))


@of_random_shapes
@given(batches(), some.sampled_from([torch.long, torch.bool, torch.float32]))
def test_join_mask(batch, dtype):
    given_mask = tensor(batch.mask, dtype) if batch.has_mask else None
    joined = batch.layout.join_mask(given_mask, *batch.size)
    if given_mask is None and batch.lengths is None:
        assert joined is None
        return
    assert joined.dtype == (dtype if batch.has_mask else torch.long)
    for row, of_row in enumerate(batch.mask):
        want = [
            {"given": of_row, "prompt": [1] * batch.slots, "slack": [0]}[kind][at] for kind, at in batch.places(row)
        ]
        assert joined[row].long().tolist() == want


@of_random_shapes
@given(batches(), some.data())
def test_join_positions(batch, data):
    """Tokens move on by the prompt, which takes the first token's position and those after it."""
    rows, length = batch.size
    shape = some.lists(some.integers(0, 50), min_size=length, max_size=length)
    one_for_all = data.draw(some.booleans())
    positions = data.draw(some.lists(shape, min_size=1 if one_for_all else rows, max_size=1 if one_for_all else rows))
    joined = batch.layout.join_positions(tensor(positions)).expand(rows, -1)
    for row in range(rows):
        own, pads, prompt = positions[0 if one_for_all else row], batch.pads[row], batch.prompts[row]
        for (kind, at), got in zip(batch.places(row), joined[row].tolist(), strict=True):
            if kind == "given" and at >= pads:
                assert got == own[at] + prompt
            elif kind == "prompt" and pads < length:
                assert got == own[pads] + at - (batch.slots - prompt)
            assert got >= 0  # of slack and pads too, which models look up all the same


@of_random_shapes
@given(batches())
def test_shift_positions(batch):
    shifted = batch.layout.shift_positions(tensor([[7, 9]] * len(batch.mask)))
    assert shifted.tolist() == [[7 + prompt, 9 + prompt] for prompt in batch.prompts]


@of_random_shapes
@given(batches(), some.sampled_from([1, 2, -1]))
def test_remove(batch, dim):
    """Tokens come back at their places; so do pads where slack is on the right."""
    rows, length = batch.size
    x = numbered(*batch.size, 1)
    joined = batch.layout.join(batch.prompt(), x)
    if dim == 2:
        joined = joined[:, None, :, None].expand(-1, 3, -1, 2)
    back = batch.layout.remove(joined, dim)
    back = back[:, 2, :, 1] if dim == 2 else back
    assert back.shape == (rows, length)
    for row, pads in enumerate(batch.pads):
        pads = 0 if batch.slack == "right" and batch.lengths is not None else pads
        assert back[row, pads:].tolist() == x[row, pads:].tolist()


@of_random_shapes
@given(batches(), some.integers(1, 3))
def test_repeated(batch, times):
    """The rows of a batch that `generate` repeats, for beams and return sequences."""
    rows, _ = batch.size
    x, prompt = (repeat_rows(one, rows * times) for one in (numbered(*batch.size, 1), batch.prompt()))
    assert x.tolist() == [row for row in numbered(*batch.size, 1).tolist() for _ in range(times)]
    want = repeat_rows(batch.layout.join(batch.prompt(), numbered(*batch.size, 1)), rows * times)
    repeated = batch.layout.repeated(rows * times)
    assert torch.equal(repeated.join(prompt, x), want)
    assert torch.equal(repeated.remove(want), repeat_rows(batch.layout.remove(want[::times]), rows * times))


@of_random_shapes
@given(batches())
def test_count_left_pads(batch):
    """A row without tokens counts as left pads."""
    for dtype in (torch.long, torch.bool, torch.float32):
        assert count_left_pads(tensor(batch.mask, dtype)).flatten().tolist() == batch.pads


def test_without_mask_and_with_one_length_nothing_is_gathered():
    layout = PromptLayout(3)
    assert layout.index(5) is None
    x, prompt = torch.randn(2, 5, 4, device=DEVICE), torch.randn(2, 3, 4, device=DEVICE)
    assert torch.equal(layout.join(prompt, x), torch.cat([prompt, x], 1))


# ---- rows of several sequences --------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """Rows of several sequences each.

    Args:
        slots: length of the longest prompt.
        prompts: each row's prompt length; `lengths` is the same as the layout has it, None for `slots` in each row.
        positions: of each row.
    """

    slots: int
    prompts: list[int]
    lengths: list[int] | None
    positions: list[list[int]]

    def sequences(self, row: int) -> list[list[int]]:
        """The places of each sequence."""
        found: list[list[int]] = []
        for at, position in enumerate(self.positions[row]):
            if at and position == self.positions[row][at - 1] + 1:
                found[-1].append(at)
            else:
                found.append([at])
        return found

    @property
    def size(self) -> int:
        """What the longest row comes to with its prompts."""
        return max(
            len(row) + len(self.sequences(number)) * self.prompts[number] for number, row in enumerate(self.positions)
        )

    @property
    def layout(self) -> PackedLayout:
        positions = tensor(self.positions)
        numbers = sequence_starts(positions).cumsum(-1)
        return PackedLayout.of(numbers, positions, self.slots, column(self.lengths), self.size)

    def places(self, row: int) -> list[tuple[str, int, int]]:
        """What stands at each place: ("prompt", slot, first place of its sequence), ("given", the caller's place, the
        same), or ("slack", 0, 0)."""
        found = []
        for sequence in self.sequences(row):
            found += [("prompt", slot, sequence[0]) for slot in range(self.slots - self.prompts[row], self.slots)]
            found += [("given", at, at) for at in sequence]
        return found + [("slack", 0, 0)] * (self.size - len(found))


@some.composite
def packed_rows(draw) -> Packed:
    slots, rows, length = draw(some.integers(1, 5)), draw(some.integers(1, 3)), draw(some.integers(1, 9))
    lengths = draw(some.none() | some.lists(some.integers(0, slots), min_size=rows, max_size=rows))
    if lengths is not None:
        lengths[draw(some.integers(0, rows - 1))] = slots
    positions = []
    for _ in range(rows):
        row: list[int] = []
        while len(row) < length:
            start = draw(some.integers(0, 2))
            row += range(start, start + draw(some.integers(1, length)))
        positions.append(row[:length])
    return Packed(slots, [slots] * rows if lengths is None else lengths, lengths, positions)


@of_random_shapes
@given(packed_rows())
def test_join_packed(packed):
    rows, length = len(packed.positions), len(packed.positions[0])
    x, prompt = numbered(rows, length, 1), -numbered(rows, packed.slots, 1)
    joined = packed.layout.join(prompt, x)
    assert joined.shape == (rows, packed.size)
    for row in range(rows):
        of_kind = {"given": x[row].tolist(), "prompt": prompt[row].tolist()}
        for (kind, at, _), got in zip(packed.places(row), joined[row].tolist(), strict=True):
            assert kind == "slack" or got == of_kind[kind][at]
    wide = packed.layout.join(prompt[..., None].expand(-1, -1, 3), x[..., None].expand(-1, -1, 3))
    assert torch.equal(wide, joined[..., None].expand(-1, -1, 3))
    assert torch.equal(packed.layout.remove(joined), x)
    assert torch.equal(packed.layout.remove(joined[:, None], dim=-1), x[:, None])


@of_random_shapes
@given(packed_rows())
def test_packed_positions(packed):
    """Tokens move on by one prompt; a prompt takes the positions before them; slack stands at 0."""
    got = packed.layout.positions
    for row, positions in enumerate(packed.positions):
        prompt = packed.prompts[row]
        want = {
            "given": lambda at, _, own=positions, prompt=prompt: own[at] + prompt,
            "prompt": lambda slot, first, own=positions, prompt=prompt: own[first] + slot - (packed.slots - prompt),
            "slack": lambda *_: 0,
        }
        assert got[row].tolist() == [want[kind](at, first) for kind, at, first in packed.places(row)]


@of_random_shapes
@given(packed_rows())
def test_packed_numbers(packed):
    """Each sequence has its prompt with it; each place of slack is alone."""
    for row, numbers in enumerate(packed.layout.numbers.tolist()):
        of_place = [
            None if kind == "slack" else first if kind == "prompt" else at for kind, at, first in packed.places(row)
        ]
        firsts = {at: sequence[0] for sequence in packed.sequences(row) for at in sequence}
        want = [None if at is None else firsts[at] for at in of_place]
        for number, other, one, two in zip(numbers, numbers[1:], want, want[1:], strict=False):
            assert (number == other) == (one is not None and one == two)
        slack = [number for number, one in zip(numbers, want, strict=True) if one is None]
        assert len(set(slack)) == len(slack)


@of_random_shapes
@given(packed_rows())
def test_spread(packed):
    """A prompt gets what its sequence's first token has."""
    rows, length = len(packed.positions), len(packed.positions[0])
    for types in (numbered(rows, length, 1), numbered(1, length, 1)):
        spread = packed.layout.spread(types)
        for row in range(rows):
            own = types[row % len(types)].tolist()
            for (kind, _, first), got in zip(packed.places(row), spread[row].tolist(), strict=True):
                assert kind == "slack" or got == own[first]


@of_random_shapes
@given(packed_rows())
def test_sequence_starts(packed):
    starts = sequence_starts(tensor(packed.positions))
    for row in range(len(packed.positions)):
        firsts = [sequence[0] for sequence in packed.sequences(row)]
        assert starts[row].nonzero().flatten().tolist() == firsts


@of_random_shapes
@given(some.lists(some.integers(1, 5), min_size=1, max_size=5), some.integers(0, 3), some.integers(0, 4))
def test_bounds(lengths, behind, slots):
    """`cu_seq_lens`; what stands behind the last bound goes with the last sequence."""
    bounds = [sum(lengths[:count]) for count in range(len(lengths) + 1)]
    positions = places_in_sequences(numbers_of(tensor(bounds, torch.int32), bounds[-1] + behind))
    assert positions.tolist() == [[at for length in (*lengths[:-1], lengths[-1] + behind) for at in range(length)]]
    moved = moved_bounds(tensor(bounds, torch.int32), slots)
    assert moved.dtype == torch.int32
    assert moved.tolist() == [bound + number * slots for number, bound in enumerate(bounds)]
