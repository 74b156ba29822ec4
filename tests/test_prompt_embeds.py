"""`prompt_embeds` is [prompt ; T(e)]: what the base model needs to do what the adapter does. What scripts for
prompt-tuning call besides answers, or says what to call."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch.testing import assert_close

from adapters import adapted, add, config, randomize
from families import ALL, DECODERS, FAMILIES, build, ids
from oracles import adapter_weights, embed
from peft_input_tuning import prompt_embeds, soft_prompt
from peft_input_tuning.engines import embeds_base64, embeds_prompts

LLAMA = FAMILIES["llama"]
ROWS = ids(2, 6)
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}
SHAPES = {
    "prompt and adapter": {},
    "biases": {"adapter_bias": True},
    "no adapter": {"adapter_hidden_dim": 0},
    "no prompt": {"num_virtual_tokens": 0},
    "scope input": {"adapter_scope": "input"},
}
each_family = pytest.mark.parametrize("family", ALL, ids=str)


@torch.no_grad()
def want(base, weights, **kwargs) -> torch.Tensor:
    return torch.cat([embed(base, weights, row, **kwargs) for row in ROWS])


@each_family
def test_it_is_the_prompt_and_the_adapted_input(family):
    model, base, weights = adapted(family)
    assert_close(prompt_embeds(model, ROWS), want(base, weights))


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_every_shape_of_the_method(changes):
    model, base, weights = adapted(LLAMA, **changes)
    assert_close(prompt_embeds(model, ROWS), want(base, weights))


@each_family
@torch.no_grad()
def test_the_base_model_does_with_it_what_the_adapter_does(family):
    model, base, weights = adapted(family)
    more = {"decoder_input_ids": ids(2, 4, seed=9)} if family.kind == "seq2seq" else {}
    got = base(inputs_embeds=prompt_embeds(model, ROWS), **more).logits
    virtual = 0 if family.kind == "seq2seq" else len(weights["prompt.weight"])
    assert_close(got[:, virtual:], model(input_ids=ROWS, **more).logits, **TOLERANCE)


@pytest.mark.parametrize("family", DECODERS, ids=str)
def test_an_engine_that_takes_embeddings_writes_the_text_of_scope_input(family):
    model, base, _ = adapted(family, adapter_scope="input")
    row, how = ROWS[:1], {"max_new_tokens": 6, "do_sample": False}
    got = base.generate(inputs_embeds=prompt_embeds(model, row), **how)
    assert got.tolist() == model.generate(input_ids=row, **how)[:, row.shape[1] :].tolist()


def test_an_adapter_can_be_named():
    model, base, first = adapted(LLAMA)
    second = add(model, "second", seed=5, num_virtual_tokens=2)
    assert_close(prompt_embeds(model, ROWS, "second"), want(base, second))
    assert_close(prompt_embeds(model, ROWS), want(base, first))
    model.set_adapter("second")
    assert_close(prompt_embeds(model, ROWS), want(base, second))
    with model.disable_adapter():
        assert_close(prompt_embeds(model, ROWS, "default"), want(base, first))


def test_adapters_of_transformers():
    model = build(LLAMA)
    model.add_adapter(config(LLAMA))
    randomize(model)
    assert_close(prompt_embeds(model, ROWS), want(build(LLAMA), adapter_weights(model)))


def test_a_merged_adapter_is_applied_once():
    model, base, weights = adapted(LLAMA, num_virtual_tokens=0)
    model.merge_adapter()
    assert_close(prompt_embeds(model, ROWS), want(base, weights))


def test_in_training_there_is_no_dropout_and_no_gradient():
    model, base, weights = adapted(LLAMA, adapter_dropout=0.5)
    got = prompt_embeds(model.train(), ROWS)
    assert not got.requires_grad
    assert_close(got, want(base, weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_has_the_dtype_of_the_embeddings(dtype):
    model = get_peft_model(build(LLAMA).to(dtype), config(LLAMA))
    randomize(model)
    assert prompt_embeds(model, ROWS).dtype is dtype


@pytest.mark.parametrize(
    ("wrong", "named"),
    [(ROWS[0], r"\(6,\)"), (ROWS.float()[None], r"\(1, 2, 6\)"), (ROWS.float(), r"\(2, 6\)"), ([[3, 4]], "list")],
)
def test_other_ids_are_refused(wrong, named):
    model, _, _ = adapted(LLAMA)
    with pytest.raises(ValueError, match=rf"`input_ids` must be .*, got {named}. For one row"):
        prompt_embeds(model, wrong)


def test_unknown_adapters_are_refused():
    model, _, _ = adapted(LLAMA)
    with pytest.raises(ValueError, match=r"`adapter_name` is 'other', which is not known. Name one of \['default'\]"):
        prompt_embeds(model, ROWS, "other")
    with model.disable_adapter(), pytest.raises(ValueError, match="`adapter_name` is None and no adapter is active"):
        prompt_embeds(model, ROWS)
    with pytest.raises(ValueError, match="no input-tuning adapter"):
        prompt_embeds(build(LLAMA), ROWS)
    waiting = get_peft_model(build(LLAMA), config(LLAMA, inference_mode=True))
    with pytest.raises(ValueError, match="has no usable weights"):
        prompt_embeds(waiting, ROWS)


# ---- what users of prompt-tuning call -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_the_prompt_is_the_one_that_the_model_sees(scale):
    model, _, weights = adapted(LLAMA, prompt_scale=scale)
    assert torch.equal(soft_prompt(model), weights["prompt.weight"])
    assert torch.equal(soft_prompt(model, "default"), weights["prompt.weight"])
    soft_prompt(model).sum().backward()
    (parameter,) = (p for name, p in model.named_parameters() if "input_tuning_prompt" in name)
    assert torch.equal(parameter.grad, torch.full_like(parameter, scale))


def test_without_virtual_tokens_the_prompt_has_no_rows():
    assert soft_prompt(adapted(LLAMA, num_virtual_tokens=0)[0]).shape == (0, 32)


CALLS = {
    "get_prompt": lambda model: model.get_prompt(2),
    "get_prompt_embedding_to_save": lambda model: model.get_prompt_embedding_to_save("default"),
    "prompt_encoder": lambda model: model.prompt_encoder["default"].embedding.weight,
    "prompt_tokens": lambda model: model.prompt_tokens["default"],
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_does_not_answer_says_what_to_call(call):
    with pytest.raises(AttributeError, match=r"soft_prompt\(model, .*prompt_embeds\(model, input_ids"):
        call(adapted(LLAMA)[0])


def test_other_names_are_refused_as_ever():
    with pytest.raises(AttributeError, match="'LlamaForCausalLM' object has no attribute 'nothing'"):
        _ = adapted(LLAMA)[0].nothing


@each_family
def test_word_embeddings_are_those_that_the_model_uses(family):
    model, base, weights = adapted(family)
    words = want(base, {name: value for name, value in weights.items() if "prompt" not in name})
    assert_close(model.word_embeddings(ROWS), words)


def test_prompt_tuning_around_input_tuning_has_its_own_prompt():
    inner, _, weights = adapted(LLAMA)
    outer = get_peft_model(inner, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert isinstance(outer, PeftModel)
    assert outer.get_prompt(2).shape == (2, 3, 32)
    assert torch.equal(soft_prompt(outer, "default"), weights["prompt.weight"])


def test_requests_of_rows_of_any_length():
    """As vLLM takes them: offline a dict for each row, over HTTP what torch.save writes, in base64."""
    model, base, weights = adapted(LLAMA, adapter_scope="input")
    rows = [[3, 4, 5], [6]]
    prompts = embeds_prompts(model, rows)
    for row, prompt in zip(rows, prompts, strict=True):
        assert_close(prompt["prompt_embeds"], embed(base, weights, torch.tensor(row))[0])
        sent = torch.load(io.BytesIO(base64.b64decode(embeds_base64(prompt["prompt_embeds"]))), weights_only=True)
        assert torch.equal(sent, prompt["prompt_embeds"])
    assert len(base64.b64decode(embeds_base64(prompts[1]["prompt_embeds"]))) < 4096  # not what it is a part of
