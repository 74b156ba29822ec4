"""Rows that hold several sequences: each gets its own prompt, and what it gives alone."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close
from transformers import DataCollatorWithFlattening, DynamicCache

from adapters import adapted, add
from device import DEVICE, on_device
from families import DECODERS, FAMILIES, build, ids
from oracles import embed, row_output
from peft_input_tuning.virtual_tokens.backbone import forward_parameters
from peft_input_tuning.virtual_tokens.cache_mark import cache_name
from peft_input_tuning.virtual_tokens.layout import PackedLayout, moved_bounds, numbers_of, places_in_sequences

NOT_PACKED = ("bloom",)  # has no positions to tell sequences apart by
PACKING = [f for f in DECODERS if f.name not in NOT_PACKED]
LLAMA = FAMILIES["llama"]
each = pytest.mark.parametrize("family", PACKING, ids=str)
LENGTHS = ([5, 1, 7], [4, 6], [9])  # of the sequences in three rows


def pack(sequences: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences → ids and positions of one row."""
    return torch.cat(sequences)[None], torch.cat([torch.arange(len(s), device=DEVICE) for s in sequences])[None]


def sequences_of(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    return [ids(length, seed=seed + i) for i, length in enumerate(lengths)]


# ---- the layout, against a loop -------------------------------------------------------------------------------------


def naive_rows(rows: list[list[int]], prompts: list[int], offset: int) -> tuple[list[list[int]], list[list[int]]]:
    """What stands where, and its position: tokens as 100, 101, ..., the prompt's as -1, -2, ..., slack as None."""
    places, positions = [], []
    for lengths, prompt in zip(rows, prompts, strict=True):
        place: list = []
        position: list = []
        token = 100
        for length in lengths:
            place += [-i - 1 for i in range(prompt)] + list(range(token, token + length))
            position += [offset + i for i in range(prompt + length)]
            token += length
        places.append(place)
        positions.append(position)
    longest = max(map(len, places))
    return (
        [place + [None] * (longest - len(place)) for place in places],
        [position + [0] * (longest - len(position)) for position in positions],
    )


@pytest.mark.parametrize("offset", [0, 3])
def test_the_layout_is_what_a_loop_gives(offset):
    chooser = random.Random(0)
    for _ in range(80):
        batch, length = chooser.randint(1, 4), chooser.randint(1, 9)
        rows = []
        for _ in range(batch):
            lengths, left = [], length
            while left:
                lengths.append(chooser.randint(1, left))
                left -= lengths[-1]
            rows.append(lengths)
        slots = chooser.randint(1, 5)
        prompts = [chooser.randint(0, slots) for _ in rows]
        prompts[chooser.randrange(batch)] = slots
        positions = torch.tensor([[offset + i for n in lengths for i in range(n)] for lengths in rows], device=DEVICE)
        numbers = torch.tensor(
            [[s for s, n in enumerate(lengths, 1) for _ in range(n)] for lengths in rows], device=DEVICE
        )
        longest = max(sum(lengths) + prompt * len(lengths) for lengths, prompt in zip(rows, prompts, strict=True))
        lengths_of_prompts = torch.tensor(prompts, device=DEVICE)[:, None]
        layout = PackedLayout.of(numbers, positions, slots, lengths_of_prompts, longest)
        x = torch.arange(100, 100 + length, device=DEVICE).expand(batch, -1)
        prompt = torch.tensor([[0] * (slots - k) + [-i - 1 for i in range(k)] for k in prompts], device=DEVICE)
        places, wanted_positions = naive_rows(rows, prompts, offset)
        joined = layout.join(prompt, x).tolist()
        for got, want in zip(joined, places, strict=True):
            assert [g for g, w in zip(got, want, strict=True) if w is not None] == [w for w in want if w is not None]
        assert layout.positions.tolist() == wanted_positions
        axes = torch.stack([positions, 2 * positions])
        moved = PackedLayout.of(numbers, axes, slots, lengths_of_prompts, longest).positions
        assert torch.equal(moved[0], layout.positions)
        assert torch.equal(layout.remove(moved[1]), 2 * positions + lengths_of_prompts)
        assert torch.equal(layout.remove(layout.join(prompt, x)), x)
        three = layout.join(prompt[..., None].expand(-1, -1, 3), x[..., None].expand(-1, -1, 3))
        assert torch.equal(layout.remove(three)[..., 1], x)
        if len(set(prompts)) == 1:
            same = PackedLayout.of(numbers, positions, slots, None, longest)
            assert torch.equal(same.join(prompt, x), layout.join(prompt, x))


def test_bounds_and_positions_of_a_row():
    for lengths in ([5, 1, 7], [1, 1], [4]):
        bounds = torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)
        positions = places_in_sequences(numbers_of(bounds, sum(lengths)))
        assert positions.tolist() == [[i for n in lengths for i in range(n)]]
        longer = torch.tensor([0, *(n + 3 for n in lengths)], dtype=torch.int32, device=DEVICE)
        assert torch.equal(moved_bounds(bounds, 3), longer.cumsum(0, dtype=torch.int32))


# ---- models ---------------------------------------------------------------------------------------------------------


ATTENTIONS = [(f, a) for f in PACKING for a in ("sdpa", "eager") if (f.name, a) != ("gemma2", "sdpa")]  # it has none


@pytest.mark.trains_with(
    "Packed and padding-free rows", "each sequence is what it gives alone: eager and sdpa, by positions"
)
@pytest.mark.feature("packing")
@pytest.mark.parametrize(("family", "attention"), ATTENTIONS, ids=lambda x: str(x))
@pytest.mark.parametrize("use_cache", [None, False])
def test_each_sequence_is_what_it_gives_alone(family, attention, use_cache):
    model, base, weights = adapted(family)
    model.get_base_model().set_attn_implementation(attention)
    sequences = sequences_of([5, 1, 7])
    row, positions = pack(sequences)
    out = model(input_ids=row, position_ids=positions, use_cache=use_cache, output_hidden_states=True)
    assert out.logits.shape[1] == row.shape[1]
    assert {state.shape[1] for state in out.hidden_states} == {row.shape[1]}
    start = 0
    for sequence in sequences:
        want = row_output(base, weights, sequence)
        assert_close(out.logits[0, start : start + len(sequence)], want, atol=2e-4, rtol=1e-3)
        start += len(sequence)


@each
def test_rows_with_different_numbers_of_sequences(family):
    model, base, weights = adapted(family)
    rows = [
        pack(sequences_of(lengths + [13 - sum(lengths)] * (sum(lengths) < 13), seed=10 * i))
        for i, lengths in enumerate(LENGTHS)
    ]
    row, positions = (torch.cat(parts) for parts in zip(*rows, strict=True))
    logits = model(input_ids=row, position_ids=positions).logits
    for i in range(len(rows)):
        starts = [*(positions[i] == 0).nonzero().flatten().tolist(), row.shape[1]]
        for start, end in pairwise(starts):
            want = row_output(base, weights, row[i, start:end])
            assert_close(logits[i, start:end], want, atol=2e-4, rtol=1e-3)


@pytest.mark.trains_with("Packed and padding-free rows", "loss and gradients are those of the padded batch")
@pytest.mark.feature("packing")
@each
def test_loss_and_gradients_are_those_of_the_padded_batch(family):
    """The sequences once in one row and once as rows of a padded batch."""
    sequences = sequences_of([5, 3, 7])
    features = [{"input_ids": s.tolist()} for s in sequences]
    flat = DataCollatorWithFlattening(return_tensors="pt")(features)
    longest = max(map(len, sequences))
    padded = torch.stack([torch.nn.functional.pad(s, (0, longest - len(s))) for s in sequences])
    mask = torch.stack([torch.arange(longest, device=DEVICE) < len(s) for s in sequences]).long()
    results = []
    for batch in (flat, {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}):
        model, *_ = adapted(family)
        model.train()
        loss = model(**on_device(batch)).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss, gradients), (want, wanted) = results
    assert_close(loss, want, atol=1e-5, rtol=1e-4)
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, name
        assert_close(gradients[name], gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.trains_with("Packed and padding-free rows", "rows with adapters of their own")
@each
def test_rows_with_adapters_of_their_own(family):
    model, base, weights = adapted(family)
    others = {"default": weights, "longer": add(model, "longer", seed=5, num_virtual_tokens=6), "__base__": {}}
    names = ["default", "longer", "__base__"]
    rows = [pack(sequences_of(lengths, seed=i)) for i, lengths in enumerate(([4, 5], [2, 3, 4], [1, 8]))]
    row, positions = (torch.cat(parts) for parts in zip(*rows, strict=True))
    logits = model(input_ids=row, position_ids=positions, adapter_names=names).logits
    for i, name in enumerate(names):
        starts = [*(positions[i] == 0).nonzero().flatten().tolist(), row.shape[1]]
        for start, end in pairwise(starts):
            want = row_output(base, others[name], row[i, start:end])
            assert_close(logits[i, start:end], want, atol=2e-4, rtol=1e-3)


@pytest.mark.trains_with("Packed and padding-free rows", "gradient checkpointing")
@each
def test_gradient_checkpointing(family):
    row, positions = pack(sequences_of([5, 3]))
    gradients = []
    for checkpointing in (False, True):
        model, *_ = adapted(family)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=row, position_ids=positions, labels=row).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for got, want in zip(*gradients, strict=True):
        assert_close(got, want)


@pytest.mark.trains_with(
    "Packed and padding-free rows", "flash attention's cu_seq_lens are rewritten (the arguments; no kernel on a CPU)"
)
def test_flash_attention_arguments_are_rewritten():
    """Without flash attention here: what reaches the backbone's layers is looked at."""
    model, base, weights = adapted(LLAMA)
    sequences = sequences_of([3, 5])
    row, positions = pack(sequences)
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32, device=DEVICE)
    seen = {}
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 5, "max_length_k": 5}
    for more in ({"position_ids": positions}, {}):
        logits = model(input_ids=row, **packed, **more).logits
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            assert seen[name].tolist() == [0, 7, 16]
            assert seen[name].dtype == torch.int32
        assert (seen["max_length_q"], seen["max_length_k"]) == (9, 9)
        assert seen["position_ids"].tolist() == [[*range(7), *range(9)]]
        assert_close(logits[0, 3:], row_output(base, weights, sequences[1]), atol=2e-4, rtol=1e-3)


@each
@pytest.mark.parametrize("given", ["mask", "cache"])
def test_a_mask_or_a_cache_says_that_a_row_is_one_sequence(family, given):
    """As in transformers, whose mask is a plain causal one then: the base with the prompt in front of the row."""
    model, base, weights = adapted(family)
    row, positions = pack(sequences_of([3, 2]))
    more = {"attention_mask": torch.ones_like(row)} if given == "mask" else {"use_cache": True}
    if given == "cache":
        more[cache_name(forward_parameters(base))] = DynamicCache(config=base.config)
    x = embed(base, weights, row[0])
    moved = torch.cat([torch.arange(4, device=DEVICE)[None], positions + 4], dim=1)
    with torch.no_grad():
        want = base(inputs_embeds=x, position_ids=moved, attention_mask=torch.ones_like(moved)).logits[:, 4:]
        got = model(input_ids=row, position_ids=positions, **more).logits
    assert_close(got, want, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("offset", [0, 10])
@torch.no_grad()
def test_bounds_tell_sequences_and_the_callers_positions_stay(offset):
    """GPT-2's table of positions: the second sequence begins where the caller says."""
    model, base, weights = adapted(FAMILIES["gpt2"])
    sequences = sequences_of([5, 7])
    row, _ = pack(sequences)
    of_each = [torch.arange(5, device=DEVICE), torch.arange(7, device=DEVICE) + offset]
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32, device=DEVICE)
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 7, "max_length_k": 7}
    logits = model(input_ids=row, position_ids=torch.cat(of_each)[None], use_cache=False, **packed).logits[0]
    for part, sequence, positions in zip(logits.split([5, 7]), sequences, of_each, strict=True):
        moved = torch.cat([positions[:1] + torch.arange(4, device=DEVICE), positions + 4])[None]
        mask = torch.ones_like(moved)
        want = base(inputs_embeds=embed(base, weights, sequence), position_ids=moved, attention_mask=mask).logits
        assert_close(part, want[0, 4:], atol=2e-4, rtol=1e-3)


def test_what_the_caller_passes_stays_as_it_is():
    model, *_ = adapted(LLAMA)
    row, positions = pack(sequences_of([3, 5]))
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32, device=DEVICE)
    longest = bounds.diff().max()
    batch = {"input_ids": row, "position_ids": positions, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    batch |= {"max_length_q": longest, "max_length_k": longest}
    before = {name: value.clone() for name, value in batch.items()}
    model(**batch)
    for name, value in batch.items():
        assert torch.equal(value, before[name]), name


def test_numbers_of_sequences_alone_are_refused():
    """Attention would not know of them; the state-space layers alone would."""
    model, *_ = adapted(LLAMA)
    numbers = torch.tensor([[0, 0, 1, 1, 1]], device=DEVICE)
    with pytest.raises(ValueError, match="`seq_idx` came alone"):
        model(input_ids=ids(1, 5), seq_idx=numbers)


def test_bounds_that_end_before_the_row():
    """What is behind them goes with the last sequence; no place is out of the row."""
    model, base, weights = adapted(LLAMA)
    row = ids(1, 9)
    bounds = torch.tensor([0, 4, 6], dtype=torch.int32, device=DEVICE)
    logits = model(input_ids=row, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=4, max_length_k=4).logits
    assert_close(logits[0, :4], row_output(base, weights, row[0, :4]), atol=2e-4, rtol=1e-3)
    assert_close(logits[0, 4:], row_output(base, weights, row[0, 4:]), atol=2e-4, rtol=1e-3)


def test_bounds_beside_a_batch_of_rows():
    model, base, weights = adapted(LLAMA)
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="`cu_seq_lens_q` describes one row, got a batch of 2"):
        model(input_ids=ids(2, 5), cu_seq_lens_q=bounds)
    positions = torch.tensor([[0, 1, 2, 0, 1]], device=DEVICE)
    logits = model(input_ids=ids(2, 5), cu_seq_lens_q=bounds, position_ids=positions).logits
    assert_close(logits[1, 3:], row_output(base, weights, ids(2, 5)[1, 3:]), atol=2e-4, rtol=1e-3)


def test_bounds_in_a_compiled_model():
    """They say on the host how many sequences there are; positions alone would have to be looked at."""
    model, base, weights = adapted(LLAMA)
    sequences = sequences_of([3, 5])
    row, _ = pack(sequences)
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32, device=DEVICE)
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 5, "max_length_k": 5}
    with torch.no_grad():
        logits = compiled(input_ids=row, use_cache=False, **packed).logits
    for part, sequence in zip(logits[0].split([3, 5]), sequences, strict=True):
        assert_close(part, row_output(base, weights, sequence), atol=2e-4, rtol=1e-3)


def test_numbers_of_sequences_are_spread():
    model, *_ = adapted(LLAMA)
    seen = {}
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    row, positions = pack(sequences_of([2, 3]))
    model(input_ids=row, position_ids=positions, seq_idx=torch.tensor([[0, 0, 1, 1, 1]], device=DEVICE))
    assert seen["seq_idx"].tolist() == [[0] * 6 + [1] * 7]


def test_a_packed_batch_of_a_single_sequence():
    """What tells the sequences of a row apart says nothing then, and is of the caller's length."""
    model, base, weights = adapted(LLAMA)
    seen = {}
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    features = [{"input_ids": ids(7).tolist()}]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt")
    batch = on_device(collate(features))
    batch.pop("labels")
    assert {"seq_idx", "cu_seq_lens_q"} <= set(batch)
    assert_close(model(**batch, use_cache=False).logits[0], row_output(base, weights, ids(7)), atol=2e-4, rtol=1e-3)
    assert not {"seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"} & set(seen)


def test_positions_that_leave_some_out_start_a_sequence_where_the_model_says_so():
    """Without a mask and a cache, transformers takes a gap for the start of a new sequence."""
    model, base, weights = adapted(LLAMA)
    row, positions = ids(1, 5), torch.tensor([[0, 1, 7, 8, 9]], device=DEVICE)
    alone = base(input_ids=row[:, 2:], position_ids=positions[:, 2:], use_cache=False).logits
    assert_close(base(input_ids=row, position_ids=positions, use_cache=False).logits[:, 2:], alone)
    got = model(input_ids=row, position_ids=positions, use_cache=False).logits[0]
    assert_close(got[2:], row_output(base, weights, row[0, 2:]), atol=2e-4, rtol=1e-3)  # rotary: differences count
    assert_close(got[:2], row_output(base, weights, row[0, :2]), atol=2e-4, rtol=1e-3)


def test_an_adapter_without_a_prompt_is_the_models_own_business():
    model, *_ = adapted(LLAMA, num_virtual_tokens=0)
    sequences = sequences_of([3, 5])
    row, positions = pack(sequences)
    packed = model(input_ids=row, position_ids=positions, use_cache=False).logits
    assert_close(packed[:, 3:], model(input_ids=sequences[1][None]).logits, atol=2e-4, rtol=1e-3)


def test_packed_rows_are_exact_where_the_base_model_s_are():
    """The oracle's own oracle: the untouched base model keeps packed sequences apart too."""
    base = build(LLAMA)
    sequences = sequences_of([3, 5])
    row, positions = pack(sequences)
    packed = base(input_ids=row, position_ids=positions, use_cache=False).logits
    assert_close(packed[0, 3:], base(input_ids=sequences[1][None]).logits[0], atol=2e-4, rtol=1e-3)
