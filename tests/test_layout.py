"""Where the virtual tokens go, against a loop over rows and places."""

from __future__ import annotations

import random

import pytest
import torch

from device import DEVICE
from peft_input_tuning.virtual_tokens.layout import PromptLayout, count_left_pads, repeat_rows


def naive_row(prompt: list, pads: list, rest: list, slots: int, slack: str, empty) -> list:
    leftover = [empty] * (slots - len(prompt))
    row = pads + prompt + rest
    return leftover + row if slack == "left" else row + leftover


def batches(count: int):
    chooser = random.Random(0)
    for _ in range(count):
        slots, length, batch = chooser.randint(1, 6), chooser.randint(1, 8), chooser.randint(1, 4)
        lengths = [chooser.randint(0, slots) for _ in range(batch)]
        lengths[chooser.randrange(batch)] = slots
        yield slots, length, lengths, [chooser.randint(0, length - 1) for _ in range(batch)]


def mask_with(pads: list[int], length: int) -> torch.Tensor:
    return (torch.arange(length, device=DEVICE) >= column(pads)).long()


def column(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE)[:, None]


@pytest.mark.parametrize("slack", ["left", "right"])
def test_join_equals_a_loop_over_rows(slack):
    for slots, length, lengths, pads in batches(60):
        batch = len(lengths)
        layout = PromptLayout(slots, column(lengths), mask_with(pads, length), slack)
        x = torch.arange(batch * length, device=DEVICE).view(batch, length) + 1
        prompt = torch.zeros(batch, slots, dtype=torch.long, device=DEVICE)
        for row, k in enumerate(lengths):
            prompt[row, slots - k :] = -torch.arange(1, k + 1, device=DEVICE)
        expected = [
            naive_row([-i - 1 for i in range(k)], x[r, :p].tolist(), x[r, p:].tolist(), slots, slack, 0)
            for r, (k, p) in enumerate(zip(lengths, pads, strict=True))
        ]
        assert layout.join(prompt, x).tolist() == expected
        three = layout.join(prompt[..., None].expand(-1, -1, 3), x[..., None].expand(-1, -1, 3))
        assert torch.equal(three[..., 2], torch.tensor(expected, device=DEVICE))


@pytest.mark.parametrize("slack", ["left", "right"])
def test_mask_and_positions_equal_a_loop_over_rows(slack):
    for slots, length, lengths, pads in batches(60):
        batch = len(lengths)
        mask = torch.ones(batch, length, dtype=torch.long, device=DEVICE)
        positions = torch.zeros(batch, length, dtype=torch.long, device=DEVICE)
        for row, p in enumerate(pads):
            mask[row, :p] = 0
            positions[row, p:] = torch.arange(length - p, device=DEVICE) + 5
        assert count_left_pads(mask).flatten().tolist() == pads
        layout = PromptLayout(slots, column(lengths), mask, slack)
        joined_mask = layout.join_mask(mask, batch, length)
        joined = layout.join_positions(positions)
        for row, (k, p) in enumerate(zip(lengths, pads, strict=True)):
            want_mask = naive_row([1] * k, [0] * p, [1] * (length - p), slots, slack, 0)
            assert joined_mask[row].tolist() == want_mask
            want = naive_row(
                [5 + i for i in range(k)], [None] * p, [5 + k + i for i in range(length - p)], slots, slack, None
            )
            assert [w for w in want if w is not None] == [
                value for value, w in zip(joined[row].tolist(), want, strict=True) if w is not None
            ]


@pytest.mark.parametrize("slack", ["left", "right"])
def test_remove_gives_tokens_back_at_their_places(slack):
    for slots, length, lengths, pads in batches(60):
        batch = len(lengths)
        layout = PromptLayout(slots, column(lengths), mask_with(pads, length), slack)
        x = torch.randn(batch, length, 2, device=DEVICE)
        back = layout.remove(layout.join(torch.randn(batch, slots, 2, device=DEVICE), x))
        for row, p in enumerate(pads):
            assert torch.equal(back[row, p:], x[row, p:])


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_padded_rows_with_prompts_of_one_length(dtype):
    for slots, length, _, pads in batches(60):
        mask = torch.ones(len(pads), length, dtype=dtype, device=DEVICE)
        for row, p in enumerate(pads):
            mask[row, :p] = 0
        layout = PromptLayout(slots, mask=mask)
        x = torch.arange(len(pads) * length, device=DEVICE).view(len(pads), length) + 1
        prompt = -torch.arange(1, slots + 1, device=DEVICE).expand(len(pads), -1)
        joined, joined_mask = layout.join(prompt, x), layout.join_mask(mask, len(pads), length)
        assert joined_mask.dtype == dtype
        for row, p in enumerate(pads):
            own = prompt[row].tolist()
            assert joined[row].tolist() == naive_row(own, x[row, :p].tolist(), x[row, p:].tolist(), slots, "left", 0)
            want = naive_row([1] * slots, [0] * p, [1] * (length - p), slots, "left", 0)
            assert joined_mask[row].long().tolist() == want


def test_without_mask_and_with_one_length_nothing_is_gathered():
    layout = PromptLayout(3)
    assert layout.index(5) is None
    assert layout.join_mask(None, 2, 5) is None
    x, prompt = torch.randn(2, 5, 4, device=DEVICE), torch.randn(2, 3, 4, device=DEVICE)
    assert torch.equal(layout.join(prompt, x), torch.cat([prompt, x], 1))
    assert layout.join_positions(torch.arange(5, device=DEVICE)[None]).tolist() == [list(range(8))]
    assert layout.shift_positions(column([7])).tolist() == [[10]]


def test_a_row_without_tokens_counts_as_left_pads():
    mask = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 1]], device=DEVICE)
    assert count_left_pads(mask).flatten().tolist() == [3, 1, 0]


def test_rows_are_repeated_as_generate_repeats_them():
    rows = column([1, 2])
    assert repeat_rows(rows, 4).flatten().tolist() == [1, 1, 2, 2]
    assert repeat_rows(rows, 2) is rows
