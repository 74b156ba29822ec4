"""A prompt's keys and values are computed once, used if that is exact, inside of `reuse_prompts` only."""

from __future__ import annotations

import copy
from contextlib import ExitStack, nullcontext

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from adapters import adapted, add, config, randomize
from device import DEVICE
from families import DECODERS, FAMILIES, PAD, build, ids, padded
from oracles import adapter_weights, greedy, row_output
from peft_input_tuning import reuse_prompts
from peft_input_tuning.virtual_tokens import reuse

llama = FAMILIES["llama"]
WINDOWED = {"mistral", "gemma2", "gemma3"}
each_decoder = pytest.mark.parametrize("family", DECODERS, ids=str)


@pytest.fixture
def inside():
    """Makes an adapted model that is inside of `reuse_prompts` until the test ends."""
    with ExitStack() as stack:

        def make(family, **changes):
            model, base, weights = adapted(family, **changes)
            stack.enter_context(reuse_prompts(model))
            return model, base, weights

        yield make


@pytest.fixture
def runs(monkeypatch) -> list[str]:
    """Names of the adapters whose prompts ran through the model."""
    names: list[str] = []
    compute = reuse._compute

    def counted(call, name):
        names.append(name)
        return compute(call, name)

    monkeypatch.setattr(reuse, "_compute", counted)
    return names


def generate(model, **inputs):
    return model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=PAD)


def left_padded(lengths=(7, 4, 9)):
    batch, mask = padded([ids(n, seed=n) for n in lengths], "left")
    return {"input_ids": batch, "attention_mask": mask}


@pytest.mark.feature("prompt cache")
@each_decoder
def test_one_run_serves_every_request_and_row(family, inside, runs):
    model, base, weights = inside(family)
    for lengths in ((7, 7), (5, 5, 5)):
        out = generate(model, input_ids=torch.stack([ids(n, seed=n) for n in lengths]))
        assert torch.equal(out[0, -5:], greedy(base, weights, ids(lengths[0], seed=lengths[0]), 5))
    assert runs == ["default"]


@pytest.mark.feature("prompt cache")
@each_decoder
def test_left_padding(family, inside, runs):
    """If attention counts places (windows) or positions come from nowhere but the mask, the usual way."""
    model, base, weights = inside(family)
    out = generate(model, **left_padded())
    for i, n in enumerate((7, 4, 9)):
        assert torch.equal(out[i, -5:], greedy(base, weights, ids(n, seed=n), 5))
    assert runs == ([] if family.name in {*WINDOWED, "bloom"} else ["default"])


@pytest.mark.feature("prompt cache")
@each_decoder
def test_mixed_batch(family, inside, runs):
    model, base, weights = inside(family)
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
def test_window_smaller_than_the_prompt(family, inside, runs):
    model, base, weights = inside(family, num_virtual_tokens=11)
    out = generate(model, input_ids=ids(2, 7))
    for i in range(2):
        assert torch.equal(out[i, 7:], greedy(base, weights, ids(2, 7)[i], 5))
    assert runs == ["default"]


def train_and_go_back(model):
    model.train()
    model.base_model.layer.input_tuning_prompt["default"].weight.data.mul_(-1)
    model.eval()


def load_over(model):
    add(model, "other", seed=9)
    model.base_model.layer.input_tuning_prompt["default"].weight.data.mul_(-1)
    model.eval()


@pytest.mark.parametrize(
    "change",
    [train_and_go_back, lambda model: model.double(), load_over],
    ids=["training mode", "dtype", "another adapter"],
)
def test_forgotten_when_something_changes(change, runs):
    """What is outside of the promise: training, another device or dtype, adding an adapter."""
    model, base, _ = adapted(llama)
    row = ids(1, 7)
    with reuse_prompts(model):
        generate(model, input_ids=row)
        change(model)
        out = generate(model, input_ids=row)
    assert runs == ["default"] * 2
    assert torch.equal(out[0, 7:], greedy(base.to(model.dtype), adapter_weights(model), row[0], 5))


@pytest.mark.parametrize("again", [True, False])
def test_nothing_is_kept_outside(again, runs):
    """What changes between two `with` is seen, without an eye on it."""
    model, _, _ = adapted(llama)
    row = ids(1, 7)
    with reuse_prompts(model):
        generate(model, input_ids=row)
    with torch.no_grad():
        model.get_base_model().model.layers[0].self_attn.k_proj.weight.mul_(-1)
    base = build(llama)
    with torch.no_grad():
        base.model.layers[0].self_attn.k_proj.weight.mul_(-1)
    with reuse_prompts(model) if again else nullcontext():
        out = generate(model, input_ids=row)
    assert torch.equal(out[0, 7:], greedy(base, adapter_weights(model), row[0], 5))
    assert runs == ["default"] * (2 if again else 1)


def test_an_error_inside_ends_it(runs):
    model, _, _ = adapted(llama)
    with pytest.raises(KeyboardInterrupt), reuse_prompts(model):
        raise KeyboardInterrupt
    assert model.base_model.layer.prompt_states is None
    generate(model, input_ids=ids(1, 7))
    assert runs == []


def test_one_inside_another(runs):
    model, base, weights = adapted(llama)
    with reuse_prompts(model):
        with reuse_prompts(model):
            generate(model, input_ids=ids(1, 7))
        for _ in range(2):
            out = generate(model, input_ids=ids(1, 7))
    assert torch.equal(out[0, 7:], greedy(base, weights, ids(1, 7)[0], 5))
    assert runs == ["default"]


def test_a_model_with_another_method_s_adapter(runs):
    """LoRA is part of what the prompt goes through."""
    model = build(llama)
    model.add_adapter(LoraConfig(target_modules=["k_proj"], init_lora_weights=False), "lora")
    model.add_adapter(config(), "default")
    randomize(model)
    model.set_adapter(["lora", "default"])
    model.eval()
    row = ids(1, 7)
    want = generate(model, input_ids=row)
    with reuse_prompts(model):
        for _ in range(2):
            assert torch.equal(generate(model, input_ids=row), want)
    assert runs == ["default"]


def test_weights_of_inference_mode(runs):
    """Tensors made in inference mode have no version."""
    with torch.inference_mode():
        model, base, weights = adapted(llama)
        inference = build(llama)
        inference.load_state_dict({key: value.clone() for key, value in base.state_dict().items()}, assign=True)
        model = get_peft_model(inference, config(llama)).eval()
        randomize(model)
        with reuse_prompts(model):
            for _ in range(2):
                out = generate(model, input_ids=ids(1, 7))
        assert model.get_base_model().model.norm.weight.is_inference()
        assert torch.equal(out[0, 7:], greedy(base, weights, ids(1, 7)[0], 5))
    assert runs == ["default"]


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
        alone[name] = generate(model, input_ids=row)[0]
        with reuse_prompts(model):
            assert torch.equal(generate(model, input_ids=row)[0], alone[name])
    assert not torch.equal(alone["b"], alone["default"])
    with reuse_prompts(model):
        for _ in range(2):
            out = generate(model, input_ids=row.expand(3, -1), adapter_names=["b", "default", "b"])
            assert torch.equal(out, torch.stack([alone["b"], alone["default"], alone["b"]]))
    assert set(runs) == {"default", "b"}


def test_a_model_without_an_adapter():
    with pytest.raises(ValueError, match="no input-tuning adapter"), reuse_prompts(build(llama)):
        pass


def test_never_in_training(inside, runs):
    model, _, _ = inside(llama)
    row = ids(1, 7)
    cache = transformers.DynamicCache(config=model.config)
    model(input_ids=row, past_key_values=cache, use_cache=True).logits.sum().backward()
    assert model.base_model.layer.input_tuning_prompt["default"].weight.grad.abs().sum() > 0
    model.train()
    with torch.no_grad():
        model(input_ids=row, past_key_values=transformers.DynamicCache(config=model.config), use_cache=True)
    assert runs == []


@each_decoder
def test_positions_that_start_elsewhere(family, inside, runs):
    """The prompt was computed at the first positions; a caller who starts later gets the usual way."""
    if family.name == "bloom":
        return  # takes no positions
    model, _, _ = inside(family)
    row, positions = ids(1, 7), torch.arange(7, device=DEVICE)[None] + 3
    with torch.no_grad():
        want = model(input_ids=row, position_ids=positions).logits
        cache = transformers.DynamicCache(config=model.config)
        out = model(input_ids=row, position_ids=positions, past_key_values=cache, use_cache=True).logits
    assert_close(out, want, atol=2e-4, rtol=1e-3)
    assert runs == []


@each_decoder
def test_pads_without_positions(family, inside, runs):
    """Without positions most models count places: pads behind the prompt would move the tokens away from it."""
    model, base, weights = inside(family)
    inputs = left_padded((7, 4))
    if family.name == "gpt2":
        return  # its own rows depend on left padding then
    with torch.no_grad():
        cache = transformers.DynamicCache(config=model.config)
        out = model(**inputs, past_key_values=cache, use_cache=True).logits
    for i, n in enumerate((7, 4)):
        assert_close(out[i, -n:], row_output(base, weights, ids(n, seed=n)), atol=2e-4, rtol=1e-3)


def test_a_copy_keeps_nothing(inside, runs):
    model, base, _ = inside(llama)
    generate(model, input_ids=ids(1, 7))
    twin = copy.deepcopy(model)
    randomize(twin, seed=5)
    assert not twin.base_model.layer.prompt_states
    assert torch.equal(
        generate(twin, input_ids=ids(1, 7))[0, 7:], greedy(base, adapter_weights(twin), ids(1, 7)[0], 5)
    )


def test_too_long_is_said_before_the_cache_is_touched(inside):
    model, _, _ = inside(FAMILIES["gpt2"])
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad(), pytest.raises(ValueError, match="Shorten the input"):
        model(input_ids=ids(1, 61), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 0


def test_a_prompt_that_sees_what_follows_takes_the_usual_way(runs):
    """Attention that goes both ways: found by a run, once."""
    settings = llama.config()
    settings.is_causal = False
    torch.manual_seed(0)
    model = get_peft_model(transformers.LlamaForCausalLM(settings).eval().to(DEVICE), config(llama)).eval()
    randomize(model)
    row = {"input_ids": ids(1, 7), "use_cache": True}
    with torch.no_grad():
        want = model(**row, past_key_values=transformers.DynamicCache()).logits
        with reuse_prompts(model):
            for _ in range(2):
                assert torch.equal(model(**row, past_key_values=transformers.DynamicCache()).logits, want)
    assert runs == ["default"]


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def test_dynamic_rope_of_some_layers_takes_the_usual_way(runs):
    family = FAMILIES["gemma3"]
    settings = family.config()
    settings.rope_parameters = {**settings.rope_parameters, "full_attention": DYNAMIC}
    torch.manual_seed(0)
    model = get_peft_model(family.heads["lm"](settings).to(DEVICE), config(family)).eval()
    with reuse_prompts(model):
        generate(model, input_ids=ids(1, 7))
    assert runs == []


def test_dynamic_rope_takes_the_usual_way(runs):
    settings = llama.config()
    settings.rope_parameters = DYNAMIC
    torch.manual_seed(0)
    model = get_peft_model(transformers.LlamaForCausalLM(settings).to(DEVICE), config(llama)).eval()
    with reuse_prompts(model):
        generate(model, input_ids=ids(1, 7))
    assert runs == []


# ---- what may change inside without a change of weights -------------------------------------------------------------


def test_contexts_that_overlap(runs):
    """Two threads of a server: the last one out switches it off."""
    model, base, _ = adapted(llama)
    first, second = reuse_prompts(model), reuse_prompts(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    generate(model, input_ids=ids(1, 7))
    assert runs == ["default"]
    second.__exit__(None, None, None)
    assert model.base_model.layer.prompt_states is None
    randomize(model, seed=7)
    out = generate(model, input_ids=ids(1, 7))
    assert torch.equal(out[0, 7:], greedy(base, adapter_weights(model), ids(1, 7)[0], 5))


def test_an_adapter_that_is_loaded_over_the_one_in_use(tmp_path):
    model, base, weights = adapted(llama)
    model.save_pretrained(tmp_path)
    with reuse_prompts(model):
        randomize(model, seed=7)
        generate(model, input_ids=ids(1, 7))
        model.load_adapter(tmp_path, "default")
        out = generate(model.eval(), input_ids=ids(1, 7))
    assert torch.equal(out[0, 7:], greedy(base, weights, ids(1, 7)[0], 5))


@torch.no_grad()
def test_another_method_s_adapters_are_switched():
    model = build(llama)
    lora = LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    model.add_adapter(lora, "lora")
    model.add_adapter(config(), "default")
    randomize(model)
    model.eval()
    row = {"input_ids": ids(1, 7), "use_cache": True}
    want = {}
    for active in (("lora", "default"), ("default",)):
        model.set_adapter(list(active))
        want[active] = model(**row, past_key_values=transformers.DynamicCache()).logits
    with reuse_prompts(model):
        for active in [*want, *want]:
            model.set_adapter(list(active))
            got = model(**row, past_key_values=transformers.DynamicCache()).logits
            assert_close(got, want[active], atol=2e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.skipif(DEVICE.type != "cpu", reason="autocast of a CPU")
def test_autocast_has_states_of_its_own():
    model, _, _ = adapted(llama)
    row = {"input_ids": ids(1, 7), "use_cache": True}
    want = model(**row, past_key_values=transformers.DynamicCache()).logits
    with reuse_prompts(model):
        with torch.autocast("cpu", torch.bfloat16):
            model(**row, past_key_values=transformers.DynamicCache())
        assert_close(model(**row, past_key_values=transformers.DynamicCache()).logits, want, atol=1e-4, rtol=1e-4)
