"""A prompt's keys and values are computed once, used where that is exact, and forgotten when they may have changed."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from adapters import adapted, add, config, randomize
from device import DEVICE
from families import DECODERS, FAMILIES, PAD, build, ids, padded
from oracles import adapter_weights, greedy, row_output
from peft_input_tuning import InputTuningLayer, set_prompt_cache
from peft_input_tuning.virtual_tokens import prompt_cache

llama = FAMILIES["llama"]
WINDOWED = {"mistral", "gemma2", "gemma3"}
each_decoder = pytest.mark.parametrize("family", DECODERS, ids=str)


@pytest.fixture(autouse=True)
def _switched_on(monkeypatch):
    """It is off until `set_prompt_cache` switches it on (`test_the_switch`); here all adapters have it."""
    monkeypatch.setattr(InputTuningLayer, "caches_prompt", True)


@pytest.fixture
def runs(monkeypatch):
    """Names of the adapters whose prompts ran through the model."""
    return counted_runs(monkeypatch)


def counted_runs(monkeypatch) -> list[str]:
    names: list[str] = []
    compute = prompt_cache._compute

    def counted(backbone, layer, name):
        names.append(name)
        return compute(backbone, layer, name)

    monkeypatch.setattr(prompt_cache, "_compute", counted)
    return names


def generate(model, **inputs):
    return model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=PAD)


def left_padded(lengths=(7, 4, 9)):
    batch, mask = padded([ids(n, seed=n) for n in lengths], "left")
    return {"input_ids": batch, "attention_mask": mask}


@pytest.mark.feature("prompt cache")
@each_decoder
def test_one_run_serves_every_request_and_row(family, runs):
    model, base, weights = adapted(family)
    for lengths in ((7, 7), (5, 5, 5)):
        out = generate(model, input_ids=torch.stack([ids(n, seed=n) for n in lengths]))
        assert torch.equal(out[0, -5:], greedy(base, weights, ids(lengths[0], seed=lengths[0]), 5))
    assert runs == ["default"]


@pytest.mark.feature("prompt cache")
@each_decoder
def test_left_padding(family, runs):
    """Where attention counts places (sliding windows), pads must not stand behind the prompt: the usual way."""
    model, base, weights = adapted(family)
    out = generate(model, **left_padded())
    for i, n in enumerate((7, 4, 9)):
        assert torch.equal(out[i, -5:], greedy(base, weights, ids(n, seed=n), 5))
    assert runs == ([] if family.name in WINDOWED else ["default"])


@each_decoder
def test_the_switch(family, runs, monkeypatch):
    monkeypatch.undo()
    assert not InputTuningLayer.caches_prompt
    runs = counted_runs(monkeypatch)
    model, base, weights = adapted(family)
    out = generate(model, input_ids=ids(1, 7, seed=7))
    assert torch.equal(out[0, -5:], greedy(base, weights, ids(1, 7, seed=7)[0], 5))
    assert runs == []
    set_prompt_cache(model, True)
    assert torch.equal(generate(model, input_ids=ids(1, 7, seed=7)), out)
    assert runs == ["default"]
    set_prompt_cache(model, False)
    assert torch.equal(generate(model, input_ids=ids(1, 7, seed=7)), out)
    assert runs == ["default"]


@pytest.mark.feature("prompt cache")
@each_decoder
def test_mixed_batch(family, runs):
    model, base, weights = adapted(family)
    adapters = {"default": weights, "b": add(model, "b", seed=2, num_virtual_tokens=6), "__base__": {}}
    model.eval()
    names = ["b", "__base__", "default", "b"]
    for _ in range(2):
        out = generate(model, input_ids=ids(4, 7), adapter_names=names)
    for i, name in enumerate(names):
        assert torch.equal(out[i, 7:], greedy(base, adapters[name], ids(4, 7)[i], 5)), name
    assert sorted(runs) == ["b", "default"]


@pytest.mark.feature("prompt cache")
@each_decoder
def test_window_smaller_than_the_prompt(family, runs):
    model, base, weights = adapted(family, num_virtual_tokens=11)
    out = generate(model, input_ids=ids(2, 7))
    for i in range(2):
        assert torch.equal(out[i, 7:], greedy(base, weights, ids(2, 7)[i], 5))
    assert runs == ["default"]


def change_prompt(model):
    model.base_model.layer.input_tuning_prompt["default"].weight.data.mul_(-1)


def step_of_the_optimizer(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    with torch.enable_grad():
        model(input_ids=ids(1, 5), labels=ids(1, 5)).loss.backward()
    optimizer.step()


def change_base(model):
    with torch.no_grad():
        model.get_base_model().model.layers[0].self_attn.k_proj.weight.mul_(-1)


def change_base_data(model):
    """Leaves version and storage as they are."""
    model.get_base_model().model.layers[1].mlp.up_proj.weight.data.mul_(-1)


def load_other_values(model):
    state = {key: value * -1 if "prompt" in key else value for key, value in model.state_dict().items()}
    model.load_state_dict(state)


@pytest.mark.parametrize(
    "change",
    [
        change_prompt,
        step_of_the_optimizer,
        change_base,
        change_base_data,
        load_other_values,
        lambda model: model.double(),
    ],
    ids=["prompt in place", "optimizer", "base in place", "base through .data", "load_state_dict", "dtype"],
)
def test_computed_again_when_something_changed(change, runs):
    model, _, _ = adapted(llama)
    row = ids(1, 7)
    before = generate(model, input_ids=row)
    change(model)
    out = generate(model, input_ids=row)
    assert runs == ["default"] * 2
    base = build(llama).to(model.dtype)
    base.load_state_dict(
        {
            key.replace("base_layer.", ""): v
            for key, v in model.get_base_model().state_dict().items()
            if "input_t" not in key
        }
    )
    assert torch.equal(out[0, 7:], greedy(base, adapter_weights(model), row[0], 5))
    del before


def test_prompt_data_changed_behind_the_version_counter(runs):
    """`.data` does not count a tensor's version up, and the storage stays: the values have to be looked at."""
    model, base, _ = adapted(llama)
    generate(model, input_ids=ids(1, 7))
    model.base_model.layer.input_tuning_prompt["default"].weight.data.copy_(torch.randn(4, 32))
    out = generate(model, input_ids=ids(1, 7))
    assert torch.equal(out[0, 7:], greedy(base, adapter_weights(model), ids(1, 7)[0], 5))


def test_lora_switched_on_and_off(runs):
    model = build(llama)
    model.add_adapter(LoraConfig(target_modules=["k_proj"], init_lora_weights=False), "lora")
    model.add_adapter(config(), "default")
    randomize(model)
    weights, row = adapter_weights(model), ids(1, 7)
    model.eval()
    for active in (["default"], ["lora", "default"], ["default"]):
        model.set_adapter(active)
        plain = build(llama)
        if len(active) == 2:
            lora = {key: value for key, value in model.state_dict().items() if "lora_" in key}
            plain.add_adapter(LoraConfig(target_modules=["k_proj"]), "lora")
            plain.load_state_dict(lora, strict=False)
        assert torch.equal(generate(model, input_ids=row)[0, 7:], greedy(plain.eval(), weights, row[0], 5))
    assert len(runs) == 3


def first_logits(model, row):
    """With a prompt that comes from the states, where the cache of prompts is on."""
    with torch.no_grad():
        return model(input_ids=row, past_key_values=transformers.DynamicCache(), use_cache=True).logits


def rescaled(model):
    model.model.layers[0].self_attn.k_proj.scaling["lora"] *= 3


def with_a_hook(model):
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.5)


@pytest.mark.parametrize("change", [rescaled, with_a_hook])
def test_what_stands_around_the_weights(change, runs):
    model = build(llama)
    model.add_adapter(LoraConfig(target_modules=["k_proj"], init_lora_weights=False), "lora")
    model.add_adapter(config(), "default")
    randomize(model)
    model.set_adapter(["lora", "default"])
    model.eval()
    before = first_logits(model, ids(1, 7))
    change(model)
    after = first_logits(model, ids(1, 7))
    assert runs == ["default"] * 2
    set_prompt_cache(model, False)
    want = first_logits(model, ids(1, 7))
    assert_close(after, want, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(before, want, atol=1e-2)


def test_a_call_with_gradients_forgets_everything(runs):
    model, _, _ = adapted(llama)
    for _ in range(2):
        generate(model, input_ids=ids(1, 7))
    model(input_ids=ids(1, 7))
    generate(model, input_ids=ids(1, 7))
    assert runs == ["default"] * 2


def test_weights_of_inference_mode(runs):
    """Tensors made in inference mode have no version."""
    with torch.inference_mode():
        model, base, weights = adapted(llama)
        inference = build(llama)
        inference.load_state_dict({key: value.clone() for key, value in base.state_dict().items()}, assign=True)
        model = get_peft_model(inference, config(llama)).eval()
        randomize(model)
        for _ in range(2):
            out = generate(model, input_ids=ids(1, 7))
        assert model.get_base_model().model.norm.weight.is_inference()
        assert torch.equal(out[0, 7:], greedy(base, weights, ids(1, 7)[0], 5))
    assert runs == ["default"]


def test_weights_that_are_elsewhere(runs, monkeypatch):
    """Offloaded or sharded: what this process sees says nothing of them."""
    model, base, weights = adapted(llama)
    model.get_base_model().model.norm.weight.ds_id = 0  # DeepSpeed's mark of a shard
    out = generate(model, input_ids=ids(1, 7))
    assert torch.equal(out[0, 7:], greedy(base, weights, ids(1, 7)[0], 5))
    assert runs == []


def test_own_modules_inside_the_backbone(runs):
    """`modules_to_save` of each adapter takes part in its prompt's keys and values."""
    model = get_peft_model(build(llama), config(llama, modules_to_save=["up_proj"])).eval()
    randomize(model)
    add(model, "b", seed=2, num_virtual_tokens=6, modules_to_save=["up_proj"])
    model.eval()
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if "modules_to_save" in key:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(DEVICE)
    row, alone = ids(1, 7), {}
    for name in ("default", "b"):
        model.set_adapter(name)
        set_prompt_cache(model, False)
        alone[name] = generate(model, input_ids=row)[0]
        set_prompt_cache(model, True)
        assert torch.equal(generate(model, input_ids=row)[0], alone[name])
    assert not torch.equal(alone["b"], alone["default"])
    for _ in range(2):
        out = generate(model, input_ids=row.expand(3, -1), adapter_names=["b", "default", "b"])
        assert torch.equal(out, torch.stack([alone["b"], alone["default"], alone["b"]]))
    assert set(runs) == {"default", "b"}


def test_a_model_without_an_adapter():
    with pytest.raises(ValueError, match="no input-tuning adapter"):
        set_prompt_cache(build(llama), True)


def test_never_in_training(runs):
    model, _, _ = adapted(llama)
    row = ids(1, 7)
    cache = transformers.DynamicCache(config=model.config)
    model(input_ids=row, past_key_values=cache, use_cache=True).logits.sum().backward()
    assert model.base_model.layer.input_tuning_prompt["default"].weight.grad.abs().sum() > 0
    model.train()
    with torch.no_grad():
        model(input_ids=row, past_key_values=transformers.DynamicCache(config=model.config), use_cache=True)
    assert runs == []


@each_decoder
def test_positions_that_start_elsewhere(family, runs):
    """The prompt was computed at the first positions; a caller who starts later gets the usual way."""
    if family.name == "bloom":
        return  # takes no positions
    model, _, _ = adapted(family)
    row, positions = ids(1, 7), torch.arange(7, device=DEVICE)[None] + 3
    with torch.no_grad():
        want = model(input_ids=row, position_ids=positions).logits
        cache = transformers.DynamicCache(config=model.config)
        out = model(input_ids=row, position_ids=positions, past_key_values=cache, use_cache=True).logits
    assert_close(out, want, atol=2e-4, rtol=1e-3)
    assert runs == []


@each_decoder
def test_pads_without_positions(family, runs):
    """Without positions most models count places: pads behind the prompt would move the tokens away from it."""
    model, base, weights = adapted(family)
    inputs = left_padded((7, 4))
    if family.name == "gpt2":
        return  # its own rows depend on left padding then
    with torch.no_grad():
        cache = transformers.DynamicCache(config=model.config)
        out = model(**inputs, past_key_values=cache, use_cache=True).logits
    for i, n in enumerate((7, 4)):
        assert_close(out[i, -n:], row_output(base, weights, ids(n, seed=n)), atol=2e-4, rtol=1e-3)


def test_a_copy_has_its_own(runs):
    model, base, _ = adapted(llama)
    generate(model, input_ids=ids(1, 7))
    twin = copy.deepcopy(model)
    randomize(twin, seed=5)
    assert not twin.base_model.layer.prompt_states
    assert torch.equal(
        generate(twin, input_ids=ids(1, 7))[0, 7:], greedy(base, adapter_weights(twin), ids(1, 7)[0], 5)
    )


def test_too_long_is_said_before_the_cache_is_touched():
    model, _, _ = adapted(FAMILIES["gpt2"])
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad(), pytest.raises(ValueError, match="Shorten the input"):
        model(input_ids=ids(1, 61), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 0


def test_a_cache_that_is_offloaded_takes_the_usual_way(runs):
    """Its layers are moved about in the order in which the model asks for them."""
    model, _, _ = adapted(llama)
    with torch.no_grad():
        cache = transformers.DynamicCache(config=model.config)
        cache.offloading = True  # as `cache_implementation="offloaded"` makes it; needs a GPU to run
        assert (
            prompt_cache.put_prompt_into_cache(
                model.get_base_model().model, {"past_key_values": cache}, 1, 4, model.base_model.layer, False
            )
            is None
        )
    assert runs == []


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def test_dynamic_rope_of_some_layers_takes_the_usual_way(runs):
    family = FAMILIES["gemma3"]
    settings = family.config()
    settings.rope_parameters = {**settings.rope_parameters, "full_attention": DYNAMIC}
    torch.manual_seed(0)
    model = get_peft_model(family.heads["lm"](settings).to(DEVICE), config(family)).eval()
    generate(model, input_ids=ids(1, 7))
    assert runs == []


def test_dynamic_rope_takes_the_usual_way(runs):
    settings = llama.config()
    settings.rope_parameters = DYNAMIC
    torch.manual_seed(0)
    model = get_peft_model(transformers.LlamaForCausalLM(settings).to(DEVICE), config(llama)).eval()
    generate(model, input_ids=ids(1, 7))
    assert runs == []
