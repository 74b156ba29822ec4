"""The forward pass: aligned outputs, equal to the paper's formula on an untouched base, whatever the caller passes."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from adapters import adapted, config
from device import DEVICE
from families import ALL, DECODERS, ENCODERS, FAMILIES, SEQ2SEQ, build, ids, padded
from oracles import embed, encoder_of, head_output, row_output, transform

TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}
ADAPTERS = {
    "both": {},
    "prompt only": {"adapter_hidden_dim": 0},
    "adapter only": {"num_virtual_tokens": 0},
    "gelu with bias": {"adapter_activation": "gelu", "adapter_bias": True},
}

each_family = pytest.mark.parametrize("family", ALL, ids=str)
each_decoder = pytest.mark.parametrize("family", DECODERS, ids=str)
each_encoder = pytest.mark.parametrize("family", ENCODERS, ids=str)
each_seq2seq = pytest.mark.parametrize("family", SEQ2SEQ, ids=str)


def inputs(family, batch=1, length=7):
    return {"decoder_input_ids": ids(batch, 5, seed=9)} if family.kind == "seq2seq" else {}


@pytest.mark.feature("forward")
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@each_family
def test_logits_are_the_formula_and_aligned(family, adapter):
    model, base, weights = adapted(family, **adapter)
    row = ids(7)
    more = inputs(family)
    out = model(input_ids=row[None], **more).logits
    want = row_output(base, weights, row, adapter.get("adapter_activation", "relu"), **more)
    assert out.shape[1] == (5 if family.kind == "seq2seq" else 7)
    assert_close(out[0], want, **TOLERANCE)
    assert not torch.allclose(out[0], base(input_ids=row[None], **more).logits[0], atol=1e-2)


@pytest.mark.feature("padding")
@pytest.mark.parametrize(
    ("family", "side"),
    [(f, side) for f in ALL for side in ("left", "right") if (f.name, side) != ("bart", "left")],
    ids=lambda value: str(value),
)
def test_a_row_does_not_depend_on_padding_or_neighbours(family, side):
    """GPT-2 and BERT count positions by place where none are passed, so that their own rows depend on left padding:
    there they are passed. BART takes none, and is left out on the left."""
    model, base, weights = adapted(family)
    rows = [ids(7), ids(4, seed=1), ids(9, seed=2)]
    batch, mask = padded(rows, side)
    more = inputs(family, batch=3)
    if side == "left" and family.name in ("gpt2", "bert"):
        more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=batch, attention_mask=mask, **more).logits
    for i, row in enumerate(rows):
        own = {k: v[i : i + 1] for k, v in more.items() if k != "position_ids"}
        got = out[i] if family.kind == "seq2seq" else out[i][mask[i] == 1]
        assert_close(got, row_output(base, weights, row, **own), **TOLERANCE)


@pytest.mark.feature("forward")
@each_decoder
def test_caller_positions_never_include_virtual_tokens(family):
    model, base, weights = adapted(family)
    row = ids(7)
    plain = model(input_ids=row[None]).logits
    if family.name == "bloom":
        mask = torch.ones(1, 7, device=DEVICE)
        return assert_close(plain, model(input_ids=row[None], attention_mask=mask).logits, **TOLERANCE)
    given = model(input_ids=row[None], position_ids=torch.arange(7, device=DEVICE)[None]).logits
    assert_close(given, plain, **TOLERANCE)
    if family.learned_positions:
        far = model(input_ids=row[None], position_ids=torch.arange(7, device=DEVICE)[None] + 11).logits
        x = embed(base, weights, row)
        want = base(inputs_embeds=x, position_ids=torch.arange(11, device=DEVICE)[None] + 11).logits[0, 4:]
        assert_close(far[0], want, **TOLERANCE)
    return None


@pytest.mark.feature("forward")
@each_family
def test_inputs_embeds_come_adapted_out_of_the_embedding(family):
    model, _, _ = adapted(family)
    row, more = ids(2, 7), inputs(family, 2)
    if family.name == "roberta":
        positions = torch.arange(2, 9, device=DEVICE)  # RoBERTa itself counts otherwise from embeddings
        more["position_ids"] = positions.expand(2, -1)
    want = model(input_ids=row, **more).logits
    x = encoder_of(model.get_base_model()).get_input_embeddings()(row)
    if family.kind == "seq2seq":
        out = model.get_base_model()(inputs_embeds=x, **more).logits
    else:
        out = model(inputs_embeds=x, **more).logits
    assert torch.equal(out, want)


@pytest.mark.feature("forward")
@each_decoder
def test_loss_is_over_the_caller_labels(family):
    model, base, weights = adapted(family)
    rows = [ids(7), ids(5, seed=1)]
    batch, mask = padded(rows, "right")
    labels = batch.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    loss = model(input_ids=batch, attention_mask=mask, labels=labels).loss
    terms = [
        torch.nn.functional.cross_entropy(row_output(base, weights, row)[1:-1], row[2:], reduction="none")
        for row in rows
    ]
    assert_close(loss, torch.cat(terms).mean(), **TOLERANCE)


@pytest.mark.feature("forward")
@each_seq2seq
def test_seq2seq_loss(family):
    model, base, weights = adapted(family)
    row, labels = ids(7), ids(1, 5, seed=3)
    out = model(input_ids=row[None], labels=labels)
    with torch.no_grad():
        want = base(inputs_embeds=embed(base, weights, row), labels=labels)
    assert_close(out.loss, want.loss, **TOLERANCE)


@pytest.mark.feature("forward")
@each_decoder
def test_logits_to_keep(family):
    model, _, _ = adapted(family)
    row = ids(2, 7)
    whole = model(input_ids=row).logits
    kept = model(input_ids=row, logits_to_keep=3).logits
    assert kept.shape[1] == 3
    assert_close(kept, whole[:, -3:], **TOLERANCE)


@pytest.mark.feature("forward")
@each_family
def test_hidden_states_and_attentions_are_aligned(family):
    model, base, weights = adapted(family)
    model.get_base_model().set_attn_implementation("eager")
    base.set_attn_implementation("eager")
    row, more = ids(7), inputs(family)
    out = model(input_ids=row[None], output_hidden_states=True, output_attentions=True, **more)
    with torch.no_grad():
        want = base(inputs_embeds=embed(base, weights, row), output_hidden_states=True, output_attentions=True, **more)
    name = "encoder_hidden_states" if family.kind == "seq2seq" else "hidden_states"
    maps = "encoder_attentions" if family.kind == "seq2seq" else "attentions"
    assert len(out[name]) == len(want[name]) > 2
    for got, full in zip(out[name], want[name], strict=True):
        assert_close(got, full[:, 4:], **TOLERANCE)
    for got, full in zip(out[maps], want[maps], strict=True):
        assert_close(got, full[:, :, 4:], **TOLERANCE)
    if family.kind == "seq2seq":
        assert_close(out.encoder_last_hidden_state, want.encoder_last_hidden_state[:, 4:], **TOLERANCE)
        assert_close(out.cross_attentions[0], want.cross_attentions[0], **TOLERANCE)


@pytest.mark.feature("forward")
@each_family
def test_return_dict_false_gives_the_same_values_as_a_tuple(family):
    model, _, _ = adapted(family)
    row, more = ids(2, 7), inputs(family, 2)
    with_names = model(input_ids=row, **more)
    as_tuple = model(input_ids=row, return_dict=False, **more)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], with_names.logits)
    assert len(as_tuple) == len(with_names.to_tuple())


@pytest.mark.feature("tasks")
@each_family
def test_a_model_without_a_head_gives_aligned_hidden_states(family):
    """Both as FEATURE_EXTRACTION and without a task type; positional arguments and tuples too."""
    for task in ("FEATURE_EXTRACTION", None):
        model, base, weights = adapted(family, "base", task_type=task)
        row, more = ids(7), inputs(family)
        out = model(input_ids=row[None], **more)
        want = row_output(base, weights, row, **more)
        assert_close(out.last_hidden_state[0], want, **TOLERANCE)
        if "position_ids" not in more and family.kind != "seq2seq":
            positional = model.get_base_model()(row[None], return_dict=False)
            assert torch.equal(positional[0], out.last_hidden_state)


@pytest.mark.feature("tasks")
@pytest.mark.parametrize(
    ("family", "head"),
    [(family, head) for family in ALL for head in ("seq_cls", "token_cls", "qa") if head in family.heads],
    ids=lambda value: str(value),
)
def test_classification_and_question_answering(family, head):
    task = {"seq_cls": "SEQ_CLS", "token_cls": "TOKEN_CLS", "qa": "QUESTION_ANS"}[head]
    model, base, weights = adapted(family, head, task_type=task)  # heads are copies with the base's values
    rows = [ids(7), ids(4, seed=1)]
    for row in rows:
        row[-1] = 1  # the end token that T5 and BART pool
    batch, mask = padded(rows, "right")
    labels = torch.tensor([1, 2], device=DEVICE)
    if head == "token_cls":
        labels = torch.randint(0, 3, batch.shape, device=DEVICE)
    given = {"start_positions": labels, "end_positions": labels} if head == "qa" else {"labels": labels}
    out = model(input_ids=batch, attention_mask=mask, **given)
    assert torch.isfinite(out.loss)
    for i, row in enumerate(rows):
        got = head_output(base, weights, row, head)
        main = out.start_logits if head == "qa" else out.logits
        if head == "seq_cls":
            assert_close(main[i], got, **TOLERANCE)
        else:
            assert_close(main[i][mask[i] == 1], got, **TOLERANCE)


@pytest.mark.feature("forward")
def test_bert_pools_the_first_token_and_not_a_virtual_one():
    family = FAMILIES["bert"]
    model, base, weights = adapted(family, "base")
    row = ids(7)
    out = model(input_ids=row[None])
    body = base(inputs_embeds=embed(base, weights, row)).last_hidden_state[:, 4:]
    assert_close(out.pooler_output, base.pooler(body), **TOLERANCE)


@pytest.mark.feature("forward")
@pytest.mark.parametrize("cached", [False, True], ids=["at the start", "after the cache"])
@pytest.mark.parametrize("tokens", [0, 4])
def test_gpt2_token_types_do_not_pass_through_the_adapter(tokens, cached):
    """GPT-2 looks token types up in the word embedding, which is wrapped."""
    model, base, weights = adapted(FAMILIES["gpt2"], num_virtual_tokens=tokens)
    row, types = ids(7), ids(7, seed=5)
    wte = base.transformer.wte
    x = embed(base, weights, row)
    x[:, tokens:] += wte(types)
    want = base(inputs_embeds=x).logits[0, tokens:]
    if cached:
        first = model(input_ids=row[None, :4], token_type_ids=types[None, :4], use_cache=True)
        rest = model(input_ids=row[None, 4:], token_type_ids=types[None, 4:], past_key_values=first.past_key_values)
        assert_close(rest.logits[0], want[4:], **TOLERANCE)
    else:
        assert_close(model(input_ids=row[None], token_type_ids=types[None]).logits[0], want, **TOLERANCE)


@pytest.mark.feature("forward")
def test_bert_token_types_are_those_of_the_tokens():
    model, base, weights = adapted(FAMILIES["bert"])
    row, types = ids(7), torch.tensor([0, 0, 0, 1, 1, 1, 1], device=DEVICE)
    out = model(input_ids=row[None], token_type_ids=types[None]).logits
    x, full = embed(base, weights, row), torch.cat([torch.zeros(4, dtype=torch.long, device=DEVICE), types])
    assert_close(out[0], base(inputs_embeds=x, token_type_ids=full[None]).logits[0, 4:], **TOLERANCE)


@pytest.mark.feature("forward")
@each_seq2seq
def test_encoder_outputs_made_by_the_encoder_can_be_passed(family):
    model, _, _ = adapted(family)
    rows = [ids(7), ids(4, seed=1)]
    batch, mask = padded(rows, "right")
    more = inputs(family, 2)
    want = model(input_ids=batch, attention_mask=mask, **more).logits
    encoded = model.get_base_model().get_encoder()(batch, attention_mask=mask)
    out = model.get_base_model()(encoder_outputs=encoded, attention_mask=mask, **more)
    assert torch.equal(out.logits, want)
    assert torch.equal(out.encoder_last_hidden_state, encoded.last_hidden_state)


@pytest.mark.feature("forward")
@each_family
def test_disabled_adapter_is_the_base_bit_for_bit(family):
    model, base, _ = adapted(family)
    batch, mask = padded([ids(7), ids(4, seed=1)], "right")
    more = {"attention_mask": mask, **inputs(family, 2)}
    with model.disable_adapter():
        assert torch.equal(model(input_ids=batch, **more).logits, base(input_ids=batch, **more).logits)
    assert not torch.allclose(model(input_ids=batch, **more).logits, base(input_ids=batch, **more).logits, atol=1e-2)


@each_decoder
def test_dropout_acts_in_training_only(family):
    model, _, _ = adapted(family, adapter_dropout=0.5)
    row = ids(1, 7)
    assert torch.equal(model(input_ids=row).logits, model(input_ids=row).logits)
    model.train()
    assert not torch.equal(model(input_ids=row).logits, model(input_ids=row).logits)


def test_t5_encoder_alone_is_aligned():
    """T5's encoder as a model of its own has no decoder that would need the virtual places."""
    import transformers

    torch.manual_seed(0)
    base = transformers.T5EncoderModel(FAMILIES["t5"].config()).eval().to(DEVICE)
    import copy

    from adapters import randomize
    from oracles import adapter_weights

    model = get_peft_model(copy.deepcopy(base), config(task_type="FEATURE_EXTRACTION")).eval()
    randomize(model)
    weights, row = adapter_weights(model), ids(7)
    x = transform(weights, base.encoder.embed_tokens(row))
    want = base(inputs_embeds=torch.cat([weights["prompt.weight"], x])[None]).last_hidden_state[0, 4:]
    assert_close(model(input_ids=row[None]).last_hidden_state[0], want, **TOLERANCE)


@each_encoder
def test_build_is_the_same_each_time(family):
    """The oracles compare a wrapped model with an untouched copy."""
    first, second = build(family), build(family)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_one_id_without_a_dimension():
    """Models of images look for an image's word so, by comparing embeddings: adapted ones differ by rounding."""
    one = torch.tensor(5, device=DEVICE)
    model, base, _ = adapted(FAMILIES["llama"])
    with pytest.raises(ValueError, match=r"of one id, without a dimension.*Pass `input_ids` beside images"):
        model.get_input_embeddings()(one)
    with model.disable_adapter():
        assert torch.equal(model.get_input_embeddings()(one), base.get_input_embeddings()(one))
    prompt_alone, base, _ = adapted(FAMILIES["llama"], adapter_hidden_dim=0)
    assert torch.equal(prompt_alone.get_input_embeddings()(one), base.get_input_embeddings()(one))


def test_labels_that_were_shifted_before():
    """An argument of all of transformers' losses, which Trainer passes where sequences are cut over processes."""
    model, _, _ = adapted(FAMILIES["llama"])
    labels = ids(2, 6)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    want = model(input_ids=labels, labels=labels).loss
    assert_close(model(input_ids=labels, labels=labels, shift_labels=shifted).loss, want)
