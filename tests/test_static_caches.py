"""Caches of a fixed size hold the prompt like others: started and continued by hand, reset, read by processors."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers import LogitsProcessor, LogitsProcessorList

from adapters import adapted, add
from families import FAMILIES, PAD, UNPADDED_STATIC_CACHE, ids, padded
from oracles import greedy, row_output
from peft_input_tuning.virtual_tokens.backbone import forward_parameters
from peft_input_tuning.virtual_tokens.cache_mark import cache_name

LLAMA = FAMILIES["llama"]
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}
NEW = 5
OPTIONS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
each_decoder = pytest.mark.parametrize("family", UNPADDED_STATIC_CACHE, ids=str)


def static(base, places: int = 64) -> transformers.StaticCache:
    return transformers.StaticCache(config=base.config, max_cache_len=places)


def on(model, cache) -> dict:
    return {cache_name(forward_parameters(model.get_base_model())): cache}


def generate(model, **inputs):
    return model.generate(**inputs, **OPTIONS, disable_compile=True)


@torch.no_grad()
@each_decoder
def test_by_hand_from_the_start(family):
    model, base, weights = adapted(family)
    cache, row = static(base), ids(9)
    found = [
        model(input_ids=row[None, start:end], use_cache=True, **on(model, cache)).logits
        for start, end in ((0, 5), (5, 6), (6, 9))
    ]
    assert_close(torch.cat(found, dim=1)[0], row_output(base, weights, row), **TOLERANCE)


@torch.no_grad()
@each_decoder
def test_continued_by_hand_after_generate(family):
    model, base, weights = adapted(family)
    cache, row = static(base), ids(7)
    out = generate(model, input_ids=row[None], **on(model, cache))
    assert torch.equal(out[0, 7:], greedy(base, weights, row, NEW))
    whole = torch.cat([out[0], ids(2, seed=4)])
    rest = model(input_ids=whole[None, 11:], use_cache=True, **on(model, cache)).logits
    assert_close(rest[0], row_output(base, weights, whole)[11:], **TOLERANCE)


@each_decoder
def test_reset_and_used_again(family):
    model, base, weights = adapted(family)
    cache = static(base)
    for seed in (7, 8):
        row = ids(7, seed=seed)
        out = generate(model, input_ids=row[None], **on(model, cache))
        assert torch.equal(out[0, 7:], greedy(base, weights, row, NEW))
        cache.reset()
    with model.disable_adapter():
        out = generate(model, input_ids=row[None], **on(model, cache))
    assert torch.equal(out, generate(base, input_ids=row[None]))


@each_decoder
def test_a_conversation(family):
    """All ids again, on the cache that holds the first turn."""
    model, base, weights = adapted(family)
    cache, row = static(base), ids(7)
    first = generate(model, input_ids=row[None], **on(model, cache))
    whole = torch.cat([first[0], ids(3, seed=5)])
    second = generate(model, input_ids=whole[None], **on(model, cache))
    assert torch.equal(second[0, len(whole) :], greedy(base, weights, whole, NEW))


@each_decoder
def test_hidden_states_and_logits_have_the_caller_s_length(family):
    model, base, weights = adapted(family)
    batch, mask = padded([ids(7), ids(4, seed=1)], "left")
    options = {"return_dict_in_generate": True, "output_hidden_states": True, "output_logits": True}
    out = model.generate(
        input_ids=batch,
        attention_mask=mask,
        cache_implementation="static",
        disable_compile=True,
        **options,
        **OPTIONS,
    )
    assert [states[-1].shape[1] for states in out.hidden_states] == [7, 1, 1, 1, 1]
    for i, row in enumerate((ids(7), ids(4, seed=1))):
        assert_close(out.logits[0][i], row_output(base, weights, row)[-1], **TOLERANCE)
        assert torch.equal(out.sequences[i, 7:], greedy(base, weights, row, NEW))


class Asks(LogitsProcessor):
    """Calls the model in between, as contrastive and guided decoding do."""

    def __init__(self, model) -> None:
        self.model, self.seen = model, []

    def __call__(self, input_ids, scores):
        with torch.no_grad():
            self.seen.append(self.model(input_ids=input_ids, use_cache=False).logits[:, -1])
        return scores


@each_decoder
def test_a_processor_that_calls_the_model(family):
    model, base, weights = adapted(family)
    asks, row = Asks(model), ids(7)
    processors = LogitsProcessorList([asks])
    out = generate(model, input_ids=row[None], cache_implementation="static", logits_processor=processors)
    assert torch.equal(out[0, 7:], greedy(base, weights, row, NEW))
    for step, logits in enumerate(asks.seen):
        assert_close(logits[0], row_output(base, weights, out[0, : 7 + step])[-1], **TOLERANCE)


SETTINGS = {"guidance_scale": 2.0, "encoder_repetition_penalty": 3.0, "encoder_no_repeat_ngram_size": 1}
SETTINGS |= {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_that_read_the_input(setting):
    """The same tokens as with a dynamic cache."""
    model, _, _ = adapted(LLAMA)
    more = {setting: SETTINGS[setting]}
    out = generate(model, input_ids=ids(1, 7), cache_implementation="static", **more)
    assert torch.equal(out, generate(model, input_ids=ids(1, 7), **more))
    if not setting.startswith("encoder_no"):  # the input's tokens are not repeated here as it is
        assert not torch.equal(out, generate(model, input_ids=ids(1, 7)))


@each_decoder
def test_a_bare_base_model_makes_room(family):
    model, base, weights = adapted(family)
    row = ids(7)
    out = generate(model.get_base_model(), input_ids=row[None], cache_implementation="static")
    assert torch.equal(out[0, 7:], greedy(base, weights, row, NEW))


@each_decoder
def test_two_prompts_by_hand(family):
    model, base, weights = adapted(family)
    other = add(model, "other", seed=3, num_virtual_tokens=6)
    model.eval()
    cache, rows = static(base), ids(2, 8)
    names = ["other", "default"]
    with torch.no_grad():
        found = [
            model(input_ids=rows[:, start:end], use_cache=True, adapter_names=names, **on(model, cache)).logits
            for start, end in ((0, 5), (5, 6), (6, 8))
        ]
    for i, mine in enumerate((other, weights)):
        assert_close(torch.cat(found, dim=1)[i], row_output(base, mine, rows[i]), **TOLERANCE)


@torch.no_grad()
def test_reset_after_compiled_calls():
    """A compiled call cannot change the class of the cache that it fills."""
    model, base, weights = adapted(LLAMA)
    compiled, cache = torch.compile(model, backend="eager"), static(base)
    for seed in (0, 1):
        row = ids(8, seed=seed)
        found = [compiled(input_ids=row[None, at], **on(model, cache)).logits for at in (slice(0, 7), slice(7, 8))]
        assert_close(torch.cat(found, dim=1)[0], row_output(base, weights, row), **TOLERANCE)
        cache.reset()


def test_a_cache_with_room_for_the_tokens_alone_is_refused_by_generate_before_it_starts():
    model, base, _ = adapted(LLAMA)
    row, slots = ids(7), model.get_base_model().get_input_embeddings().slots
    places = 7 + NEW - 1 + slots
    with pytest.raises(ValueError, match=rf"of {places - 1} places, and the tokens and virtual tokens take {places}"):
        generate(model, input_ids=row[None], **on(model, static(base, places - 1)))
    assert generate(model, input_ids=row[None], **on(model, static(base, places))).shape == (1, 7 + NEW)
