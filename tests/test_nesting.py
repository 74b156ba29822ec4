"""A `PeftModel` around a `PeftModel`: both methods act, and each has its own switches, files and configurations."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from adapters import adapted, add, config, randomize
from families import FAMILIES, build, ids
from oracles import adapter_gradients, adapter_weights, embed, greedy, row_output
from peft_input_tuning import InputTuningLayer, from_prompt_tuning

LLAMA = FAMILIES["llama"]
SOME = [FAMILIES[name] for name in ("llama", "gpt2", "t5", "bart", "bert")]
TARGETS = {"gpt2": ["c_attn"], "t5": ["q", "v"], "bert": ["query", "value"]}
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}
some_families = pytest.mark.parametrize("family", SOME, ids=str)
pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]


def lora(family=LLAMA, **changes) -> LoraConfig:
    targets = TARGETS.get(family.name, ["q_proj", "v_proj"])
    return LoraConfig(target_modules=targets, init_lora_weights=False, task_type=family.task_type, **changes)


def with_lora(family=LLAMA, base: nn.Module | None = None) -> PeftModel:
    base = build(family) if base is None else base
    torch.manual_seed(5)
    return get_peft_model(base, lora(family)).eval()


def merged_lora(family=LLAMA) -> nn.Module:
    """The inner model as a plain one, for the oracles."""
    return with_lora(family).merge_and_unload().requires_grad_(False)


def around_lora(family=LLAMA, **changes) -> tuple[PeftModel, dict]:
    model = get_peft_model(with_lora(family), config(family, **changes)).eval()
    randomize(model)
    return model, adapter_weights(model)


def inside_lora() -> tuple[PeftModel, PeftModel, nn.Module, dict]:
    """LoRA around input-tuning, what is inside, the base with LoRA alone, and the adapter's weights."""
    inner, _, weights = adapted(LLAMA)
    torch.manual_seed(5)
    outer = get_peft_model(inner, lora(), adapter_name="outer").eval()
    return outer, inner, merged_lora(), weights


def more(family) -> dict:
    return {"decoder_input_ids": ids(1, 4, seed=9)} if family.kind == "seq2seq" else {}


@torch.no_grad()
def output(model: nn.Module, family=LLAMA, **kwargs) -> torch.Tensor:
    return model(input_ids=ids(1, 6), **more(family), **kwargs).logits[0]


def want_of(base: nn.Module, weights: dict, family=LLAMA, **kwargs) -> torch.Tensor:
    return row_output(base, weights, ids(1, 6)[0], **more(family), **kwargs)


# ---- around LoRA ------------------------------------------------------------------------------------------------


@some_families
def test_around_lora_gives_the_formula_over_the_model_with_lora(family):
    model, weights = around_lora(family)
    assert_close(output(model, family), want_of(merged_lora(family), weights, family), **TOLERANCE)


@pytest.mark.parametrize(
    ("family", "kwargs"),
    [(LLAMA, {}), (LLAMA, {"use_cache": False}), (LLAMA, {"cache_implementation": "static"}), (FAMILIES["t5"], {})],
    ids=str,
)
def test_around_lora_generates(family, kwargs):
    model, weights = around_lora(family)
    want = greedy(merged_lora(family), weights, ids(5), 4)
    found = model.generate(input_ids=ids(5)[None], max_new_tokens=4, do_sample=False, **kwargs)[0]
    assert found[-4:].tolist() == want.tolist()


def test_around_lora_the_input_alone_is_adapted():
    model, weights = around_lora(adapter_scope="input")
    row = ids(6)
    labels = torch.tensor([-100] * 4 + row[4:].tolist(), device=row.device)
    with torch.no_grad():
        found = model(input_ids=row[None], labels=labels[None]).logits[0]
    assert_close(found, row_output(merged_lora(), weights, row, input_length=4), **TOLERANCE)
    generated = model.generate(input_ids=row[None], max_new_tokens=1, do_sample=False)[0, -1]
    assert generated == row_output(merged_lora(), weights, row, input_length=6)[-1].argmax()


def test_around_lora_the_base_alone_is_reached_directly():
    """Trainers call the model under the PeftModels, too."""
    model, weights = around_lora()
    plain = model.get_base_model().get_base_model()
    assert_close(output(plain), want_of(merged_lora(), weights), **TOLERANCE)


def test_around_lora_rows_with_adapters_of_their_own():
    model, weights = around_lora()
    other = add(model, "b", seed=2, num_virtual_tokens=2)
    row = ids(1, 6)
    with torch.no_grad():
        found = model(input_ids=row.repeat(3, 1), adapter_names=["default", "b", "__base__"]).logits
    base = merged_lora()
    for of_row, want in zip(found, (want_of(base, weights), want_of(base, other), want_of(base, {})), strict=True):
        assert_close(of_row, want, **TOLERANCE)


@pytest.mark.parametrize("family", [LLAMA, FAMILIES["t5"]], ids=str)
def test_around_lora_only_input_tuning_is_trained(family):
    model, weights = around_lora(family)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "input_tuning_" in name}
    model(input_ids=ids(1, 6), **more(family)).logits.square().mean().backward()
    base = merged_lora(family)
    weights = {name: value.requires_grad_() for name, value in weights.items()}
    logits = base(inputs_embeds=embed(base, weights, ids(6)), **more(family)).logits
    logits[:, 0 if family.kind == "seq2seq" else 4 :].square().mean().backward()
    for name, gradient in adapter_gradients(model).items():
        assert_close(gradient, weights[name].grad, **TOLERANCE)


def test_around_lora_disabling_leaves_lora():
    model, weights = around_lora()
    with model.disable_adapter():
        assert_close(output(model), want_of(merged_lora(), {}), **TOLERANCE)
    assert_close(output(model), want_of(merged_lora(), weights), **TOLERANCE)


def test_around_lora_each_has_its_own_configurations():
    inner = with_lora()
    model = get_peft_model(inner, config(LLAMA))
    assert [type(one).__name__ for one in inner.peft_config.values()] == ["LoraConfig"]
    assert [type(one).__name__ for one in model.peft_config.values()] == ["InputTuningConfig"]


@some_families
def test_around_lora_saved_and_loaded(family, tmp_path):
    model, _ = around_lora(family)
    inner = model.get_base_model()
    model.save_pretrained(tmp_path / "outer")
    inner.save_pretrained(tmp_path / "inner")
    assert all("input_tuning_" in key for key in load_file(tmp_path / "outer" / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(build(family), tmp_path / "inner")
    again = PeftModel.from_pretrained(again, tmp_path / "outer").eval()
    assert torch.equal(output(again, family), output(model, family))


def test_around_lora_saved_and_loaded_where_lora_is_merged_and_back(tmp_path):
    model, weights = around_lora()
    model.save_pretrained(tmp_path / "around")
    flat = PeftModel.from_pretrained(merged_lora(), tmp_path / "around").eval()
    assert_close(output(flat), want_of(merged_lora(), weights), **TOLERANCE)
    flat.save_pretrained(tmp_path / "flat")
    again = PeftModel.from_pretrained(with_lora(), tmp_path / "flat").eval()
    assert torch.equal(output(again), output(model))


def test_around_lora_unloading_gives_the_inner_model_back():
    inner = with_lora()
    want = output(inner)
    model = get_peft_model(inner, config(LLAMA)).eval()
    randomize(model)
    assert model.unload() is inner
    assert torch.equal(output(inner), want)
    assert inner.peft_config.keys() == {"default"}
    assert not any(isinstance(module, InputTuningLayer) for module in inner.modules())
    again = get_peft_model(inner, config(LLAMA)).eval()
    randomize(again)
    assert_close(output(again), want_of(merged_lora(), adapter_weights(again)), **TOLERANCE)


@pytest.mark.parametrize("family", [LLAMA, FAMILIES["t5"]], ids=str)
def test_around_lora_merged_without_merging_lora(family):
    model, weights = around_lora(family, num_virtual_tokens=0)
    want = want_of(merged_lora(family), weights, family)
    model.merge_adapter()
    assert not any(module.merged for module in model.modules() if isinstance(module, LoraLayer))
    assert_close(output(model, family), want, **TOLERANCE)
    model.unmerge_adapter()
    assert_close(output(model, family), want, **TOLERANCE)
    inner = model.merge_and_unload()
    assert isinstance(inner, PeftModel)
    assert_close(output(inner, family), want, **TOLERANCE)
    with inner.disable_adapter():
        assert_close(output(inner, family), want_of(build(family), weights, family), **TOLERANCE)


def test_around_lora_a_refused_adapter_leaves_lora_as_it_was():
    inner = with_lora()
    trained = [name for name, parameter in inner.named_parameters() if parameter.requires_grad]
    with pytest.raises(ValueError, match="num_virtual_tokens"):
        get_peft_model(inner, config(LLAMA, num_virtual_tokens=1000))
    assert [name for name, parameter in inner.named_parameters() if parameter.requires_grad] == trained
    assert [type(one).__name__ for one in inner.peft_config.values()] == ["LoraConfig"]


def test_a_trained_prompt_around_lora_is_the_start():
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prompt_tuning_init="RANDOM")
    prompt_tuned = get_peft_model(with_lora(), settings).eval()
    prompt = prompt_tuned.prompt_encoder["default"].embedding.weight.detach().clone()
    model = from_prompt_tuning(prompt_tuned, adapter_hidden_dim=24).eval()
    assert_close(output(model), want_of(merged_lora(), {"prompt.weight": prompt}), **TOLERANCE)


def test_around_prompt_tuning_is_refused():
    """PEFT's prompt-tuning keeps the embedding that it found, and would look ids up without the input-adapter."""
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init="RANDOM")
    inner = get_peft_model(build(LLAMA), settings).eval()
    want = output(inner)
    with pytest.raises(ValueError, match=r"`model` is a PeftModel with PROMPT_TUNING.*from_prompt_tuning"):
        get_peft_model(inner, config(LLAMA))
    assert torch.equal(output(inner), want)


# ---- inside LoRA ------------------------------------------------------------------------------------------------


def test_inside_lora_gives_the_formula_over_the_model_with_lora():
    outer, _, base, weights = inside_lora()
    assert_close(output(outer), want_of(base, weights), **TOLERANCE)


def test_inside_lora_generates():
    outer, _, base, weights = inside_lora()
    found = outer.generate(input_ids=ids(5)[None], max_new_tokens=4, do_sample=False)[0, 5:]
    assert found.tolist() == greedy(base, weights, ids(5), 4).tolist()


def test_inside_lora_disabling_input_tuning_leaves_lora():
    outer, inner, base, weights = inside_lora()
    with inner.disable_adapter():
        assert_close(output(outer), want_of(base, {}), **TOLERANCE)
    assert_close(output(outer), want_of(base, weights), **TOLERANCE)


def test_inside_lora_saved_and_loaded(tmp_path):
    outer, _, base, weights = inside_lora()
    outer.save_pretrained(tmp_path)
    assert all("lora_" in key for key in load_file(tmp_path / "outer" / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(build(LLAMA), tmp_path)
    again = PeftModel.from_pretrained(again, tmp_path / "outer", adapter_name="outer").eval()
    assert_close(output(again), want_of(base, weights), **TOLERANCE)


def test_inside_lora_of_the_same_name_is_refused_before_anything_changes():
    inner, _, _ = adapted(LLAMA)
    want = output(inner)
    with pytest.raises(ValueError, match=r'`adapter_name` is .default.*LoraConfig.*adapter_name="outer"'):
        get_peft_model(inner, lora())
    assert torch.equal(output(inner), want)
    assert [type(one).__name__ for one in inner.peft_config.values()] == ["InputTuningConfig"]
    assert not any(isinstance(module, LoraLayer) for module in inner.modules())


# ---- one base, two owners -----------------------------------------------------------------------------------------

SECOND = {
    "get_peft_model": lambda base, model, folder: get_peft_model(base, config(LLAMA)),
    "under another name": lambda base, model, folder: get_peft_model(base, config(LLAMA), adapter_name="two"),
    "from_pretrained": lambda base, model, folder: PeftModel.from_pretrained(base, folder),
    "around the first": lambda base, model, folder: get_peft_model(model, config(LLAMA), adapter_name="two"),
    "injected": lambda base, model, folder: inject_adapter_in_model(config(LLAMA), base, "default"),
}


@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND)
def test_a_second_owner_is_refused_before_the_first_one_changes(second, tmp_path):
    base = build(LLAMA)
    model = get_peft_model(base, config(LLAMA)).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    before, want = copy.deepcopy(model.state_dict()), output(model)
    with pytest.raises(ValueError, match=r"`model` has the input-tuning adapters \['default'\] already.*unload\(\)"):
        second(base, model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.peft_config.keys() == {"default"}
    assert torch.equal(output(model), want)


def test_after_unloading_the_base_is_free(tmp_path):
    base = build(LLAMA)
    first = get_peft_model(base, config(LLAMA)).eval()
    randomize(first)
    want = output(first)
    first.save_pretrained(tmp_path)
    first.unload()
    assert torch.equal(output(PeftModel.from_pretrained(base, tmp_path).eval()), want)


def test_after_deleting_its_last_adapter_the_base_is_free():
    base = build(LLAMA)
    first = get_peft_model(base, config(LLAMA))
    first.delete_adapter("default")
    second = get_peft_model(base, config(LLAMA)).eval()
    randomize(second)
    assert_close(output(second), want_of(build(LLAMA), adapter_weights(second)), **TOLERANCE)


# ---- words and modules that another adapter trains beside its layers ------------------------------------------------

WORDS = {
    "trainable_token_indices": lambda: lora(trainable_token_indices=[90, 91]),
    "modules_to_save": lambda: lora(modules_to_save=["embed_tokens"]),
    "TrainableTokens": lambda: TrainableTokensConfig(
        token_indices=[90, 91], target_modules=["embed_tokens"], task_type="CAUSAL_LM"
    ),
}
each_way = pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
ROW = torch.tensor([5, 90, 7, 91, 8, 9])


def with_trained_words(words) -> PeftModel:
    base = build(LLAMA)
    torch.manual_seed(5)
    model = get_peft_model(base, words()).eval()
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name or "embed_tokens.modules_to_save" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(3))
    return model


@torch.no_grad()
def of_row(model: nn.Module, row: torch.Tensor = ROW) -> torch.Tensor:
    return model(input_ids=row[None].to(model.device)).logits[0]


@each_way
def test_trained_words_inside_are_adapted(words):
    inner = with_trained_words(words)
    base = copy.deepcopy(inner).get_base_model()
    assert not torch.allclose(of_row(base), of_row(build(LLAMA)))
    model = get_peft_model(inner, config(LLAMA)).eval()
    randomize(model)
    weights = adapter_weights(model)
    assert_close(of_row(model), row_output(base, weights, ROW), **TOLERANCE)
    found = model.generate(input_ids=ROW[None].to(model.device), max_new_tokens=3, do_sample=False)[0, 6:]
    assert found.tolist() == greedy(base, weights, ROW.to(model.device), 3).tolist()
    with model.disable_adapter():
        assert_close(of_row(model), of_row(base), **TOLERANCE)
    assert model.unload() is inner
    assert torch.equal(of_row(inner), of_row(base))


@each_way
def test_trained_words_inside_are_saved_and_loaded_with_their_adapter(words, tmp_path):
    inner = with_trained_words(words)
    inner.save_pretrained(tmp_path / "inner")
    model = get_peft_model(inner, config(LLAMA)).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "outer")
    again = PeftModel.from_pretrained(build(LLAMA), tmp_path / "inner")
    again = PeftModel.from_pretrained(again, tmp_path / "outer").eval()
    assert torch.equal(of_row(again), of_row(model))


@each_way
def test_loading_leaves_the_words_of_the_adapter_inside_alone(words, tmp_path):
    model = get_peft_model(with_trained_words(words), config(LLAMA))
    model.save_pretrained(tmp_path)
    other = with_trained_words(words)
    for name, parameter in other.named_parameters():
        if "trainable_tokens_delta" in name or "embed_tokens.modules_to_save" in name:
            parameter.data.mul_(2)
    want = of_row(other)
    again = PeftModel.from_pretrained(other, tmp_path).eval()
    with again.disable_adapter():
        assert torch.equal(of_row(again), want)


@pytest.mark.parametrize("words", list(WORDS.values())[:2], ids=list(WORDS)[:2])
def test_another_name_than_that_of_trained_words_is_refused(words):
    inner = with_trained_words(words)
    want = of_row(inner)
    with pytest.raises(
        ValueError, match=r"`adapter_name` is 'it', but adapter 'default' inside trains `.*embed_tokens"
    ):
        get_peft_model(inner, config(LLAMA), adapter_name="it")
    assert torch.equal(of_row(inner), want)


@each_way
def test_beside_an_adapter_of_transformers_that_trains_words_it_is_refused(words):
    model = build(LLAMA)
    model.add_adapter(words(), "words")
    want = of_row(model)
    with pytest.raises(ValueError, match=r"The embedding of `model` is in a .*get_peft_model"):
        model.add_adapter(config(), "it")
    assert torch.equal(of_row(model), want)
    assert not any(isinstance(module, InputTuningLayer) for module in model.modules())


def with_trained_head() -> PeftModel:
    settings = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    model = get_peft_model(build(LLAMA, "seq_cls"), settings).eval()
    torch.nn.init.normal_(model.get_base_model().score.modules_to_save["default"].weight)
    return model


def test_a_head_that_both_train_is_one_under_one_name(tmp_path):
    inner = with_trained_head()
    base = copy.deepcopy(inner).get_base_model()
    model = get_peft_model(inner, config(task_type="SEQ_CLS")).eval()
    randomize(model)
    assert_close(output(model), want_of(base, adapter_weights(model)), **TOLERANCE)
    head = inner.get_base_model().score.modules_to_save["default"].weight
    assert head.requires_grad
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(with_trained_head(), tmp_path).eval()
    found = again.get_base_model().get_base_model().score.modules_to_save["default"].weight
    assert torch.equal(found, head)


def test_a_head_that_both_train_under_two_names_is_refused():
    with pytest.raises(ValueError, match=r"adapter 'default' inside trains `base_model.model.score`"):
        get_peft_model(with_trained_head(), config(task_type="SEQ_CLS"), adapter_name="it")
