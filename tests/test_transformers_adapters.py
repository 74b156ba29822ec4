"""Adapters that transformers manages itself, without a `PeftModel`: the same as PEFT's way, and as the formula."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from adapters import adapted, config, randomize
from device import DEVICE
from families import ALL, FAMILIES, GENERATORS, build, ids
from oracles import adapter_weights, greedy, row_output

each_family = pytest.mark.parametrize("family", ALL, ids=str)
LLAMA = FAMILIES["llama"]
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}  # of the formula in another order of sums


def more(family, batch: int = 1) -> dict:
    return {"decoder_input_ids": ids(batch, 4, seed=9)} if family.kind == "seq2seq" else {}


@torch.no_grad()
def output(model, family=LLAMA, **options) -> torch.Tensor:
    return model(input_ids=ids(2, 6), **more(family, 2), **options).logits


def added(family, name: str = "default", **changes):
    """A model of transformers with an input-tuning adapter that matters."""
    model = build(family)
    model.add_adapter(config(family, **changes), name)
    randomize(model, name)
    return model


def installed_hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


# ---- one adapter --------------------------------------------------------------------------------------------------


@pytest.mark.feature("transformers adapters")
@each_family
def test_an_added_adapter_gives_the_formula(family):
    model = added(family)
    for seed, length in ((0, 6), (1, 3)):
        row = ids(length, seed=seed)
        want = row_output(build(family), adapter_weights(model), row, **more(family))
        with torch.no_grad():
            got = model(input_ids=row[None], **more(family)).logits[0]
        assert_close(got, want, **TOLERANCE)


@pytest.mark.feature("transformers adapters")
@pytest.mark.parametrize("family", GENERATORS, ids=str)
def test_an_added_adapter_generates(family):
    model, row = added(family), ids(5)
    want = greedy(build(family), adapter_weights(model), row, 4)
    got = model.generate(row[None], max_new_tokens=4, do_sample=False)[0]
    assert got[-4:].tolist() == want.tolist()


@pytest.mark.feature("transformers adapters")
@pytest.mark.parametrize("is_trainable", [False, True], ids=["", "is_trainable"])
@each_family
def test_what_peft_saved_transformers_loads(tmp_path, family, is_trainable):
    peft_model, _, _ = adapted(family)
    peft_model.save_pretrained(tmp_path)
    model = build(family)
    info = model.load_adapter(str(tmp_path), is_trainable=is_trainable)
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert torch.equal(output(model, family), output(peft_model, family))
    ours = {parameter.requires_grad for name, parameter in model.named_parameters() if "input_tuning" in name}
    assert ours == {is_trainable}


@each_family
def test_what_transformers_saved_peft_loads(tmp_path, family):
    model = added(family)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".safetensors") == [
        "adapter_model.safetensors"
    ]
    peft_model = PeftModel.from_pretrained(build(family), tmp_path, adapter_name="other").eval()
    assert torch.equal(output(peft_model, family), output(model, family))


def test_saved_by_transformers_the_card_says_to_import_the_package(tmp_path):
    added(LLAMA).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("import peft_input_tuning") == 1


def test_what_transformers_saved_transformers_loads_under_another_name(tmp_path):
    model = added(LLAMA)
    model.save_pretrained(tmp_path)
    other = build(LLAMA)
    other.load_adapter(str(tmp_path), "other", low_cpu_mem_usage=True)
    assert torch.equal(output(other), output(model))


def test_an_adapter_is_loaded_from_tensors_in_memory():
    model = added(LLAMA)
    tensors = {f"base_model.model.{key}": value for key, value in model.get_adapter_state_dict().items()}
    other = build(LLAMA)
    made = config(LLAMA, weights_in_checkpoint=True, prompt_scale=model.peft_config["default"].prompt_scale)
    other.load_adapter(peft_config=made, adapter_state_dict=tensors)
    assert torch.equal(output(other), output(model))


@pytest.mark.parametrize(
    ("family", "auto"),
    [
        (LLAMA, AutoModelForCausalLM),
        (FAMILIES["gemma2"], AutoModelForCausalLM),
        (FAMILIES["gpt2"], AutoModelForCausalLM),
        (FAMILIES["t5"], AutoModelForSeq2SeqLM),
        (FAMILIES["bart"], AutoModelForSeq2SeqLM),
        (FAMILIES["bert"], AutoModelForMaskedLM),
    ],
    ids=str,
)
def test_from_pretrained_with_an_adapter_folder(tmp_path, family, auto):
    build(family).save_pretrained(tmp_path / "base")
    peft_model = get_peft_model(family.heads["lm"].from_pretrained(tmp_path / "base").to(DEVICE), config(family))
    randomize(peft_model)
    peft_model.save_pretrained(tmp_path / "adapter")
    model = auto.from_pretrained(tmp_path / "adapter").to(DEVICE)
    assert model.active_adapters() == ["default"]
    assert torch.equal(output(model, family), output(peft_model.eval(), family))


def test_state_dict_of_an_adapter():
    model = added(LLAMA, prompt_scale=1.0)
    tensors = model.get_adapter_state_dict()
    weights = adapter_weights(model)
    assert {name.rpartition("input_tuning_")[2] for name in tensors} == set(weights)
    assert all(torch.equal(tensor, weights[name.rpartition("input_tuning_")[2]]) for name, tensor in tensors.items())


@each_family
def test_a_model_of_transformers_takes_mixed_batches(family):
    """`adapter_names` is PEFT's argument; the model takes it at its entrance."""
    model = added(family)
    alone = output(model, family)
    out = output(model, family, adapter_names=["default", "__base__"])
    assert_close(out[0], alone[0], atol=1e-4, rtol=1e-3)
    assert_close(out[1], output(build(family), family)[1], atol=1e-4, rtol=1e-3)


# ---- several adapters ---------------------------------------------------------------------------------------------


@each_family
def test_adapters_are_switched_disabled_and_deleted(family):
    base = build(family)
    model = added(family, "first")
    first = output(model, family)
    model.add_adapter(config(family, num_virtual_tokens=2, adapter_hidden_dim=8), "second")
    assert model.active_adapters() == ["second"]
    randomize(model, "second", seed=5)
    second = output(model, family)
    assert not torch.equal(first, second)

    model.set_adapter("first")
    assert model.active_adapters() == ["first"]
    assert torch.equal(output(model, family), first)
    model.disable_adapters()
    assert torch.equal(output(model, family), output(base.requires_grad_(False), family))
    model.enable_adapters()
    assert torch.equal(output(model, family), first)
    model.delete_adapter("first")
    assert model.active_adapters() == ["second"]
    assert torch.equal(output(model, family), second)


def test_after_the_last_adapter_is_deleted_the_base_speaks():
    model = added(LLAMA)
    model.delete_adapter("default")
    assert torch.equal(output(model), output(build(LLAMA)))
    model.add_adapter(config(LLAMA), "again")
    randomize(model, "again")
    assert torch.equal(output(model), output(added(LLAMA)))


def test_hooks_are_installed_once_however_many_adapters_come():
    """transformers makes a tuner for every adapter."""
    model = added(LLAMA)
    once = installed_hooks(model)
    for name in ("second", "third"):
        model.add_adapter(config(LLAMA), name)
    assert installed_hooks(model) == once


def test_two_input_tuning_adapters_at_once_are_refused():
    model = added(LLAMA, "first")
    model.add_adapter(config(LLAMA), "second")
    randomize(model, "second", seed=5)
    second = output(model)
    with pytest.raises(ValueError, match=r"Only one input-tuning adapter can be active") as error:
        model.set_adapter(["first", "second"])
    assert "['first', 'second']" in str(error.value)
    assert "adapter_names" in str(error.value)
    assert model.active_adapters() == ["second"]
    assert torch.equal(output(model), second)


def test_unknown_names_are_refused():
    model = added(LLAMA)
    with pytest.raises(ValueError, match="nobody"):
        model.set_adapter("nobody")
    with pytest.raises(ValueError, match="nobody"):
        model.delete_adapter("nobody")
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter(config(LLAMA), "default")
    assert model.active_adapters() == ["default"]


def test_a_configuration_that_does_not_fit_leaves_the_first_adapter_alone():
    model = added(LLAMA)
    want = output(model)
    with pytest.raises(ValueError, match="`num_virtual_tokens` is 128"):
        model.add_adapter(config(LLAMA, num_virtual_tokens=128), "second")
    assert torch.equal(output(model), want)
    assert not [name for name in model.state_dict() if ".second." in name]


@pytest.mark.parametrize("family", [LLAMA, FAMILIES["t5"]], ids=str)
def test_only_the_adapter_is_trained(family):
    model = added(family).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.requires_grad_(False)
    model.set_adapter("default")
    labels = {"labels": ids(2, 6)} if family.kind == "decoder" else {"labels": ids(2, 4)}
    model(input_ids=ids(2, 6), **labels).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "input_tuning" in name}


# ---- together with LoRA -------------------------------------------------------------------------------------------

LORA_TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "opt": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
    "bert": ["query", "value"],
}


def lora(family) -> LoraConfig:
    return LoraConfig(target_modules=LORA_TARGETS[family.name], r=4, init_lora_weights=False, task_type=None)


def randomize_lora(model, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.mark.feature("with LoRA")
@pytest.mark.parametrize("order", ["LoRA first", "input-tuning first"])
@pytest.mark.parametrize("family", [FAMILIES[name] for name in LORA_TARGETS], ids=str)
def test_lora_and_input_tuning_work_together(family, order):
    """Oracle: a base that has LoRA only, fed with embeddings worked out by hand."""
    with_lora = build(family)
    with_lora.add_adapter(lora(family), "lora")
    randomize_lora(with_lora)
    model = build(family)
    adapters = [("lora", lora(family)), ("prompt", config(family))]
    for name, made in adapters if order == "LoRA first" else reversed(adapters):
        model.add_adapter(made, name)
    randomize(model, "prompt")
    randomize_lora(model)
    weights, row = adapter_weights(model, "prompt"), ids(6)

    def answer() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=row[None], **more(family)).logits[0]

    model.set_adapter(["lora", "prompt"])
    assert sorted(model.active_adapters()) == ["lora", "prompt"]
    both = row_output(with_lora, weights, row, **more(family))
    assert_close(answer(), both, **TOLERANCE)
    model.set_adapter("prompt")
    only_prompt = row_output(build(family), weights, row, **more(family))
    assert_close(answer(), only_prompt, **TOLERANCE)
    model.set_adapter("lora")
    only_lora = row_output(with_lora, {}, row, **more(family))
    assert_close(answer(), only_lora, **TOLERANCE)
    model.disable_adapters()
    assert_close(answer(), row_output(build(family), {}, row, **more(family)), **TOLERANCE)
    for one, other in ((both, only_prompt), (both, only_lora), (only_prompt, only_lora)):
        assert not torch.allclose(one, other, atol=1e-2)


@pytest.mark.parametrize("family", [LLAMA, FAMILIES["t5"]], ids=str)
def test_lora_and_input_tuning_generate_together(family):
    model = build(family)
    model.add_adapter(lora(family), "lora")
    model.add_adapter(config(family), "prompt")
    randomize(model, "prompt")
    randomize_lora(model)
    model.set_adapter(["lora", "prompt"])
    with_lora = build(family)
    with_lora.add_adapter(lora(family), "lora")
    randomize_lora(with_lora)
    got = model.generate(ids(1, 5), max_new_tokens=4, do_sample=False)[0, -4:]
    assert got.tolist() == greedy(with_lora, adapter_weights(model, "prompt"), ids(5), 4).tolist()


def test_each_of_lora_and_input_tuning_is_saved_alone(tmp_path):
    model = build(LLAMA)
    model.add_adapter(lora(LLAMA), "lora")
    model.add_adapter(config(LLAMA), "prompt")
    randomize(model, "prompt")
    randomize_lora(model)
    want = output(model)
    for name in ("lora", "prompt"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
    other = build(LLAMA)
    other.load_adapter(str(tmp_path / "lora"), "lora")
    other.load_adapter(str(tmp_path / "prompt"), "prompt")
    other.set_adapter("prompt")
    assert torch.equal(output(other), want)
    model.set_adapter(["lora", "prompt"])
    other.set_adapter(["lora", "prompt"])
    assert torch.equal(output(other), output(model))


def test_input_tuning_is_deleted_and_lora_goes_on():
    model = build(LLAMA)
    model.add_adapter(lora(LLAMA), "lora")
    randomize_lora(model)
    want = output(model)
    model.add_adapter(config(LLAMA), "prompt")
    randomize(model, "prompt")
    model.set_adapter(["lora", "prompt"])
    model.delete_adapter("prompt")
    model.set_adapter("lora")
    assert torch.equal(output(model), want)
