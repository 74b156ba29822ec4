"""Generation: whatever the decoding, the tokens are those of a hand-written loop without a cache, row by row."""

from __future__ import annotations

import copy
import pickle
from types import MethodType

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
)

from adapters import adapted, add
from device import DEVICE
from families import DECODERS, FAMILIES, GENERATORS, PAD, SEQ2SEQ, UNPADDED_STATIC_CACHE, ids, padded
from oracles import adapter_weights, greedy, row_output
from peft_input_tuning.virtual_tokens.backbone import has_window

NEW = 6
ROWS = [7, 4, 9]

each_generator = pytest.mark.parametrize("family", GENERATORS, ids=str)
each_decoder = pytest.mark.parametrize("family", DECODERS, ids=str)
each_seq2seq = pytest.mark.parametrize("family", SEQ2SEQ, ids=str)


def rows_of(lengths=ROWS) -> list[torch.Tensor]:
    return [ids(n, seed=n) for n in lengths]


def batch_for(family, lengths=ROWS):
    """Decoder-only models generate from left-padded rows, encoders read right-padded ones."""
    batch, mask = padded(rows_of(lengths), "right" if family.kind == "seq2seq" else "left")
    return {"input_ids": batch, "attention_mask": mask}


def cache_in(output):
    """By the name that it has in this version of transformers."""
    return output["cache"] if "cache" in output else output["past_key_values"]


def mask_of(row):
    return torch.ones(1, len(row), dtype=torch.long, device=DEVICE)


def new_tokens(family, output, inputs):
    start = 1 if family.kind == "seq2seq" else inputs["input_ids"].shape[1]
    return output[:, start:]


def generate(model, **kwargs):
    return model.generate(
        **{"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, **kwargs}
    )


def expected(base, weights, lengths=ROWS, new=NEW):
    return torch.stack([greedy(base, weights, row, new) for row in rows_of(lengths)])


@pytest.mark.feature("generate")
@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cache", "no cache"])
@each_generator
def test_greedy_padded_batch(family, options):
    model, base, weights = adapted(family)
    inputs = batch_for(family)
    out = generate(model, **inputs, **options)
    assert torch.equal(new_tokens(family, out, inputs), expected(base, weights))


@pytest.mark.feature("generate")
@pytest.mark.parametrize("adapter", [{"adapter_hidden_dim": 0}, {"num_virtual_tokens": 0}], ids=["prompt", "adapter"])
@each_generator
def test_greedy_with_one_of_the_two_parts(family, adapter):
    model, base, weights = adapted(family, **adapter)
    inputs = batch_for(family)
    assert torch.equal(new_tokens(family, generate(model, **inputs), inputs), expected(base, weights))


@pytest.mark.feature("generate")
@each_generator
def test_greedy_through_the_bare_model(family):
    """Nothing depends on PEFT's wrapper: the model with hooks generates the same."""
    model, base, weights = adapted(family)
    inputs = batch_for(family)
    out = generate(model.get_base_model(), **inputs)
    assert torch.equal(new_tokens(family, out, inputs), expected(base, weights))


@pytest.mark.feature("generate")
@each_decoder
def test_without_a_mask_and_from_embeddings(family):
    model, base, weights = adapted(family)
    row = ids(7, seed=7)
    want = greedy(base, weights, row, NEW)
    assert torch.equal(generate(model, input_ids=row[None])[0, 7:], want)
    x = model.get_input_embeddings()(row[None])
    assert torch.equal(generate(model, inputs_embeds=x)[0], want)


def beam_search(base, weights, row, beams, new, family):
    """All beams scored by full forward passes; no end token, so the best sum of log-probabilities wins."""
    hypotheses = [([], 0.0)]
    for _ in range(new):
        grown = []
        for tokens, score in hypotheses:
            if family.kind == "seq2seq":
                start = torch.tensor([[base.config.decoder_start_token_id, *tokens]], device=DEVICE)
                logits = row_output(base, weights, row, decoder_input_ids=start)
            else:
                logits = row_output(base, weights, torch.cat([row, row.new_tensor(tokens)]))
            for token, value in enumerate(logits[-1].log_softmax(-1).tolist()):
                grown.append(([*tokens, token], score + value))
        hypotheses = sorted(grown, key=lambda pair: -pair[1])[:beams]
    return torch.tensor(hypotheses[0][0], device=DEVICE)


@pytest.mark.feature("beams")
@each_generator
def test_beam_search(family):
    model, base, weights = adapted(family)
    inputs = batch_for(family)
    out = new_tokens(family, generate(model, **inputs, num_beams=3), inputs)
    want = torch.stack([beam_search(base, weights, row, 3, NEW, family) for row in rows_of()])
    assert torch.equal(out, want)


@pytest.mark.feature("sampling")
@each_generator
def test_sampling_with_several_returns_is_the_seeded_loop(family):
    """Sampling draws for the whole batch at once, so the loop here keeps the batch and drops only the cache."""
    model, base, weights = adapted(family)
    inputs = batch_for(family)
    torch.manual_seed(3)
    options = {"do_sample": True, "top_k": 0, "temperature": 2.0, "num_return_sequences": 2}
    out = new_tokens(family, generate(model, **inputs, **options), inputs)
    torch.manual_seed(3)
    tokens = [[] for _ in range(2 * len(ROWS))]
    repeated = [row for row in rows_of() for _ in range(2)]
    for _ in range(NEW):
        last = []
        for row, new in zip(repeated, tokens, strict=True):
            if family.kind == "seq2seq":
                start = torch.tensor([[base.config.decoder_start_token_id, *new]], device=DEVICE)
                last.append(row_output(base, weights, row, decoder_input_ids=start)[-1])
            else:
                last.append(row_output(base, weights, torch.cat([row, row.new_tensor(new)]))[-1])
        drawn = torch.multinomial((torch.stack(last) / 2.0).softmax(-1), 1).squeeze(1)
        for new, token in zip(tokens, drawn.tolist(), strict=True):
            new.append(token)
    assert torch.equal(out, torch.tensor(tokens, device=DEVICE))


@pytest.mark.feature("static cache")
@each_generator
def test_static_cache(family):
    model, base, weights = adapted(family)
    inputs = batch_for(family)
    out = generate(model, **inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(new_tokens(family, out, inputs), expected(base, weights))
    if family.kind == "decoder":
        assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


@pytest.mark.feature("static cache")
@pytest.mark.parametrize("family", UNPADDED_STATIC_CACHE, ids=str)
def test_static_cache_counts_lengths_as_the_caller_does(family):
    model, base, weights = adapted(family)
    row = ids(7, seed=7)
    options = {"cache_implementation": "static", "disable_compile": True, "do_sample": False, "pad_token_id": PAD}
    out = model.generate(input_ids=row[None], max_length=10, min_length=10, **options)
    assert out.shape[1] == 10
    assert torch.equal(out[0, 7:], greedy(base, weights, row, 3))


@pytest.mark.feature("prompt lookup")
@each_decoder
def test_prompt_lookup(family):
    model, base, weights = adapted(family)
    row = ids(7, seed=7).repeat(2)  # something to look up
    out = generate(model, input_ids=row[None], max_new_tokens=12, min_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(out[0, 14:], greedy(base, weights, row, 12))


@pytest.mark.feature("assisted")
@pytest.mark.parametrize("prompt_of_assistant", [None, 0, 5], ids=["plain", "adapter alone", "prompt"])
@each_decoder
def test_assistant_model(family, prompt_of_assistant):
    model, base, weights = adapted(family)
    row = ids(7, seed=7)
    assistant = copy.deepcopy(base)
    if prompt_of_assistant is not None:
        assistant = adapted(family, num_virtual_tokens=prompt_of_assistant)[0].get_base_model()
    out = generate(model, input_ids=row[None], max_new_tokens=12, min_new_tokens=12, assistant_model=assistant)
    assert torch.equal(out[0, 7:], greedy(base, weights, row, 12))


@pytest.mark.feature("assisted")
@each_decoder
def test_names_of_rows_are_not_meant_for_the_assistant(family):
    """The assistant runs inside the call, with adapters of its own under the same or other names."""
    model, base, _ = adapted(family)
    second = add(model, "b", seed=2, num_virtual_tokens=6)
    assistant = adapted(family, num_virtual_tokens=0)[0].get_base_model()
    row = ids(7, seed=7)
    model.eval()
    out = generate(
        model,
        input_ids=row[None],
        max_new_tokens=12,
        min_new_tokens=12,
        assistant_model=assistant,
        adapter_names=["b"],
    )
    assert torch.equal(out[0, 7:], greedy(base, second, row, 12))


@pytest.mark.feature("chunked prefill")
@pytest.mark.parametrize("chunk", [3, 4])
@each_decoder
def test_prefill_in_chunks(family, chunk):
    """Chunks longer than the left pads; a chunk of nothing but pads has its own test."""
    model, base, weights = adapted(family)
    lengths = [9, 8, 7]
    inputs = batch_for(family, lengths)
    out = generate(model, **inputs, prefill_chunk_size=chunk)
    assert torch.equal(new_tokens(family, out, inputs), expected(base, weights, lengths))


@pytest.mark.feature("chunked prefill")
@each_decoder
def test_a_first_chunk_of_nothing_but_pads(family):
    """The prompt then stands before the rest of the pads: right, but where attention counts places."""
    model, base, weights = adapted(family)
    lengths = [12, 3, 2]
    inputs = batch_for(family, lengths)
    if base.config.get_text_config().to_dict().get("sliding_window"):
        with pytest.raises(ValueError, match="`prefill_chunk_size` is smaller than the left padding"):
            generate(model, **inputs, prefill_chunk_size=4)
    else:
        out = generate(model, **inputs, prefill_chunk_size=4)
        assert torch.equal(new_tokens(family, out, inputs), expected(base, weights, lengths))


@pytest.mark.feature("generate")
@each_generator
def test_scores_and_hidden_states_are_returned(family):
    model, base, weights = adapted(family)
    inputs = batch_for(family)
    options = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    out = generate(model, **inputs, **options)
    sequences = new_tokens(family, out.sequences, inputs)
    assert torch.equal(sequences, expected(base, weights))
    for i, row in enumerate(rows_of()):
        if family.kind == "seq2seq":
            start = torch.tensor([[base.config.decoder_start_token_id, *sequences[i, :-1].tolist()]], device=DEVICE)
            want = row_output(base, weights, row, decoder_input_ids=start)
        else:
            want = row_output(base, weights, torch.cat([row, sequences[i, :-1]]))[len(row) - 1 :]
        assert_close(torch.stack([logits[i] for logits in out.logits]), want, atol=3e-4, rtol=1e-3)
    states = out.encoder_hidden_states[0] if family.kind == "seq2seq" else out.hidden_states[0][0]
    assert states.shape[1] == inputs["input_ids"].shape[1]


@pytest.mark.feature("generate")
@each_decoder
def test_going_on_from_a_returned_cache_with_new_tokens_only(family):
    model, base, weights = adapted(family)
    row, more = ids(7, seed=7), ids(3, seed=11)
    first = model(input_ids=row[None], use_cache=True)
    out = generate(
        model,
        input_ids=more[None],
        attention_mask=torch.ones(1, 10, dtype=torch.long, device=DEVICE),
        past_key_values=first.past_key_values,
    )
    assert torch.equal(out[0, 3:], greedy(base, weights, torch.cat([row, more]), NEW))


@pytest.mark.feature("generate")
@pytest.mark.parametrize("new", [1, 2, 5, 9])
@each_decoder
def test_full_ids_on_a_returned_cache(family, new):
    """The usual loop of a conversation: `generate` cuts the ids by the cache's length, which counts the caller's."""
    model, base, weights = adapted(family)
    row, more = ids(7, seed=7), ids(new, seed=11)
    whole = torch.cat([row, more])[None]
    for caller in (model, model.get_base_model()):
        cache = cache_in(model(input_ids=row[None], use_cache=True))
        assert cache.get_seq_length() == 7
        out = generate(caller, input_ids=whole, past_key_values=cache)
        assert torch.equal(out[0, whole.shape[1] :], greedy(base, weights, whole[0], NEW))


@pytest.mark.feature("generate")
@pytest.mark.parametrize("copied", [False, "deepcopy", "pickle"])
@each_decoder
def test_one_cache_for_a_conversation(family, copied):
    model, base, weights = adapted(family)
    cache, history = DynamicCache(config=base.config), ids(0)
    for turn in range(3):
        history = torch.cat([history, ids(4 + turn, seed=turn)])
        # With a mask, or `generate` would take generated tokens for padding.
        out = generate(model, input_ids=history[None], attention_mask=mask_of(history), past_key_values=cache)[0]
        assert torch.equal(out[len(history) :], greedy(base, weights, history, NEW))
        history = out
        if copied:
            cache = copy.deepcopy(cache) if copied == "deepcopy" else pickle.loads(pickle.dumps(cache))
        assert isinstance(cache, DynamicCache)


@each_decoder
def test_new_ids_that_do_not_fit_the_mask(family):
    """Where the mask is longer than the ids, these follow what the cache holds."""
    model, _, _ = adapted(family)
    cache = cache_in(model(input_ids=ids(1, 7), use_cache=True))
    mask = torch.ones(1, 10, dtype=torch.long, device=DEVICE)
    with pytest.raises(ValueError, match="has 10 places, but the cache holds 7 tokens and 5 more are passed"):
        generate(model, input_ids=ids(1, 5), attention_mask=mask, past_key_values=cache)


@each_decoder
def test_a_cache_tells_tokens_again_after_an_error(family):
    model, _, _ = adapted(family)
    cache = cache_in(model(input_ids=ids(1, 7), use_cache=True))
    with pytest.raises(ValueError, match="`attention_mask` has 3 places, but the cache holds 7 tokens and 1 more"):
        model(input_ids=ids(1, 1), attention_mask=torch.ones(1, 3, device=DEVICE), past_key_values=cache)
    assert cache.get_seq_length() == 7


@each_decoder
def test_a_marked_cache_is_for_models_that_know_of_the_prompt(family):
    model, base, _ = adapted(family)
    row = ids(9)
    cache = cache_in(model(input_ids=row[None, :7], use_cache=True))
    with pytest.raises(ValueError, match="The cache holds 4 virtual tokens, and a model without input-tuning goes on"):
        base(input_ids=row[None, 7:], past_key_values=cache)
    with model.disable_adapter():
        model(input_ids=row[None, 7:8], past_key_values=cache)
    assert cache.get_seq_length() == 8
    if not has_window(base):  # a cache with a window cannot be cropped
        cache.crop(-12)
        want = base(input_ids=row[None]).logits
        assert torch.equal(base(input_ids=row[None], past_key_values=cache).logits, want)


@pytest.mark.parametrize("family", [f for f in DECODERS if "mistral" not in f.name and "gemma" not in f.name], ids=str)
def test_caches_that_were_cropped(family):
    """Down to the prompt is a new start; less of it is refused."""
    model, base, weights = adapted(family)
    row = ids(7, seed=7)
    cache = cache_in(model(input_ids=row[None], use_cache=True))
    cache.crop(-4)
    assert torch.equal(
        generate(model, input_ids=row[None], past_key_values=cache)[0, 7:], greedy(base, weights, row, NEW)
    )
    cache = cache_in(model(input_ids=row[None], use_cache=True))
    cache.crop(-9)
    with pytest.raises(ValueError, match="The cache was cropped to 2 places, but its first 4 are virtual tokens"):
        model(input_ids=row[None], past_key_values=cache)
    cache.crop(-2)
    assert torch.equal(
        generate(model, input_ids=row[None], past_key_values=cache)[0, 7:], greedy(base, weights, row, NEW)
    )


@each_decoder
def test_a_cache_of_the_bare_model_passes_untouched(family):
    """A cache that was filled with the adapter off holds no prompt, and none is put behind it."""
    model, base, weights = adapted(family)
    row, more = ids(7, seed=7), ids(3, seed=11)
    with model.disable_adapter():
        first = model(input_ids=row[None], use_cache=True)
    out = model(input_ids=more[None], past_key_values=first.past_key_values)
    with torch.no_grad():
        first = base(input_ids=row[None], use_cache=True)
        from oracles import transform

        x = transform(weights, base.get_input_embeddings()(more[None]))
        want = base(inputs_embeds=x, past_key_values=first.past_key_values)
    assert_close(out.logits, want.logits, atol=2e-4, rtol=1e-3)


@each_decoder
def test_switching_the_adapter_off_behind_its_own_prompt(family):
    """The cache still holds the prompt then, and masks must still know of it."""
    model, base, weights = adapted(family)
    batch, mask = padded([ids(7, seed=7), ids(4, seed=4)], "left")
    first = model(input_ids=batch, attention_mask=mask, use_cache=True)
    more = ids(2, 1, seed=5)
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long, device=DEVICE)], 1)
    positions = (mask.cumsum(-1) - 1)[:, -1:]
    given = {} if family.name == "bloom" else {"position_ids": positions}
    first = model(
        input_ids=batch,
        attention_mask=mask[:, :-1],
        use_cache=True,
        **({} if family.name == "bloom" else {"position_ids": (mask[:, :-1].cumsum(-1) - 1).clamp(min=0)}),
    )
    with model.disable_adapter():
        out = model(input_ids=more, attention_mask=mask, past_key_values=first.past_key_values, **given)
    from oracles import embed

    for i, row in enumerate([ids(7, seed=7), ids(4, seed=4)]):
        x = torch.cat([embed(base, weights, row), base.get_input_embeddings()(more[i : i + 1])], 1)
        with torch.no_grad():
            want = base(inputs_embeds=x).logits[0, -1]
        assert_close(out.logits[i, -1], want, atol=2e-4, rtol=1e-3)


@each_decoder
def test_a_reset_cache_starts_anew(family):
    import transformers

    model, base, weights = adapted(family)
    cache = transformers.DynamicCache(config=base.config)
    row = ids(7, seed=7)
    model(input_ids=ids(5)[None], past_key_values=cache, use_cache=True)
    cache.reset()
    cache = cache if cache.get_seq_length() == 0 else transformers.DynamicCache(config=base.config)
    out = model(input_ids=row[None], past_key_values=cache, use_cache=True)
    assert_close(out.logits[0], row_output(base, weights, row), atol=2e-4, rtol=1e-3)


# ---- mixed batches --------------------------------------------------------------------------------------------------


def mixed(family, head="lm", **changes):
    model, base, weights = adapted(family, head, **changes)
    second = add(model, "b", seed=2, num_virtual_tokens=6, adapter_hidden_dim=16, adapter_activation="gelu")
    third = add(model, "c", seed=3, num_virtual_tokens=0)
    fourth = add(model, "d", seed=4, num_virtual_tokens=2, adapter_hidden_dim=0)
    model.eval()
    adapters = {"default": (weights, "relu"), "b": (second, "gelu"), "c": (third, "relu"), "d": (fourth, "relu")}
    return model, base, {**adapters, "__base__": ({}, "relu")}


NAMES = ["b", "__base__", "default", "c", "d", "b"]


@pytest.mark.feature("mixed batch")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", list(FAMILIES.values()), ids=str)
def test_each_row_of_a_mixed_batch_is_what_its_adapter_gives_alone(family, side):
    model, base, adapters = mixed(family)
    rows = [ids(n, seed=i) for i, n in enumerate((7, 4, 9, 5, 6, 3))]
    batch, mask = padded(rows, side)
    if side == "left" and family.name == "bart":
        rows = [ids(7, seed=i) for i in range(6)]  # BART's own rows depend on left padding
        batch, mask = padded(rows, side)
    more = {"decoder_input_ids": ids(6, 5, seed=9)} if family.kind == "seq2seq" else {}
    if side == "left" and family.name in ("gpt2", "bert"):
        more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=batch, attention_mask=mask, adapter_names=NAMES, **more).logits
    for i, (name, row) in enumerate(zip(NAMES, rows, strict=True)):
        weights, activation = adapters[name]
        own = {k: v[i : i + 1] for k, v in more.items() if k != "position_ids"}
        want = row_output(base, weights, row, activation, **own)
        got = out[i] if family.kind == "seq2seq" else out[i][mask[i] == 1]
        assert_close(got, want, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5"])
def test_sixteen_adapters_in_one_forward_pass_each_for_its_rows_only(family):
    """Two rows each, all prompts of different lengths: one call of the backbone, and of each adapter's W1."""
    model, base, weights = adapted(FAMILIES[family])
    adapters = {"default": weights}
    for number in range(1, 16):
        name = f"task{number}"
        adapters[name] = add(model, name, seed=number + 1, num_virtual_tokens=number + 4, adapter_hidden_dim=8)
    model.eval()
    names = [name for _ in range(2) for name in adapters]
    rows = [ids(3 + n % 5, seed=n) for n in range(len(names))]
    batch, mask = padded(rows, "left")
    more = {"decoder_input_ids": ids(len(names), 4, seed=9)} if family == "t5" else {}
    calls, seen = [], {}
    backbone = model.get_base_model().get_submodule("encoder" if family == "t5" else "model")
    backbone.register_forward_hook(lambda *_: calls.append(1))
    for name, fc1 in model.base_model.layer.input_tuning_fc1.items():
        fc1.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].shape[:-1].numel())
        )
    out = model(input_ids=batch, attention_mask=mask, adapter_names=names, **more).logits
    assert len(calls) == 1
    longest = max(model.peft_config[name].num_virtual_tokens for name in adapters)
    assert seen == {name: [2 * (batch.shape[1] + longest)] for name in adapters}  # places of two rows
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        own = {key: value[i : i + 1] for key, value in more.items()}
        got = out[i] if more else out[i][mask[i] == 1]
        assert_close(got, row_output(base, adapters[name], row, **own), atol=2e-4, rtol=1e-3)


@pytest.mark.feature("mixed batch")
@pytest.mark.parametrize("family", list(FAMILIES.values()), ids=str)
def test_mixed_batch_without_a_mask(family):
    model, base, adapters = mixed(family)
    batch = ids(6, 7)
    more = {"decoder_input_ids": ids(6, 5, seed=9)} if family.kind == "seq2seq" else {}
    out = model(input_ids=batch, adapter_names=NAMES, **more)
    for i, name in enumerate(NAMES):
        weights, activation = adapters[name]
        own = {k: v[i : i + 1] for k, v in more.items()}
        assert_close(out.logits[i], row_output(base, weights, batch[i], activation, **own), atol=2e-4, rtol=1e-3)
    if family.kind == "seq2seq":
        assert out.encoder_last_hidden_state.shape[1] == 7


@pytest.mark.feature("mixed batch")
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
@each_generator
def test_mixed_batch_in_generate(family, options):
    model, base, adapters = mixed(family)
    lengths = [7, 4, 9, 5, 6, 3]
    inputs = batch_for(family, lengths)
    out = new_tokens(family, generate(model, **inputs, adapter_names=NAMES, **options), inputs)
    for i, (name, row) in enumerate(zip(NAMES, rows_of(lengths), strict=True)):
        weights, activation = adapters[name]
        if "num_beams" in options:
            model.set_adapter(name if name != "__base__" else "default")
            alone = {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}
            if name == "__base__":
                with model.disable_adapter():
                    want = new_tokens(family, generate(model, **alone, **options), alone)[0]
            else:
                want = new_tokens(family, generate(model, **alone, **options), alone)[0]
        else:
            want = greedy(base, weights, row, NEW, activation)
        assert torch.equal(out[i], want), name


@pytest.mark.feature("mixed batch")
@each_decoder
def test_mixed_batch_with_a_static_cache(family):
    model, base, adapters = mixed(family)
    lengths = [7, 4, 9, 5, 6, 3]
    inputs = batch_for(family, lengths)
    out = generate(model, **inputs, adapter_names=NAMES, cache_implementation="static")
    for i, (name, row) in enumerate(zip(NAMES, rows_of(lengths), strict=True)):
        weights, activation = adapters[name]
        assert torch.equal(out[i, 9:], greedy(base, weights, row, NEW, activation)), name


@pytest.mark.feature("mixed batch")
@each_decoder
def test_mixed_batch_step_by_step_on_a_cache(family):
    """forward with a cache and without positions, as a loop of one's own would call it."""
    model, base, adapters = mixed(family)
    batch = ids(6, 7)
    first = model(input_ids=batch[:, :5], adapter_names=NAMES, use_cache=True)
    rest = model(input_ids=batch[:, 5:], adapter_names=NAMES, past_key_values=first.past_key_values)
    for i, name in enumerate(NAMES):
        weights, activation = adapters[name]
        want = row_output(base, weights, batch[i], activation)
        assert_close(torch.cat([first.logits[i], rest.logits[i]]), want, atol=2e-4, rtol=1e-3)


@pytest.mark.feature("mixed batch")
def test_mixed_batch_uses_each_adapters_classification_head():
    family = FAMILIES["bert"]
    model, base, weights = adapted(family, "seq_cls", task_type="SEQ_CLS")
    second = add(model, "b", seed=2, num_virtual_tokens=6)
    model.eval()
    heads = {}
    for key, parameter in model.named_parameters():
        if "modules_to_save.b." in key:
            parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
            heads[key.rpartition(".")[2]] = parameter.data
    batch = ids(3, 7)
    out = model(input_ids=batch, adapter_names=["default", "b", "__base__"]).logits
    for i, (own, head) in enumerate([(weights, None), (second, heads), ({}, None)]):
        from oracles import embed, prompt_length

        with torch.no_grad():
            body = base.bert(inputs_embeds=embed(base, own, batch[i])).last_hidden_state[:, prompt_length(own) :]
            pooled = base.bert.pooler(body)
            want = base.classifier(pooled) if head is None else pooled @ head["weight"].T + head["bias"]
        assert_close(out[i], want[0], atol=2e-4, rtol=1e-3)


def test_adapter_weights_oracle_sees_what_was_set():
    model, _, weights = adapted(FAMILIES["llama"])
    assert set(weights) == {"prompt.weight", "fc1.weight", "fc2.weight"}
    assert torch.equal(adapter_weights(model)["fc2.weight"], weights["fc2.weight"])
    assert weights["fc2.weight"].abs().mean() > 0.1


@pytest.mark.parametrize("static", [False, True])
def test_arguments_by_position(static):
    """As of the model's own `generate`: ids, configuration, logits processors."""
    model, base, weights = adapted(FAMILIES["llama"])
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=PAD, eos_token_id=None)
    if static:
        settings.cache_implementation = "static"
    row = ids(7)
    likeliest = greedy(base, weights, row, 1)
    banned = LogitsProcessorList([SuppressTokensLogitsProcessor(likeliest.tolist(), device=DEVICE)])
    got = model.generate(row[None], settings, banned)[0, 7:]
    assert torch.equal(
        got, model.generate(input_ids=row[None], generation_config=settings, logits_processor=banned)[0, 7:]
    )
    assert got[0] != likeliest
    assert torch.equal(model.generate(row[None], settings)[0, 7:], greedy(base, weights, row, NEW))
    with pytest.raises(TypeError, match="multiple values for the argument `inputs`"):
        model.generate(row[None], inputs=row[None])


def with_other_name(self, inputs=None, generation_config=None, **generate_kwargs):
    return LlamaForCausalLM.generate(self, inputs, generation_config, **generate_kwargs)


def with_any_arguments(self, *args, **kw):
    return LlamaForCausalLM.generate(self, *args, **kw)


@pytest.mark.parametrize("wrapper", [with_other_name, with_any_arguments])
def test_a_model_whose_generate_has_another_signature(wrapper):
    """As BLIP's, or a function that somebody has put around it."""
    model, base, weights = adapted(FAMILIES["llama"])
    inner = model.get_base_model()
    inner.generate = MethodType(wrapper, inner)
    row = ids(7)
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=PAD, eos_token_id=None)
    want = greedy(base, weights, row, NEW)
    assert torch.equal(model.generate(row[None], settings)[0, 7:], want)
    mask = torch.ones(1, 7, dtype=torch.long, device=DEVICE)
    assert torch.equal(model.generate(inputs=row[None], attention_mask=mask, generation_config=settings)[0, 7:], want)
    with pytest.raises(TypeError, match="positional arguments"):
        model.generate(*range(40))
